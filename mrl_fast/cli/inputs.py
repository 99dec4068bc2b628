"""Vectors that commands are given: files, the rows of them to read, their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrl_fast.cli.sources import Parts, files_of, sorted_by_a_shell
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.readers import open_vectors, options_of, read_ids
from mrl_fast.search.readers.base import ADVICE
from mrl_fast.shared import memory
from mrl_fast.shared.arrays import as_tensor
from mrl_fast.shared.types import Stage

NAMED = 3  # of files that are passed over
CHUNK_BYTES = 1 << 25  # of vectors as fp32, read and added at a time


class Vectors:
    """Rows [first, last) of files that are read as one, and their ids.

    Attributes:
        name: The files, as they were given.
        where: The same, wherever a command is run.
        ids: ``[rows of the files]`` int64 where they come from a file of their own, else None.
        told: The options by which the files are read, by name.
        notes: What a user may want to know of how they are read, but of ids.
        ids_note: The same of a column of ids that is not used; None where there is none.
        ids_from: The file of ids, or else the files of vectors, as they were given.
    """

    def __init__(
        self,
        *given: Path,
        column: str | None = None,
        key: str | None = None,
        id_column: str | None = None,
        ids: Path | None = None,
        skip: int = 0,
        limit: int | None = None,
        remembered: Mapping[str, str] | None = None,
    ):
        """``remembered`` are options as of ``told`` that hold where none is given."""
        (paths, passed), self.notes, self.ids, self.first = files_of(given), [], None, skip
        if passed:
            self.notes.append(f"passed over, as they hold no vectors: {_named(passed)}")
        self.name, self.where = _range(given), _range([path.absolute() for path in given])
        options = {"column": column, "key": key, "id_column": id_column}
        if ids is not None:
            self.ids, options["id_column"] = read_ids(ids, id_column), None
        known = {
            name: value
            for name, value in (remembered or {}).items()
            if options[name] is None and name in options_of(paths[0])
            if name != "id_column" or ids is None
        }
        options |= known
        self.source = _opened(paths, options, known)
        self.told = {name: value for name, value in options.items() if value is not None}
        self.has_ids = ids is not None or "id_column" in self.told
        self._id_column, self.ids_from = options["id_column"], ids or self.name
        self.ids_note = None if self.has_ids else _note_of_ids(self.source)
        self._note(given, known)
        if self.ids is not None and len(self.ids) != self.source.rows:
            raise ValueError(
                f"{ids}: expected an id for each of the {self.source.rows:,} rows of {self.name}, "
                f"got {len(self.ids):,}"
            )
        if skip >= self.source.rows:
            raise ValueError(f"--skip: expected less than {self.source.rows:,} rows, got {skip:,}")
        rows = self.source.rows - skip
        self.rows = rows if limit is None else min(rows, limit)
        self.width = self.source.width
        self.chunk_rows = max(1, CHUNK_BYTES // (4 * self.width))

    def _note(self, given: tuple[Path, ...], known: dict[str, str]) -> None:
        if swapped := sorted_by_a_shell(given):
            self.notes.append(
                f"{swapped[0].name} is read before {swapped[1].name}, as given; a pattern in "
                "quotes, or a folder, is read in the order of numbers"
            )
        if known:
            self.notes.append(f"{_as_options(known)}, as the index was built")

    def all_ids(self) -> np.ndarray:
        """The ids of all rows, where they have some, without the vectors."""
        if self.ids is None:
            files = (source.path for source in self.source.sources)
            ids = np.concatenate([read_ids(path, self._id_column) for path in files])
        else:
            ids = self.ids
        return ids[self.first : self.first + self.rows]

    def chunks(self, rows: int, start: int = 0) -> Iterator[tuple[Any, np.ndarray | None, int]]:
        """Vectors from row ``first + start`` on, their ids where these are given, and the first
        one's row in all files."""
        begin = self.first + start
        for vectors, ids in self.source.chunks(rows, begin, self.first + self.rows):
            if self.ids is not None:
                ids = self.ids[begin : begin + len(vectors)]
            yield vectors, ids, begin
            begin += len(vectors)

    def matrix(self, rows: int | None = None) -> torch.Tensor:
        """The first rows, or all, ``[rows, width]`` fp32."""
        rows = self.rows if rows is None else min(rows, self.rows)
        matrix, done = memory.empty(rows, self.width), 0
        for vectors, _, _ in self.chunks(min(rows, self.chunk_rows)):
            part = as_tensor(vectors, "vectors")[: rows - done]
            matrix[done : done + len(part)] = part
            done += len(part)
            if done == rows:
                break
        return matrix


def _range(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"


def _named(paths: Sequence[Path]) -> str:
    """The first few."""
    more = f" and {len(paths) - NAMED:,} more" if len(paths) > NAMED else ""
    return ", ".join(map(str, paths[:NAMED])) + more


def _note_of_ids(source: Parts) -> str | None:
    name = next((name for name in source.id_columns if name.lower() == "id"), None)
    if name is None:
        return None
    if source.id_columns[name]:
        kind, advice = "integers", f"; --id-column {name} takes ids from it"
    else:
        kind, advice = "strings", ADVICE
    return f"{source.path} has a column of {kind} {name!r}, which is not used{advice}"


def _opened(paths: list[Path], options: dict[str, Any], known: dict[str, str]) -> Parts:
    try:
        return Parts([open_vectors(path, **options) for path in paths])
    except ValueError as error:
        if known:
            raise ValueError(f"{error} ({_as_options(known)} as the index was built)") from None
        raise


def _as_options(known: Mapping[str, str]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in known.items())


@contextmanager
def naming_ids(vectors: Vectors, folder: Path | None = None) -> Iterator[None]:
    """Errors about ids that come twice, or are in use in the index of ``folder``, name the file
    that they come from, and count them."""
    try:
        yield
    except ValueError as error:
        wanted = "expected none twice", "expected ids that are not in use"
        if not vectors.has_ids or not str(error).startswith(tuple(f"ids: {w}" for w in wanted)):
            raise
        ids = vectors.all_ids()
        values, counts = np.unique(ids, return_counts=True)
        wrong, more = values[counts > 1], "again"
        if not len(wrong) and folder is not None:
            wrong, more = ids[MatryoshkaIndex.load(folder).contains(ids)], "that are"
            wanted = wanted[1:]
        if not len(wrong):
            raise
        also = f" and {len(wrong) - 1:,} more {more}" if len(wrong) > 1 else ""
        got = f"{wrong[0]} again" if more == "again" and not also else f"{wrong[0]}{also}"
        raise ValueError(f"{vectors.ids_from}: {wanted[0]}, got {got}") from None


def check_width(vectors: Vectors, index: MatryoshkaIndex) -> None:
    if vectors.width != index.width:
        raise ValueError(
            f"{vectors.name}: expected vectors of the index's width {index.width}, "
            f"got {vectors.width}"
        )


@contextmanager
def naming_rows(vectors: Vectors, part: Any, row: int, dtype: str = "float32") -> Iterator[None]:
    """Errors about vectors name their file, those about a NaN its row there too; ``row`` is that of
    the first vector of ``part``."""
    try:
        yield
    except ValueError as error:
        path, _ = vectors.source.place(row)
        dtype = "float32" if dtype == "int8" else dtype  # what is rounded to codes
        finite = torch.isfinite(as_tensor(part, "vectors").to(getattr(torch, dtype))).all(dim=1)
        if not bool(finite.all()):
            path, row = vectors.source.place(row + int((~finite).nonzero()[0]))
            raise ValueError(
                f"{path}: expected finite values as {dtype}, got NaN or infinity in row {row:,}"
            ) from None
        argument, _, rest = str(error).partition(": ")
        if argument in ("queries", "vectors", "samples"):
            raise ValueError(f"{path}: {rest}") from None
        raise


def numbers_of(text: str, option: str) -> list[int]:
    """``64,256,768``."""
    return [pair[0] for pair in _split(text, option, "numbers such as 64,256,768", 1)]


def stages_of(text: str) -> list[Stage]:
    """``64:200,768:10``, or ``64:1:500,768:8:20,768:10`` by one bit of 64 columns first, then by
    eight of all; or ``graph:64:20,768:10``."""
    expected = "dim:keep such as 64:200,768:10, or dim:bits:keep, or graph:beam:keep first"
    first, _, rest = text.replace(",", " ").strip().partition(" ")
    if not first.startswith("graph:"):
        return [tuple(stage) for stage in _split(text, "--stages", expected, 2, 3)]
    walk = _split(first.removeprefix("graph:"), "--stages", expected, 2)
    if not rest:
        raise ValueError(f"--stages: expected {expected}, got {text!r}")
    listed = _split(rest, "--stages", expected, 2, 3)
    return [("graph", *walk[0]), *(tuple(stage) for stage in listed)]


def _split(text: str, option: str, expected: str, *sizes: int) -> list[list[int]]:
    try:
        parts = [[int(n) for n in part.split(":")] for part in text.replace(",", " ").split()]
    except ValueError:
        parts = []
    if not parts or any(len(part) not in sizes for part in parts):
        raise ValueError(f"{option}: expected {expected}, got {text!r}")
    return parts
