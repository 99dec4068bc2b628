"""Vectors that commands are given: a file, the rows of it to read, their ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.readers import open_vectors, read_ids
from mrl_fast.shared import memory
from mrl_fast.shared.arrays import as_tensor
from mrl_fast.shared.types import Stage

CHUNK_BYTES = 1 << 25  # of vectors as fp32, read and added at a time


class Vectors:
    """Rows [first, last) of a file and their ids.

    Attributes:
        ids: ``[rows of the file]`` int64 where they come from a file of their own, else None.
    """

    def __init__(
        self,
        path: Path,
        *,
        column: str | None = None,
        key: str | None = None,
        id_column: str | None = None,
        ids: Path | None = None,
        skip: int = 0,
        limit: int | None = None,
    ):
        self.path, self.ids, self.first = path, None, skip
        if ids is not None:
            self.ids, id_column = read_ids(ids, id_column), None
        self.source = open_vectors(path, column, key, id_column)
        if self.ids is not None and len(self.ids) != self.source.rows:
            raise ValueError(
                f"{ids}: expected an id for each of the {self.source.rows:,} rows of {path}, "
                f"got {len(self.ids):,}"
            )
        if skip >= self.source.rows:
            raise ValueError(f"--skip: expected less than {self.source.rows:,} rows, got {skip:,}")
        rows = self.source.rows - skip
        self.rows = rows if limit is None else min(rows, limit)
        self.width = self.source.width
        self.chunk_rows = max(1, CHUNK_BYTES // (4 * self.width))

    def chunks(self, rows: int, start: int = 0) -> Iterator[tuple[Any, np.ndarray | None, int]]:
        """Vectors from row ``first + start`` on, their ids where these are given, and the first
        one's row in the file."""
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


def check_width(vectors: Vectors, index: MatryoshkaIndex) -> None:
    if vectors.width != index.width:
        raise ValueError(
            f"{vectors.path}: expected vectors of the index's width {index.width}, "
            f"got {vectors.width}"
        )


@contextmanager
def naming_rows(path: Path, vectors: Any, row: int, dtype: str = "float32") -> Iterator[None]:
    """Errors about a NaN name its row in the file; ``row`` is that of the first vector."""
    try:
        yield
    except ValueError:
        finite = torch.isfinite(as_tensor(vectors, "vectors").to(getattr(torch, dtype))).all(dim=1)
        if not bool(finite.all()):
            row += int((~finite).nonzero()[0])
            raise ValueError(
                f"{path}: expected finite values as {dtype}, got NaN or infinity in row {row:,}"
            ) from None
        raise


def numbers_of(text: str, option: str) -> list[int]:
    """``64,256,768``."""
    return [pair[0] for pair in _split(text, option, "numbers such as 64,256,768", 1)]


def stages_of(text: str) -> list[Stage]:
    """``64:200,768:10``, or ``64:1:200,768:10`` by one bit of 64 columns first."""
    expected = "dim:keep such as 64:200,768:10, or dim:bits:keep"
    return [tuple(stage) for stage in _split(text, "--stages", expected, 2, 3)]


def _split(text: str, option: str, expected: str, *sizes: int) -> list[list[int]]:
    try:
        parts = [[int(n) for n in part.split(":")] for part in text.replace(",", " ").split()]
    except ValueError:
        parts = []
    if not parts or any(len(part) not in sizes for part in parts):
        raise ValueError(f"{option}: expected {expected}, got {text!r}")
    return parts
