"""What the readers of all formats share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

Chunk = tuple[Any, "np.ndarray | None"]  # vectors [n, D], an array or a tensor; ids [n] int64


# Where ids are not integers.
ADVICE = (
    "; ids are int64: keep a table of your own from its strings to numbers, and number the rows by "
    "it; rows without ids are 0, 1, 2, … in their order"
)


class Source(ABC):
    """Vectors ``[rows, width]`` in a file.

    Attributes:
        id_columns: The file's columns that could be ids, integers or strings, by name: whether they
            are integers, which alone are read.
    """

    id_columns: Mapping[str, bool] = MappingProxyType({})

    def __init__(self, path: Path, rows: int, width: int):
        self.path, self.rows, self.width = path, rows, width

    @abstractmethod
    def chunks(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        """Rows [start, stop), at most ``rows`` at a time, with their ids where the file has some.

        Raises:
            ValueError: The file is damaged, or was cut since it was opened.
        """


class SeekableSource(Source):
    """Vectors in a file without ids, any rows of which can be read without the others."""

    def chunks(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        stop = self.rows if stop is None else min(stop, self.rows)
        for begin in range(start, stop, rows):
            yield self._read(begin, min(begin + rows, stop)), None

    @abstractmethod
    def _read(self, begin: int, end: int) -> Any:
        """Rows [begin, end)."""


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file that is not empty.

    Raises:
        FileNotFoundError, ValueError: There is none; names what there is.
    """
    file = Path(path)
    if not file.is_file():
        got = "a folder" if file.is_dir() else "something else" if file.exists() else "nothing"
        kind = FileNotFoundError if got == "nothing" else ValueError
        raise kind(f"{file}: expected a file, got {got}")
    if not file.stat().st_size:
        raise ValueError(f"{file}: expected a file with something in it, got 0 bytes")
    return file


def read_numbers(path: Path, dtype: np.dtype, offsets: Sequence[int], count: int) -> np.ndarray:
    """``[offsets, count]``: ``count`` numbers from each offset on, which is in bytes.

    They are read, not mapped: memory stays bounded, and a file that is cut meanwhile is an error.
    """
    numbers = np.empty((len(offsets), count), dtype)
    with open(path, "rb") as file:
        for run, offset in zip(numbers, offsets, strict=True):
            file.seek(offset)
            if (size := file.readinto(run.view(np.uint8).data)) != run.nbytes:
                expected = f"{run.nbytes} bytes from {offset} on"
                raise ValueError(f"{path}: expected {expected}, got {size}")
    return numbers


def as_int64(path: Path, values: np.ndarray) -> np.ndarray:
    """Integers of any dtype as int64."""
    if values.dtype.kind == "u" and values.size and values.max() >= 1 << 63:
        raise ValueError(f"{path}: expected ids below {1 << 63}, got {values.max()}")
    return values.astype(np.int64, copy=False)
