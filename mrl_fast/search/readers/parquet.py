"""Vectors and ids in Parquet files, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mrl_fast.search.readers.base import ADVICE, Chunk, Source, as_int64

BUFFER_BYTES = 1 << 20  # of a column's pages; by default all of a row group or file are kept
SKIPPED = 1 << 12  # the fewest rows of a batch: those before the first wanted one are skipped
IDS = 1 << 16  # rows of ids that are read at a time


class _Column(NamedTuple):
    """A column, or a field of the structs in one: ``meta.emb`` is ("meta", "emb")."""

    path: tuple[str, ...]
    type: Any

    @property
    def name(self) -> str:
        return ".".join(self.path)

    def of(self, batch: Any) -> Any:
        array = batch.column(self.path[0])
        if len(self.path) > 1:
            # A field is null where its struct is null.
            array = pc.call_function(
                "struct_field", [array], pc.StructFieldOptions(list(self.path[1:]))
            )
        return array.storage if isinstance(array, pa.ExtensionArray) else array


class _Parquet(Source):
    """A column of lists of equal length."""

    def __init__(self, path: Path, column: str | None, id_column: str | None):
        with _reading(path), _opened(path) as file:
            columns, groups = list(_columns(file.schema_arrow)), _group_rows(file)
        if column is None:
            found = [known for known in columns if _holds_vectors(known.type)]
            found = [known for known in found if len(known.path) == 1] or found
            column = found[0].name if len(found) == 1 else None
        vectors = _find(path, "column", column, columns, _holds_vectors, "lists of floats")
        self.columns = [vectors]
        if id_column is not None:
            self.columns.append(_find_ids(path, id_column, columns))
        self.id_columns = {
            known.name: pa.types.is_integer(known.type)
            for known in columns
            if pa.types.is_integer(known.type) or _holds_strings(known.type)
        }
        self.ends = np.cumsum(groups)  # of the row groups
        super().__init__(path, sum(groups), 0)
        if self.rows:
            first = next(self._batches(1, 0))[0]
            _check_no_nulls(path, vectors.name, first, 0)
            self.width = len(first[0])
            if not self.width:
                raise ValueError(
                    f"{path}: {vectors.name}: expected lists of at least one float, got an empty "
                    "one in row 0"
                )

    def chunks(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        stop = self.rows if stop is None else min(stop, self.rows)
        begin = start
        for lists, *ids in self._batches(rows, start):
            count = min(len(lists), stop - begin)
            if not count:
                return
            vectors = self._vectors(lists[:count], begin)
            yield vectors, _integers(self.path, ids[0][:count], begin) if ids else None
            begin += count
        if begin < stop:
            raise ValueError(f"{self.path}: expected {self.rows} rows, got {begin}")

    def _batches(self, rows: int, start: int) -> Iterator[list[Any]]:
        """The columns' arrays from row ``start`` on, at most ``rows`` rows at a time."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        skip = start - (int(self.ends[first - 1]) if first else 0)
        groups = range(first, len(self.ends))
        for arrays in _batches(self.path, self.columns, max(rows, SKIPPED), groups):
            skipped = min(skip, len(arrays[0]))
            skip -= skipped
            for begin in range(skipped, len(arrays[0]), rows):
                yield [array[begin : begin + rows] for array in arrays]

    def _vectors(self, lists: Any, begin: int) -> np.ndarray:
        name = self.columns[0].name
        _check_no_nulls(self.path, name, lists, begin)
        lengths = pc.call_function("list_value_length", [lists]).to_numpy()
        if (wrong := lengths != self.width).any():
            row = int(wrong.argmax())
            got = f"{lengths[row]} in row {begin + row}"
            raise ValueError(f"{self.path}: {name}: expected lists of {self.width}, got {got}")
        values = lists.flatten()
        if values.null_count:
            row = begin + _first_null(values) // self.width
            raise ValueError(f"{self.path}: {name}: expected floats, got a null in row {row}")
        return values.to_numpy().reshape(-1, self.width)


def open_vectors(path: Path, column: str | None, id_column: str | None) -> Source:
    """A column of lists of D floats; without a name, the only one."""
    return _Parquet(path, column, id_column)


def read_integers(path: Path, id_column: str | None) -> np.ndarray:
    """A column of integers, ``[n]`` int64."""
    with _reading(path), _opened(path) as file:
        columns, groups = list(_columns(file.schema_arrow)), len(_group_rows(file))
    column = _find_ids(path, id_column, columns)
    parts, begin = [np.empty(0, np.int64)], 0
    for (array,) in _batches(path, [column], IDS, range(groups)):
        parts.append(_integers(path, array, begin))
        begin += len(array)
    return np.concatenate(parts)


def _integers(path: Path, array: Any, begin: int) -> np.ndarray:
    _check_no_nulls(path, "id_column", array, begin)
    return as_int64(path, array.to_numpy())


def _batches(path: Path, columns: list[_Column], rows: int, groups: range) -> Iterator[list[Any]]:
    """The columns' arrays, at most so many rows at a time."""
    names = [column.name for column in columns]
    with _reading(path), _opened(path) as file:
        for batch in file.iter_batches(rows, row_groups=list(groups), columns=names):
            yield [column.of(batch) for column in columns]


def _opened(path: Path) -> Any:
    return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)


def _group_rows(file: Any) -> list[int]:
    metadata = file.metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise pa.ArrowInvalid(f"{metadata.num_rows} rows, and row groups of {sum(groups)}")
    return groups


def _columns(fields: Iterable[Any], path: tuple[str, ...] = ()) -> Iterator[_Column]:
    """All columns, and all fields of structs."""
    for field in fields:
        kind, here = field.type, (*path, field.name)
        yield _Column(here, getattr(kind, "storage_type", kind))
        if pa.types.is_struct(kind):
            yield from _columns((kind.field(i) for i in range(kind.num_fields)), here)


def _holds_vectors(kind: Any) -> bool:
    types = pa.types
    tests = (
        types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view,
        types.is_large_list_view,
    )  # fmt: skip
    return any(test(kind) for test in tests) and types.is_floating(kind.value_type)


def _holds_strings(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _find(
    path: Path,
    option: str,
    name: str | None,
    columns: list[_Column],
    fits: Callable[[Any], bool],
    kind: str,
    advice: str = "",
) -> _Column:
    """The only column of this name, which must be of this kind."""
    named = [column for column in columns if column.name == name]
    if len(named) == 1 and fits(named[0].type):
        return named[0]
    found = [repr(column.name) for column in columns if fits(column.type)]
    expected = f"one of {', '.join(found)}" if found else f"a column of {kind}"
    got = repr(name)
    if len(named) > 1:
        got = f"{got}, which {len(named)} columns are called"
    elif named:
        got = f"{got} of {named[0].type}{advice}"
    raise ValueError(f"{path}: {option}: expected {expected}, got {got}")


def _find_ids(path: Path, name: str | None, columns: list[_Column]) -> _Column:
    return _find(path, "id_column", name, columns, pa.types.is_integer, "integers", ADVICE)


def _check_no_nulls(path: Path, name: str, array: Any, begin: int) -> None:
    if array.null_count:
        row = begin + _first_null(array)
        raise ValueError(f"{path}: {name}: expected no nulls, got one in row {row}")


def _first_null(array: Any) -> int:
    return int(array.is_null().to_numpy(zero_copy_only=False).argmax())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises pyarrow's errors again with the file's name."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{path}: expected an undamaged Parquet file, got {error}") from error
