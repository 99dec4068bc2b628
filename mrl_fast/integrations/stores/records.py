"""Values by name, each with a vector in an index: what the stores of other libraries keep."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from mrl_fast.integrations.stores.journal import Journal, line_of
from mrl_fast.search.disk import filesystem
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.index.validate import default_dims
from mrl_fast.shared.locks import Lock

INDEX, JOURNAL = "index", "records.jsonl"
SLACK = 1000  # removed rows or lines that are not worth moving the others for

R = TypeVar("R")
T = TypeVar("T")


class Codec(NamedTuple):
    """How values of a kind become what JSON can hold, and back; functions that can be pickled."""

    kind: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


class Records(Generic[T]):
    """Values by name, each with a vector, that others may search while one thread changes them.

    Every value that is put gets a row of the index whose number was never used before, drawn at
    random: so the records of two states can lie in one file, and the index tells which of them
    hold. Copies, deep copies and pickles are of one moment, and independent.

    Args:
        codec: For what is saved.
        dims: The index's. None: of the first vectors' width.
        options: The index's others, as MatryoshkaIndex takes them.

    Attributes:
        index: None as long as there are neither dims nor vectors.
    """

    def __init__(self, codec: Codec, dims: Sequence[int] | None, options: dict[str, Any]):
        MatryoshkaIndex((1,) if dims is None else dims, **options)  # raises where one is wrong
        self.index = None if dims is None else MatryoshkaIndex(dims, **options)
        self._codec, self._options = codec, options
        self._entries: dict[int, tuple[str, T]] = {}  # by row
        self._rows: dict[str, int] = {}
        self._changing = Lock()
        self._changes = 0  # odd while one is under way
        self._journal: Journal | None = None
        self._unsaved: set[int] = set()  # rows that are not in the journal

    def __getstate__(self) -> dict[str, Any]:
        with self._changing:
            state = {
                **vars(self),
                "index": copy(self.index),
                "_entries": dict(self._entries),
                "_rows": dict(self._rows),
                "_journal": copy(self._journal),
                "_unsaved": set(self._unsaved),
            }
        del state["_changing"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _changing=Lock())

    @property
    def metric(self) -> str:
        return self._options["metric"] if self.index is None else self.index.metric

    def put(self, names: Sequence[str], vectors: Any, values: Sequence[T]) -> None:
        """Adds values, replacing those of the same names; the last of a name given twice counts.

        Args:
            vectors: ``[n, D]``, or a list of lists.
        """
        last = {name: i for i, name in enumerate(names)}
        if not last:
            return
        x = _matrix(vectors, "embeddings")
        if len(x) != len(names):
            raise ValueError(f"embeddings: expected {len(names)} rows, got {len(x)}")
        x = x[list(last.values())]
        with self._change():
            index = self.index
            if index is None:
                index = MatryoshkaIndex(default_dims(x.shape[1]), **self._options)
            rows = _new_rows(index, len(last))
            self._entries.update(
                (row, (name, values[i])) for row, (name, i) in zip(rows, last.items(), strict=True)
            )
            try:
                index.add(x, np.array(rows, np.int64))
            except BaseException:
                for row in rows:
                    del self._entries[row]
                raise
            self.index = index
            self._unsaved.update(rows)
            replaced = [self._rows[name] for name in last if name in self._rows]
            self._rows.update(zip(last, rows, strict=True))
            self._drop(replaced)

    def remove(self, names: Iterable[str]) -> None:
        """Removes the values of these names, where there are any."""
        with self._change():
            gone = (self._rows.pop(name, None) for name in list(names))
            self._drop([row for row in gone if row is not None])

    def clear(self) -> None:
        with self._change():
            self._drop(list(self._rows.values()))
            self._rows.clear()
            if self.index is not None:
                self.index.compact()

    def get(self, name: str) -> T | None:
        entry = self._settled(lambda: self._entries.get(self._rows.get(name, -1)))
        return None if entry is None else entry[1]

    def values(self) -> list[T]:
        """In the order they were put."""
        return [value for _, value in list(self._entries.values())]

    def search(
        self,
        vector: Any,
        k: int,
        keep: Callable[[T], bool] | None = None,
        least: float | None = None,
        **options: Any,
    ) -> list[tuple[T, float]]:
        """The k best values, with scores; equal scores are in the order the values were put.

        Args:
            vector: ``[D]``, or a list.
            keep: Which values to search.
            least: Of scores: values with a lower one are left out.
            options: More of ``MatryoshkaIndex.search``'s.
        """
        index, q = self.index, _matrix([vector], "query")
        if index is None:
            return []
        found = self._settled(lambda: self._search(index, q, k, keep, options))
        return [(value, score) for _, value, score in _from(least, found)]

    def diverse(
        self,
        vector: Any,
        k: int,
        fetch: int,
        weight: float,
        keep: Callable[[T], bool] | None = None,
        least: float | None = None,
        **options: Any,
    ) -> list[tuple[T, float]]:
        """Of the ``fetch`` best, k that are relevant and unlike one another, in the order chosen:
        maximal marginal relevance.

        Args:
            weight: Of relevance; the rest is of the likeness to what was chosen before. Both are
                full-width cosines.
        """
        index, q = self.index, _matrix([vector], "query")
        if index is None:
            return []

        def look() -> tuple[list[tuple[int, T, float]], Any]:
            found = _from(least, self._search(index, q, max(k, fetch), keep, options))
            return found, index.reconstruct(np.array([row for row, _, _ in found], np.int64))

        found, x = self._settled(look)
        return [found[i][1:] for i in _marginal(q[0], x, k, weight)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the folder does not have yet; until then the folder holds what it held.

        Args:
            path: A folder: new, empty, or with such records, which are replaced.

        Raises:
            ValueError: Nothing was ever put and there are no dims; a value that JSON cannot hold; a
                folder with other files, or one that another has saved to since.
        """
        folder = Path(path).absolute()
        with self._changing:
            if self.index is None:
                raise ValueError("dims: expected dims, or a vector, before a save, got neither")
            filesystem.make_folder(folder)
            with filesystem.locked(folder):
                self._save(folder, self.index)

    def load(self, path: str | os.PathLike[str], *, verify: bool) -> None:
        """Takes over what a folder holds.

        Raises:
            FileNotFoundError: There is nothing.
            ValueError: Another version or kind, or damage: names the file.
        """
        folder = Path(path).absolute()
        if not folder.is_dir():
            raise FileNotFoundError(f"path: expected a folder that was saved to, got {folder}")
        journal = Journal(folder / JOURNAL, self._codec.kind)

        def read(_: Any) -> tuple[MatryoshkaIndex, list[int], dict[int, Any]]:
            index = MatryoshkaIndex.load(folder / INDEX, verify=verify)
            rows = index.ids.tolist()
            return index, rows, journal.read(set(rows))

        # Once more if records are gone because another process has saved meanwhile.
        index, rows, records = manifests.settled(folder / INDEX, read, manifests.read)
        for row in rows:
            try:
                name, value = records[row]
                value = self._codec.decode(value)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{journal.file}: row {row}: {error}") from error
            self._entries[row], self._rows[name] = (name, value), row
        if len(self._rows) < len(rows):
            raise ValueError(f"{journal.file}: expected no name twice")
        self.index, self._journal = index, journal

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._changing:
            self._changes += 1
            try:
                yield
            finally:
                self._changes += 1

    def _settled(self, read: Callable[[], R]) -> R:
        """The result of ``read`` without a change meanwhile: after one it reads again, with changes
        held off."""
        before = self._changes
        if before % 2 == 0:
            try:
                result = read()
            except ValueError:
                if self._changes == before:
                    raise
            else:
                if self._changes == before:
                    return result
        with self._changing:
            return read()

    def _search(
        self,
        index: MatryoshkaIndex,
        q: np.ndarray,
        k: int,
        keep: Callable[[T], bool] | None,
        options: dict[str, Any],
    ) -> list[tuple[int, T, float]]:
        """Rows, their values, and scores."""
        allowed = None
        if keep is not None:
            entries = list(self._entries.items())
            allowed = np.array([row for row, (_, value) in entries if keep(value)], np.int64)
            if options.get("stages") is None:  # tuned ones hold for all rows only
                options = {"exact": True, **options}
        scores, rows = index.search(q, k, allowed=allowed, **options)
        return [
            (row, entry[1], score)
            for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
            if (entry := self._entries.get(row))
        ]

    def _drop(self, rows: list[int]) -> None:
        if not rows or self.index is None:
            return
        self.index.remove(np.array(rows, np.int64))
        for row in rows:
            del self._entries[row]
        self._unsaved.difference_update(rows)
        if self.index.removed > len(self.index) + SLACK:
            self.index.compact()

    def _save(self, folder: Path, index: MatryoshkaIndex) -> None:
        file = folder / JOURNAL
        for name in filesystem.files_that_matter(folder):
            if name not in (INDEX, JOURNAL, JOURNAL + ".new"):
                raise ValueError(
                    f"path: expected a store or an empty folder, got {folder / name} in it"
                )
        journal = self._journal
        known = journal is not None and journal.file == file and journal.unchanged
        if journal is None or not known:
            journal = Journal(file, self._codec.kind)
        mixed = not known and file.exists()  # with others' lines
        # All lines are made before the first is written: one of them may raise.
        journal.append(list(self._lines(self._unsaved if known else self._entries)))
        if known:
            self._unsaved = set()
        index.save(folder / INDEX)
        self._journal, self._unsaved = journal, set()
        if mixed or journal.lines > 2 * len(self._entries) + SLACK:
            journal.rewrite(self._lines(self._entries))

    def _lines(self, rows: Iterable[int]) -> Iterator[bytes]:
        for row in rows:
            name, value = self._entries[row]
            try:
                line = line_of([row, [name, self._codec.encode(value)]])
                same = self._codec.decode(json.loads(line)[1][1]) == value
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{name!r}: expected what JSON can hold, got {error}") from error
            if not same:
                raise ValueError(f"{name!r}: expected what JSON gives back as it was, got {value}")
            yield line


def _new_rows(index: MatryoshkaIndex, count: int) -> list[int]:
    while True:
        first = secrets.randbits(62)
        rows = np.arange(first, first + count, dtype=np.int64)
        if not index.contains(rows).any():
            return rows.tolist()


def _from(least: float | None, found: list[tuple[int, T, float]]) -> list[tuple[int, T, float]]:
    return [one for one in found if least is None or one[2] >= least]


def _matrix(x: Any, name: str) -> np.ndarray:
    """``[n, D]`` fp32."""
    try:
        array = np.asarray(x, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected rows of numbers, all of one width: {error}") from None
    if array.ndim != 2:
        raise ValueError(f"{name}: expected shape [n, D], got {list(array.shape)}")
    return array


def _marginal(query: np.ndarray, x: np.ndarray, k: int, weight: float) -> list[int]:
    """Which rows of x, ``[n, D]``, to choose, the most relevant first; of equal ones the first.

    Sums along rows, not matrix products, whose rounding depends on where a row lies.
    """
    x = _unit(x.astype(np.float64))
    relevance = (x * _unit(query.astype(np.float64))).sum(axis=1)
    gain, likeness, chosen = relevance.copy(), np.full_like(relevance, -1.0), []
    while len(chosen) < min(k, len(x)):
        best = int(gain.argmax())
        chosen.append(best)
        likeness = np.maximum(likeness, (x * x[best]).sum(axis=1))
        gain = weight * relevance - (1 - weight) * likeness
        gain[chosen] = -np.inf
    return chosen


def _unit(x: np.ndarray) -> np.ndarray:
    """Along the last axis; zeros stay zeros."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
