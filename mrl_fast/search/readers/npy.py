"""Arrays in ``.npy`` files, in either order of axes and of bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy_format

from mrl_fast.search.readers.base import ADVICE, SeekableSource, Source, as_int64, read_numbers

VECTORS = {"float16", "float32", "float64", "int8", "uint8"}
MASKS = ("bool", "uint8")
HEADERS = {
    (1, 0): npy_format.read_array_header_1_0,
    (2, 0): npy_format.read_array_header_2_0,
}


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool  # columns lie one after the other
    dtype: np.dtype
    offset: int  # where the numbers begin


class _Npy(SeekableSource):
    def __init__(self, path: Path):
        self.header = _header(path)
        shape, _, dtype, _ = self.header
        if len(shape) != 2 or dtype.name not in VECTORS:
            got = f"shape {list(shape)} of {dtype.name}"
            raise ValueError(f"{path}: expected [n, D] of {', '.join(sorted(VECTORS))}, got {got}")
        super().__init__(path, *shape)

    def _read(self, begin: int, end: int) -> np.ndarray:
        vectors = _rows(self.path, self.header, begin, end)
        return vectors if vectors.dtype.kind == "f" else vectors.astype(np.float32)


def open_vectors(path: Path) -> Source:
    """An array ``[n, D]`` of floats or bytes."""
    return _Npy(path)


def read_integers(path: Path) -> np.ndarray:
    """An array of integers, ``[n]`` or ``[n, k]`` int64."""
    header = _header(path)
    if header.dtype.kind not in "iu" or len(header.shape) not in (1, 2):
        got = f"shape {list(header.shape)} of {header.dtype.name}"
        if header.dtype.kind in "SUOV":
            got += ADVICE
        raise ValueError(f"{path}: expected integers [n] or [n, k], got {got}")
    if not math.prod(header.shape):
        return np.empty(header.shape, np.int64)
    return as_int64(path, _rows(path, header, 0, header.shape[0]).reshape(header.shape))


def is_mask(path: Path) -> bool:
    """Whether the array is of bool or uint8, which say of each row whether it is meant."""
    return _header(path).dtype.name in MASKS


def read_mask(path: Path, size: int) -> np.ndarray | None:
    """``[size]`` bool, of bool or of uint8 that are 0 or 1; None where the array is of other
    integers, which are ids."""
    header = _header(path)
    kind, shape = header.dtype.name, header.shape
    if kind not in MASKS:
        return None
    if shape != (size,):
        raise ValueError(
            f"{path}: expected a mask of the index's {size:,} rows, as it is of {kind}, got shape "
            f"{list(shape)}; ids are of another dtype"
        )
    values = _rows(path, header._replace(dtype=np.dtype(np.uint8)), 0, size)[:, 0]
    if kind == "uint8" and values.max(initial=0) > 1:
        raise ValueError(
            f"{path}: expected a mask of 0 and 1, as it is of uint8, got {values.max()}; ids are "
            "of another dtype"
        )
    return values != 0


def _rows(path: Path, header: _Header, begin: int, end: int) -> np.ndarray:
    """Rows [begin, end) of a one- or two-dimensional array, in this machine's order of bytes."""
    (rows, *widths), fortran, dtype, offset = header
    width, count = math.prod(widths), end - begin
    if fortran:  # a run of rows in each column
        first, step = offset + begin * dtype.itemsize, rows * dtype.itemsize
        runs = range(first, first + width * step, step)
        numbers = read_numbers(path, dtype, runs, count).T
    else:
        runs = [offset + begin * width * dtype.itemsize]
        numbers = read_numbers(path, dtype, runs, count * width).reshape(count, width)
    return np.ascontiguousarray(numbers, dtype.newbyteorder("="))


def _header(path: Path) -> _Header:
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(len(npy_format.MAGIC_PREFIX))
        if magic != npy_format.MAGIC_PREFIX:
            raise ValueError(f"{path}: expected a .npy file, got one that begins with {magic!r}")
        file.seek(0)
        try:
            version = npy_format.read_magic(file)
            if version not in HEADERS:
                raise ValueError(f"version {version}")
            shape, fortran, dtype = HEADERS[version](file)
        except Exception as error:  # whatever numpy raises on a damaged header
            raise ValueError(f"{path}: expected an undamaged .npy file, got {error}") from error
        offset = file.tell()
    expected = offset + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and size != expected or min(shape, default=0) < 0:
        got = f"{size} for shape {list(shape)} of {dtype.name}"
        raise ValueError(f"{path}: expected {expected} bytes, got {got}")
    return _Header(shape, fortran, dtype, offset)
