"""Changing a finished index: each change is saved once, at the end, or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mrl_fast.cli import folders, sidecars
from mrl_fast.cli.inputs import Vectors, check_width, naming_ids, naming_rows
from mrl_fast.cli.output import progress, saying_on_interrupt
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.readers import PARQUET, npy, read_ids
from mrl_fast.search.readers.base import existing
from mrl_fast.search.readers.text import no_id


def add(vectors: Vectors, folder: Path, *, quiet: bool) -> dict[str, Any]:
    """Appends the vectors; a summary."""
    begun = time.perf_counter()
    with _changing(folder, "nothing was added to", "all rows were added to") as index:
        check_width(vectors, index)
        before = len(index)
        with naming_ids(vectors, folder), progress("add", vectors.rows, quiet=quiet) as bar:
            for part, ids, row in vectors.chunks(vectors.chunk_rows):
                with naming_rows(vectors, part, row, index.dtype):
                    index.add(part, ids)
                bar.update(len(part))
    came = None if vectors.has_ids else index.ids[[before, -1]].tolist()
    added = {"added": vectors.rows, "ids": came, "dims": index.dims}
    return {**_summary(folder, index, begun), **added}


def update(vectors: Vectors, folder: Path, *, quiet: bool) -> dict[str, Any]:
    """Replaces the vectors of the ids that come with these; a summary."""
    if not vectors.has_ids:
        raise ValueError(
            "--ids: expected the ids whose vectors are replaced, in a file, or in a column of "
            "SOURCE by --id-column; got neither"
        )
    begun, seen = time.perf_counter(), []
    with _changing(folder, "nothing was replaced in", "all vectors were replaced in") as index:
        check_width(vectors, index)
        with naming_ids(vectors), progress("update", vectors.rows, quiet=quiet) as bar:
            for part, ids, row in vectors.chunks(vectors.chunk_rows):
                with naming_rows(vectors, part, row, index.dtype):
                    index.update(ids, part)
                seen.append(ids)
                bar.update(len(part))
            values, counts = np.unique(np.concatenate(seen), return_counts=True)
            if counts.max() > 1:
                raise ValueError(f"ids: expected none twice, got {values[counts > 1][0]} again")
    return {**_summary(folder, index, begun), "updated": vectors.rows}


def remove(
    folder: Path, given: list[str], file: Path | None, id_column: str | None
) -> dict[str, Any]:
    """Removes the vectors of the ids that are given, or of those in a file; a summary."""
    if bool(given) == (file is not None):
        got = f"{len(given)} of them and {file}" if given else "none"
        raise ValueError(f"ID: expected ids, or a file of them by --ids, got {got}")
    begun = time.perf_counter()
    with _changing(folder, "nothing was removed from", "all of them were removed from") as index:
        ids = _ids(folder, given, file, id_column)
        known = index.contains(ids)
        if not known.all():
            unknown = ids[~known]
            more = f" and {len(unknown) - 1:,} more that are not" if len(unknown) > 1 else ""
            raise ValueError(f"{file or 'ID'}: expected ids of the index, got {unknown[0]}{more}")
        before = len(index)
        index.remove(ids)
    return {**_summary(folder, index, begun), "removed": before - len(index)}


def compact(folder: Path) -> dict[str, Any]:
    """Frees the room of rows that were removed or replaced; a summary."""
    begun, before = time.perf_counter(), _bytes(folder)
    with _changing(folder, "nothing was changed in", "the room was freed in") as index:
        removed = index.removed
        index.compact()
    freed = {"freed_rows": removed, "bytes_before": before, "bytes": _bytes(folder)}
    return {**_summary(folder, index, begun), **freed}


def build_graph(folder: Path, *, progress: bool) -> dict[str, Any]:
    """Builds a graph over the vectors; a summary."""
    begun = time.perf_counter()
    with _changing(folder, "nothing was changed in", "the graph was saved in") as index:
        index.build_graph(progress=progress)
    sizes = folders.files_of(folder).items()
    graphs = [size for name, size in sizes if Path(name).name.startswith("graph-")]
    return {**_summary(folder, index, begun), "graph_bytes": sum(graphs)}


@contextmanager
def _changing(folder: Path, before: str, after: str) -> Iterator[MatryoshkaIndex]:
    """An index to change, which is saved where nothing was raised. Ctrl-C says what the folder
    holds, in these words."""
    index = MatryoshkaIndex.load(folder)
    sidecars.check_finished(folder)
    with saying_on_interrupt(folder, f"{before} {folder}", f"{after} {folder}"):
        yield index
        index.save(folder)


def _ids(
    folder: Path,
    given: list[str],
    file: Path | None,
    id_column: str | None,
) -> np.ndarray:
    if file is None:
        return np.array([_id(text) for text in given], np.int64)
    if id_column is None and file.suffix.lower() in PARQUET:
        id_column = sidecars.columns(folder).get("id_column")
    if file.suffix.lower() == ".npy" and npy.is_mask(existing(file)):
        raise ValueError(
            f"{file}: expected ids, got what may be a mask, as it is of bool or uint8: update and "
            f'remove change the order of rows; "info --ids" writes the ids in it, and ids[mask] '
            "of them can be removed"
        )
    return read_ids(file, id_column)


def _id(text: str) -> np.int64:
    try:
        return np.int64(int(text))
    except (ValueError, OverflowError):
        raise ValueError(f"ID: expected an int64, got {no_id(text)}") from None


def _summary(folder: Path, index: MatryoshkaIndex, begun: float) -> dict[str, Any]:
    return {"index": folder, "rows": len(index), "seconds": time.perf_counter() - begun}


def _bytes(folder: Path) -> int:
    return sum(folders.files_of(folder).values())
