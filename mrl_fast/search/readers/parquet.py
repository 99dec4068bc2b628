"""Vectors and ids in Parquet files, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mrl_fast.search.readers import Chunk, Source

BUFFER_BYTES = 1 << 20  # of a column's pages; by default a row group's, or a file's, are held
SKIPPED = 1 << 12  # rows at a time, at least
IDS = 1 << 16  # read at a time


class ParquetSource(Source):
    """A column of lists of equal length."""

    def __init__(self, path: Path, column: str | None, id_column: str | None):
        with _reading(path), _opened(path) as file:
            schema, groups = file.schema_arrow, _group_rows(file)
        found = [field.name for field in schema if _holds_vectors(field.type)]
        if column is None and len(found) == 1:
            (column,) = found
        _check_column(path, "column", "lists of floats", column, found)
        whole = [field.name for field in schema if pa.types.is_integer(field.type)]
        if id_column is not None:
            _check_column(path, "id_column", "integers", id_column, whole)
        self.columns = [str(column)] + ([] if id_column is None else [id_column])
        self.ends = np.cumsum(groups)  # of the row groups
        kind: Any = schema.field(str(column)).type
        self.fixed = pa.types.is_fixed_size_list(kind)
        super().__init__(path, sum(groups), kind.list_size if self.fixed else 0)
        if not self.fixed and self.rows:
            first = next(self._batches(1, 0)).column(0)
            _check_no_nulls(path, self.columns[0], first, 0)
            self.width = len(first[0])

    def chunks(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        stop = self.rows if stop is None else min(stop, self.rows)
        begin = start
        for batch in self._batches(rows, start):
            batch = batch.slice(0, stop - begin)
            if not len(batch):
                return
            ids = _integers(self.path, batch.column(1), begin) if len(self.columns) > 1 else None
            yield self._vectors(batch.column(0), begin), ids
            begin += len(batch)
        if begin < stop:
            raise ValueError(f"{self.path}: expected {self.rows} rows, got {begin}")

    def _read(self, begin: int, end: int) -> Any:
        raise NotImplementedError("chunks does it")

    def _batches(self, rows: int, start: int) -> Iterator[Any]:
        """Batches from row ``start`` on."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        skip = start - (int(self.ends[first - 1]) if first else 0)
        groups = range(first, len(self.ends))
        for batch in _batches(self.path, self.columns, max(rows, SKIPPED), groups):
            skipped = min(skip, len(batch))
            skip -= skipped
            for begin in range(skipped, len(batch), rows):
                yield batch.slice(begin, rows)

    def _vectors(self, lists: Any, begin: int) -> np.ndarray:
        _check_no_nulls(self.path, self.columns[0], lists, begin)
        if not self.fixed:
            lengths = np.diff(lists.offsets.to_numpy())
            if (wrong := lengths != self.width).any():
                row = int(wrong.argmax())
                got = f"{lengths[row]} in row {begin + row}"
                raise ValueError(
                    f"{self.path}: {self.columns[0]}: expected lists of {self.width}, got {got}"
                )
        values = lists.flatten()
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            got = f"a null in row {begin + row // self.width}"
            raise ValueError(f"{self.path}: {self.columns[0]}: expected floats, got {got}")
        return values.to_numpy().reshape(-1, self.width)


def read_ids(path: Path, column: str) -> np.ndarray:
    """A column of integers, ``[n]`` int64."""
    with _reading(path), _opened(path) as file:
        schema, groups = file.schema_arrow, len(_group_rows(file))
    whole = [field.name for field in schema if pa.types.is_integer(field.type)]
    _check_column(path, "id_column", "integers", column, whole)
    parts, begin = [np.empty(0, np.int64)], 0
    for batch in _batches(path, [column], IDS, range(groups)):
        parts.append(_integers(path, batch.column(0), begin))
        begin += len(batch)
    return np.concatenate(parts)


def _integers(path: Path, array: Any, begin: int) -> np.ndarray:
    _check_no_nulls(path, "id_column", array, begin)
    with _reading(path):
        return array.cast(pa.int64()).to_numpy()


def _batches(path: Path, columns: list[str], rows: int, groups: range) -> Iterator[Any]:
    """Record batches of at most so many rows, with these columns in this order."""
    with _reading(path), _opened(path) as file:
        for batch in file.iter_batches(rows, row_groups=list(groups), columns=columns):
            yield batch.select(columns)


def _opened(path: Path) -> Any:
    return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)


def _group_rows(file: Any) -> list[int]:
    metadata = file.metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise pa.ArrowInvalid(f"{metadata.num_rows} rows, and row groups of {sum(groups)}")
    return groups


def _holds_vectors(kind: Any) -> bool:
    types = pa.types
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return lists and types.is_floating(kind.value_type)


def _check_column(path: Path, name: str, kind: str, column: Any, found: list[str]) -> None:
    if column not in found or found.count(column) > 1:
        expected = f"one of {', '.join(map(repr, found))}" if found else f"a column of {kind}"
        raise ValueError(f"{path}: {name}: expected {expected}, got {column!r}")


def _check_no_nulls(path: Path, name: str, array: Any, begin: int) -> None:
    if array.null_count:
        row = begin + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{path}: {name}: expected no nulls, got one in row {row}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What pyarrow raises, with the file's name."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected an undamaged Parquet file, got {error}") from error
