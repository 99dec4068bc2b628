"""Vectors and ids in files, read a chunk at a time: ``.npy``, ``.fvecs``, ``.bvecs``,
``.safetensors``, Parquet.

Nothing that a file says of its own size is believed before it was compared with the file's.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

NPY_MAGIC = b"\x93NUMPY"
NUMBERS = {"float16", "float32", "float64", "int8", "uint8"}  # of a vector in .npy
TENSORS = {"F16", "BF16", "F32", "F64"}
WORD = 4  # bytes of the number of columns that begins each row of .fvecs, .bvecs and .ivecs

Chunk = tuple[Any, "np.ndarray | None"]  # vectors [n, D], an array or a tensor; ids [n] int64


class Source(ABC):
    """Vectors ``[rows, width]`` in a file."""

    def __init__(self, path: Path, rows: int, width: int):
        self.path, self.rows, self.width = path, rows, width

    def chunks(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        """Rows [start, stop), at most ``rows`` at a time, with their ids where the file has some.

        Raises:
            ValueError: The file is damaged, or was cut since it was opened.
        """
        stop = self.rows if stop is None else min(stop, self.rows)
        for begin in range(start, stop, rows):
            yield self._read(begin, min(begin + rows, stop)), None

    @abstractmethod
    def _read(self, begin: int, end: int) -> Any: ...


def open_vectors(
    path: str | os.PathLike[str],
    column: str | None = None,
    key: str | None = None,
    id_column: str | None = None,
) -> Source:
    """Opens a file of vectors without reading them.

    Args:
        path: ``.npy``: an array ``[n, D]`` of floats or bytes. ``.fvecs``, ``.bvecs``: rows of an
            int32 D and D floats or bytes. ``.safetensors``: a tensor ``[n, D]``. ``.parquet``: a
            column of lists of D floats.
        column: Parquet's column; default: the only one that holds lists of floats.
        key: The tensor's name; default: the only ``[n, D]`` tensor of floats.
        id_column: Parquet's column of ids, integers.

    Returns:
        Source: ``rows``, ``width`` and ``chunks``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another format, or a file that is damaged or empty; names the file.
        ModuleNotFoundError: What reads this format is not installed.
    """
    file = _file(path)
    options = {"column": column, "key": key, "id_column": id_column}
    suffix = file.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{file}: expected one of {', '.join(READERS)}, got {suffix or 'no'!r}")
    reader, takes = READERS[suffix]
    for name, value in options.items():
        if value is not None and name not in takes:
            raise ValueError(f"{file}: {name}: expected none for {suffix}, got {value!r}")
    source = reader(file, *[options[name] for name in takes])
    if not source.rows or not source.width:
        got = f"[{source.rows}, {source.width}]"
        raise ValueError(f"{file}: expected at least one vector, got shape {got}")
    return source


def read_ids(path: str | os.PathLike[str], column: str | None = None) -> np.ndarray:
    """Ids ``[n]`` int64, all at once.

    Args:
        path: ``.npy`` of integers ``[n]``, ``.ivecs`` of width 1, ``.txt`` with one a line, or
            ``.parquet``.
        column: Parquet's column.

    Raises:
        FileNotFoundError, ValueError: As in ``open_vectors``.
    """
    file = _file(path)
    suffix = file.suffix.lower()
    if (column is not None) != (suffix in PARQUET):
        expected = "the name of one" if suffix in PARQUET else f"none for {suffix}"
        raise ValueError(f"{file}: id_column: expected {expected}, got {column!r}")
    if suffix in PARQUET:
        from mrl_fast.search.readers.parquet import read_ids as read_column

        return read_column(file, str(column))
    if suffix == ".txt":
        return _text_ids(file)
    ids = _integers(file)
    if ids.ndim == 2 and ids.shape[1] == 1 and suffix == ".ivecs":
        ids = ids[:, 0]
    if ids.ndim != 1:
        raise ValueError(f"{file}: expected ids [n], got shape {list(ids.shape)}")
    return ids


def read_neighbours(path: str | os.PathLike[str]) -> np.ndarray:
    """The true neighbours of queries, ``[queries, k]`` int64, all at once: ``.ivecs`` or ``.npy``.

    Raises:
        FileNotFoundError, ValueError: As in ``open_vectors``.
    """
    file = _file(path)
    ids = _integers(file)
    if ids.ndim != 2:
        raise ValueError(f"{file}: expected ids [queries, k], got shape {list(ids.shape)}")
    return ids


class _Npy(Source):
    def __init__(self, path: Path):
        self.shape, self.dtype, self.offset = _npy_header(path)
        if len(self.shape) != 2 or self.dtype.name not in NUMBERS:
            got = f"shape {list(self.shape)} of {self.dtype.name}"
            raise ValueError(f"{path}: expected [n, D] of {', '.join(sorted(NUMBERS))}, got {got}")
        super().__init__(path, *self.shape)

    def _read(self, begin: int, end: int) -> np.ndarray:
        offset = self.offset + begin * self.width * self.dtype.itemsize
        flat = _numbers(self.path, self.dtype, offset, (end - begin) * self.width)
        vectors = flat.reshape(-1, self.width)
        return vectors if vectors.dtype.kind == "f" else vectors.astype(np.float32)


class _Vecs(Source):
    """Each row begins with its width: int32, then so many numbers."""

    def __init__(self, path: Path, dtype: type):
        self.dtype = np.dtype(dtype)
        size = path.stat().st_size
        if size < WORD:
            raise ValueError(f"{path}: expected rows of an int32 D and D numbers, got {size} bytes")
        width = int(_numbers(path, np.dtype("<i4"), 0, 1)[0])
        self.row_bytes = WORD + width * self.dtype.itemsize
        if width < 1 or size % self.row_bytes:
            expected = f"a positive multiple of {self.row_bytes} bytes"
            if width < 1:
                expected = "at least 1 column"
            got = f"{width} in its first row and {size} bytes"
            raise ValueError(f"{path}: expected {expected}, got {got}")
        super().__init__(path, size // self.row_bytes, width)

    def _read(self, begin: int, end: int) -> np.ndarray:
        count = (end - begin) * self.row_bytes
        flat = _numbers(self.path, np.dtype(np.uint8), begin * self.row_bytes, count)
        table = flat.reshape(-1, self.row_bytes)
        widths = table[:, :WORD].copy().view("<i4")[:, 0]
        if (wrong := widths != self.width).any():
            row = int(wrong.argmax())
            got = f"{widths[row]} in row {begin + row}"
            raise ValueError(f"{self.path}: expected {self.width} columns in every row, got {got}")
        values = table[:, WORD:]
        return values.astype(np.float32) if self.dtype == np.uint8 else values.view(self.dtype)


class _Safetensors(Source):
    def __init__(self, path: Path, key: str | None):
        with self._opened(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            found = {
                name: part.get_shape()
                for name, part in parts.items()
                if part.get_dtype() in TENSORS and len(part.get_shape()) == 2
            }
        if key is None and len(found) == 1:
            (key,) = found
        if key not in found:
            expected = "a tensor [n, D] of floats"
            if found:
                expected = f"one of {', '.join(map(repr, found))}"
            raise ValueError(f"{path}: key: expected {expected}, got {key!r}")
        self.key = key
        super().__init__(path, *found[key])

    def _read(self, begin: int, end: int) -> Any:
        with self._opened(self.path) as file:  # anew, so that pages that were read are let go
            return file.get_slice(self.key)[begin:end]

    @staticmethod
    def _opened(path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: expected a safetensors file, got {error}") from error


def _parquet_source(path: Path, column: str | None, id_column: str | None) -> Source:
    from mrl_fast.search.readers.parquet import ParquetSource

    return ParquetSource(path, column, id_column)


def _file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        got = "a folder" if file.is_dir() else "something else" if file.exists() else "nothing"
        kind = FileNotFoundError if got == "nothing" else ValueError
        raise kind(f"{file}: expected a file, got {got}")
    if not file.stat().st_size:
        raise ValueError(f"{file}: expected a file with something in it, got 0 bytes")
    return file


def _numbers(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """Read, not mapped: memory stays bounded, and a file that is cut meanwhile is an error."""
    numbers = np.fromfile(path, dtype, count, offset=offset)
    if len(numbers) != count:
        expected = f"{count * dtype.itemsize} bytes from {offset} on"
        raise ValueError(f"{path}: expected {expected}, got {numbers.nbytes}")
    return numbers


def _npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype, and where the numbers begin."""
    with open(path, "rb") as file:
        if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
            raise ValueError(f"{path}: expected a .npy file, got one that does not begin as such")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever numpy raises on a damaged file
        raise ValueError(f"{path}: expected an undamaged .npy file, got {error}") from error
    size, expected = path.stat().st_size, array.offset + array.nbytes
    if array.size and size != expected:
        raise ValueError(f"{path}: expected {expected} bytes, got {size}")
    if not array.dtype.isnative:
        raise ValueError(f"{path}: expected this machine's byte order, got {array.dtype.str}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{path}: expected rows in C order, got Fortran order")
    return array.shape, array.dtype, array.offset


def _integers(path: Path) -> np.ndarray:
    """All integers of a ``.npy`` or ``.ivecs`` file, int64."""
    suffix = path.suffix.lower()
    if suffix == ".ivecs":
        source = _Vecs(path, np.int32)
        (values,) = [values for values, _ in source.chunks(source.rows)]
        return values.astype(np.int64)
    if suffix != ".npy":
        raise ValueError(f"{path}: expected ids in .npy, .ivecs, .txt or .parquet, got {suffix!r}")
    shape, dtype, offset = _npy_header(path)
    if dtype.kind not in "iu":
        raise ValueError(f"{path}: expected integers, got {dtype.name}")
    values = _numbers(path, dtype, offset, int(np.prod(shape))).reshape(shape)
    if dtype == np.uint64 and values.size and values.max() >= 1 << 63:
        raise ValueError(f"{path}: expected ids below {1 << 63}, got {values.max()}")
    return values.astype(np.int64, copy=False)


def _text_ids(path: Path) -> np.ndarray:
    ids = []
    with open(path, encoding="ascii", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                ids.append(np.int64(int(line)))
            except (ValueError, OverflowError):
                raise ValueError(
                    f"{path}: expected an int64 in line {number}, got {line.rstrip()[:40]!r}"
                ) from None
    return np.array(ids, np.int64)


PARQUET = (".parquet", ".pq")
READERS: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
    ".npy": (_Npy, ()),
    ".fvecs": (lambda path: _Vecs(path, np.float32), ()),
    ".bvecs": (lambda path: _Vecs(path, np.uint8), ()),
    ".safetensors": (_Safetensors, ("key",)),
    **{suffix: (_parquet_source, ("column", "id_column")) for suffix in PARQUET},
}
