"""Several files read as one: which they are, and their rows one after the other."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mrl_fast.search.disk.filesystem import files_that_matter
from mrl_fast.search.readers import PARQUET, holds_vectors
from mrl_fast.search.readers.base import Chunk, Source


class Parts(Source):
    """Vectors of one width in one or more files of one format."""

    def __init__(self, sources: Sequence[Source]):
        self.sources, self.ends = sources, np.cumsum([source.rows for source in sources])
        super().__init__(sources[0].path, int(self.ends[-1]), sources[0].width)
        for part in sources:
            if part.width != self.width:
                raise ValueError(
                    f"{part.path}: expected vectors of width {self.width} as in {self.path}, "
                    f"got {part.width}"
                )
        self.id_columns = sources[0].id_columns

    def chunks(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        """No chunk has rows of two files."""
        stop, begin = self.rows if stop is None else stop, 0
        for part in self.sources:
            first, last = max(start - begin, 0), min(stop - begin, part.rows)
            if first < last:
                yield from part.chunks(rows, first, last)
            begin += part.rows

    def place(self, row: int) -> tuple[Path, int]:
        """The file that has this row, and the row's number there."""
        i = int(np.searchsorted(self.ends, row, side="right"))
        part = self.sources[i]
        return part.path, row - int(self.ends[i]) + part.rows


def files_of(given: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files that are meant, in the order to read them: those of a folder and those that match
    a pattern sorted by name, numbers in names by value; else as they are given. Then those that are
    passed over: of a folder or a pattern the ones whose format holds no vectors."""
    files: list[Path] = []
    passed: list[Path] = []
    for path in given:
        if not path.is_dir() and (path.exists() or not glob.has_magic(str(path))):
            files.append(path)
            continue
        found = sorted(_files_in(path) if path.is_dir() else _matching(path), key=_by_numbers)
        kept = [file for file in found if holds_vectors(file)]
        files += kept or found  # whose reader says what is wrong
        passed += [file for file in found if kept and not holds_vectors(file)]
    if first := next((path for path in files if holds_vectors(path)), None):
        for path in files:
            if not holds_vectors(path):
                raise ValueError(
                    f"{path}: expected a file of vectors as {first} is, got "
                    f"{_format(path) or 'no'!r}; a pattern takes those of one format: "
                    f"'{first.parent}/*{_format(first)}'"
                )
    seen: set[Path] = set()
    for path in files:
        if _format(path) != _format(files[0]):
            raise ValueError(
                f"{path}: expected a {_format(files[0])} file as {files[0]} is, "
                f"got {_format(path) or 'none'!r}"
            )
        if path.absolute() in seen:
            raise ValueError(f"{path}: expected each file once, got it again")
        seen.add(path.absolute())
    return files, passed


def sorted_by_a_shell(given: Sequence[Path]) -> tuple[Path, Path] | None:
    """The first two neighbours, 10 and 2, say, of files in the order of ``ls``, which is not that
    of the numbers in their names."""
    if list(given) == sorted(given):
        for one, other in zip(given, given[1:], strict=False):
            if _by_numbers(one) > _by_numbers(other):
                return one, other
    return None


def _files_in(folder: Path) -> list[Path]:
    """But those that Spark and desktops hide: ``_SUCCESS``, ``.part-0.crc``."""
    files = [folder / name for name in files_that_matter(folder) if name[0] != "_"]
    for path in files:
        if path.is_dir():
            raise ValueError(
                f"{folder}: expected a folder of files, got the folder {path} in it; a pattern "
                f"takes files of all folders: '{folder}/**/*.parquet'"
            )
    if not files:
        raise ValueError(f"{folder}: expected a folder of files, got none in it")
    return files


def _matching(pattern: Path) -> list[Path]:
    files = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
    files = [path for path in files if not path.is_dir()]
    if not files:
        raise FileNotFoundError(f"{pattern}: expected a pattern of files, got none that match")
    return files


def _by_numbers(path: Path) -> tuple[Any, ...]:
    """part-2 comes before part-10."""
    parts = [re.split("([0-9]+)", part) for part in path.parts]  # text, number, text, …
    return [[int(p) if i % 2 else p for i, p in enumerate(part)] for part in parts], str(path)


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    return PARQUET[0] if suffix in PARQUET else suffix
