"""The folder that a demo leaves behind: an encoder, an index, and the entries of its rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mrl_fast.experiments.corpus import Entry
from mrl_fast.experiments.demo.encoder import TextEncoder
from mrl_fast.search.index import MatryoshkaIndex

ENCODER, INDEX, ENTRIES, LINES = "encoder.safetensors", "index", "entries.tsv", "lines.npy"


class Library:
    """An encoder and an index with the entries of its rows, mapped: only what is found is read."""

    def __init__(self, folder: Path):
        """Raises a ValueError where the folder is missing or not what a demo wrote."""
        if not folder.is_dir():
            raise ValueError(f"--out: expected a folder that a demo wrote, got {folder}, {NONE}")
        for name in (ENCODER, INDEX, ENTRIES, LINES):
            if not (folder / name).exists():
                raise ValueError(f"--out: expected a folder that a demo wrote, got {folder}, "
                                 f"which has no {name}")  # fmt: skip
        self.encoder = TextEncoder.load(folder / ENCODER)
        self.index = MatryoshkaIndex.load(folder / INDEX)
        self.text = np.memmap(folder / ENTRIES, np.uint8, "r")
        self.lines = _lines(folder / LINES)
        width = self.encoder.bag.embedding_dim
        whole = self.lines[-1] == len(self.text) and self.index.width == width
        if not whole or len(self.lines) != len(self.index) + 1:
            raise ValueError(f"--out: expected the files of one demo in {folder}, got a mixture")

    def entry(self, row: int) -> Entry:
        begin, end = self.lines[row : row + 2]
        return Entry(*self.text[begin:end].tobytes().decode().rstrip("\n").split("\t"))


def _lines(path: Path) -> np.ndarray:
    """``[N + 1]`` int64: where each entry begins, and where the last ends."""
    try:
        lines = np.load(path, mmap_mode="r")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: expected where each entry begins, got {error}") from None
    if lines.ndim != 1 or lines.dtype != np.int64:
        raise ValueError(
            f"{path}: expected where each entry begins, got {lines.dtype} {lines.shape}"
        )
    return lines


NONE = "which is none: `mrl-fast demo` makes one"


def save(
    folder: Path, encoder: TextEncoder, index: MatryoshkaIndex, entries: Sequence[Entry]
) -> None:
    """Saves all of it; the index's ids are places of the entries. Each file is replaced once it is
    whole."""
    lines = ["\t".join(entry).encode() + b"\n" for entry in entries]
    encoder.save(partial := folder / f".{ENCODER}")
    os.replace(partial, folder / ENCODER)
    (partial := folder / f".{ENTRIES}").write_bytes(b"".join(lines))
    os.replace(partial, folder / ENTRIES)
    np.save(partial := folder / f".{LINES}", np.cumsum([0, *map(len, lines)]))
    os.replace(partial, folder / LINES)
    index.save(folder / INDEX)
