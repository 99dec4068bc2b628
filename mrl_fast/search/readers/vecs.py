"""Rows in ``.fvecs``, ``.bvecs`` and ``.ivecs`` files: each its width, int32, then its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mrl_fast.search.readers.base import SeekableSource, Source, read_numbers

WORD = 4  # bytes of a row's width
DTYPES = {".fvecs": np.dtype("<f4"), ".bvecs": np.dtype("u1"), ".ivecs": np.dtype("<i4")}


class _Vecs(SeekableSource):
    def __init__(self, path: Path):
        self.dtype = DTYPES[path.suffix.lower()]
        size = path.stat().st_size
        if size < WORD:
            raise ValueError(f"{path}: expected rows of an int32 D and D numbers, got {size} bytes")
        width = int(read_numbers(path, np.dtype("<i4"), [0], 1)[0, 0])
        self.row_bytes = WORD + width * self.dtype.itemsize
        if width < 1 or size % self.row_bytes:
            expected = f"a positive multiple of {self.row_bytes} bytes"
            if width < 1:
                expected = "at least 1 column"
            got = f"{width} in its first row and {size} bytes"
            raise ValueError(f"{path}: expected {expected}, got {got}")
        super().__init__(path, size // self.row_bytes, width)

    def _read(self, begin: int, end: int) -> np.ndarray:
        count, offset = (end - begin) * self.row_bytes, begin * self.row_bytes
        numbers = read_numbers(self.path, np.dtype(np.uint8), [offset], count)
        table = numbers.reshape(-1, self.row_bytes)
        widths = table[:, :WORD].copy().view("<i4")[:, 0]
        if (wrong := widths != self.width).any():
            row = int(wrong.argmax())
            got = f"{widths[row]} in row {begin + row}"
            raise ValueError(f"{self.path}: expected {self.width} columns in every row, got {got}")
        values = table[:, WORD:]
        return values.astype(np.float32) if self.dtype == np.uint8 else values.view(self.dtype)


def open_vectors(path: Path) -> Source:
    """Rows of D floats or bytes."""
    return _Vecs(path)


def read_integers(path: Path) -> np.ndarray:
    """Rows of k integers, ``[n, k]`` int64."""
    source = _Vecs(path)
    ((values, _),) = source.chunks(source.rows)
    return values.astype(np.int64)
