"""Nested vectors by id, as an index holds them: added, replaced, removed, while others read.

The first prefix lies in tiles for scanning, as it is or as int8, and the other columns row-major
for reranking: no fp32 column is stored twice.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.search.index import host_search
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.blocks import Layout
from mrl_fast.search.index.rotation import Rotation
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.search.index.store import Store
from mrl_fast.shared.arrays import like
from mrl_fast.shared.checks import METRICS, check_choice, check_dims, check_finite
from mrl_fast.shared.dispatch import triton_is_interpreted

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PREFIX_DTYPES = ("float32", "int8")
WIDTH = 1 << 24  # at most


class Collection:
    """Vectors by id in the order they were added; what MatryoshkaIndex searches."""

    def __init__(
        self,
        dims: Sequence[int],
        *,
        metric: str = "cosine",
        dtype: str = "float32",
        prefix_dtype: str = "float32",
        rotation: str | None = None,
        device: str = "cpu",
    ):
        self.dims = check_dims(dims)
        if self.width > WIDTH:
            raise ValueError(f"dims: expected widths of at most {WIDTH}, got {self.width}")
        self.metric = check_choice(metric, "metric", METRICS)
        self.dtype = check_choice(dtype, "dtype", tuple(DTYPES))
        self.prefix_dtype = check_choice(prefix_dtype, "prefix_dtype", PREFIX_DTYPES)
        if prefix_dtype == "int8" and self.dims[0] > 1 << 15:  # sums of codes are int32
            raise ValueError(
                f"dims[0]: expected at most {1 << 15} with prefix_dtype='int8', got {self.dims[0]}"
            )
        if rotation is not None:
            check_choice(rotation, "rotation", ("pca",))
        self._rotation = None if rotation is None else Rotation(self.width)
        layout = Layout(self.dims[0], self.width, DTYPES[dtype], coded=prefix_dtype == "int8")
        self._layout = layout
        self.device = inputs.device(device)
        # Where kernels run: in the interpreter, on the CPU.
        interpreted = self.device != "cpu" and triton_is_interpreted()
        self.place = torch.device("cpu" if interpreted else self.device)
        self._engine, self._store = engine(layout, self.dims, metric, self.device, self.place)
        self._next_id = 0  # one more than the largest id so far
        # Of a chunk that is converted: a new one each time would leave holes among the blocks.
        self._room = torch.empty(0, self.width, dtype=layout.dtype)
        self._writing = threading.RLock()  # held by who changes the index or saves it

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return self.dims[-1]

    @property
    def ids(self) -> Tensor:
        """The vectors' ids in the order they were added, ``[N]`` int64."""
        return self._store.snapshot.ids

    @property
    def rotation(self) -> Tensor | None:
        """The rotation, ``[D, D]`` fp32, its rows the new axes; None where there is none yet."""
        return None if self._rotation is None else self._rotation.axes

    @property
    def removed(self) -> int:
        """Vectors that were removed or replaced and take room until ``compact``."""
        now = self._store.snapshot
        return now.count - now.size

    @property
    def nbytes(self) -> int:
        """Bytes of vectors, codes, norms and ids, in memory or mapped from files."""
        return self._store.snapshot.nbytes

    def __len__(self) -> int:
        return self._store.snapshot.size

    def fit(self, samples: Any) -> None:
        """Fits the rotation to samples, instead of to the first vectors that are added.

        Args:
            samples: ``[n, D]`` floating point; a few times D of them are enough.

        Raises:
            ValueError, TypeError: An index without rotation, or one that held vectors already;
                samples of a wrong shape or dtype, NaN or infinite values, or none.
        """
        if self._rotation is None:
            raise ValueError("rotation: expected 'pca' where samples are given, got None")
        x = inputs.vectors(samples, "samples", self.width)
        if not len(x):
            raise ValueError("samples: expected at least one vector, got none")
        with self._writing:
            if count := self._store.snapshot.count:
                raise ValueError(f"samples: expected an empty index, got {count} vectors in it")
            self._rotation = Rotation(self.width).fit(x)

    def add(self, vectors: Any, ids: Any = None) -> None:
        """Appends vectors; all of them or, where anything is wrong, none.

        Vectors that are stored never move: adding costs what the new vectors cost.

        Args:
            vectors: ``[n, D]`` floating point, any row stride: tensor, numpy array or DLPack
                object.
            ids: ``[n]`` int64, at least 0, none of them in use; default: consecutive after the
                largest so far.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values, an id that is
                taken.
        """
        x = inputs.vectors(vectors, "vectors", self.width)
        with self._writing:
            if ids is None:
                _check_last(self._next_id + len(x) - 1)
                new = torch.arange(self._next_id, self._next_id + len(x))
            else:
                new = inputs.new_ids(ids, len(x))
                # Above the largest none can be taken.
                if len(new) and int(new.min()) < self._next_id:
                    taken = new[self._store.snapshot.find(new) >= 0]
                    if len(taken):
                        raise ValueError(
                            f"ids: expected ids that are not in use, got {int(taken[0])}"
                        )
            self._append(x, new)

    def update(self, ids: Any, vectors: Any) -> None:
        """Replaces the vectors of these ids; a search finds all the old ones or all the new.

        They come last in the order of rows. What is replaced takes room until ``compact``.

        Args:
            ids: ``[n]`` int64, each in use, none twice.
            vectors: ``[n, D]``, as in ``add``.

        Raises:
            ValueError, TypeError: As in ``add``; an unknown id.
        """
        x = inputs.vectors(vectors, "vectors", self.width)
        with self._writing:
            new = inputs.new_ids(ids, len(x))
            self._append(x, new, self._rows_of(new, self._store.snapshot))

    def remove(self, ids: Any) -> None:
        """Removes the vectors of these ids; all of them or, where one is unknown, none.

        They take room until ``compact``, and a little of each search's time.

        Args:
            ids: ``[n]`` int64.

        Raises:
            ValueError, TypeError: An unknown id; a wrong shape or dtype.
        """
        gone = inputs.ids(ids)
        with self._writing:
            rows = self._rows_of(gone, self._store.snapshot)
            if len(rows):
                self._store.remove(rows)

    def compact(self) -> None:
        """Frees the room of vectors that were removed or replaced, by moving those after the
        first of them; while it runs the index may need twice its memory."""
        with self._writing:
            self._store.compact()

    def contains(self, ids: Any) -> Any:
        """Whether there is a vector of each id, ``[n]`` bool, of the kind of the ids.

        Args:
            ids: ``[n]`` int64.
        """
        return like(ids)(self._store.snapshot.find(inputs.ids(ids)) >= 0)

    def reconstruct(self, ids: Any) -> Any:
        """The vectors of these ids, ``[n, D]`` fp32, as stored; rotated back where they were
        rotated.

        Args:
            ids: ``[n]`` int64.

        Raises:
            ValueError, TypeError: An unknown id; a wrong shape or dtype.
        """
        wanted, now = inputs.ids(ids), self._store.snapshot
        vectors = now.vectors(self._rows_of(wanted, now), self.width)
        if self._rotation is not None and len(vectors):
            vectors = self._rotation.undo(vectors)
        return like(ids)(vectors)

    def _append(self, x: Tensor, ids: Tensor, replacing: Tensor | None = None) -> None:
        if not len(x):
            return
        last = int(ids.max())
        _check_last(last)
        next_id, before = max(self._next_id, last + 1), self._store.snapshot
        rotation = self._rotation
        fits = rotation is not None and rotation.axes is None
        if fits:
            self._rotation = Rotation(self.width).fit(x)  # before a search can find what it rotated
        try:
            self._store.append(x, ids, self._convert, replacing)
        finally:  # an interrupt may come when it is done; none comes where nothing is called
            if self._store.snapshot is before:
                self._rotation = rotation
            else:
                self._next_id = next_id

    def _convert(self, part: Tensor) -> Tensor:
        """Vectors as they are to be stored, until it is called again."""
        if self._rotation is not None:
            part = self._rotation.apply(part)
        if part.dtype == self._layout.dtype:
            return part
        if len(self._room) < len(part):
            self._room = torch.empty(part.shape, dtype=self._layout.dtype)
        stored = self._room[: len(part)].copy_(part)
        check_finite(stored, f"vectors as {self.dtype}")
        return stored

    def _rotated(self, queries: Tensor, now: Snapshot) -> Tensor:
        if self._rotation is None or not now.count:
            return queries
        return self._engine.rotated(queries, self._rotation)

    def _rows_of(self, ids: Tensor, now: Snapshot) -> Tensor:
        rows = now.find(ids)
        if bool((rows < 0).any()):
            raise ValueError(f"ids: expected ids of the index, got {int(ids[rows < 0][0])}")
        return rows


def engine(
    layout: Layout, dims: Sequence[int], metric: str, device: str, place: torch.device
) -> Any:
    """What searches, and what it searches."""
    if device == "cpu":
        return host_search, Store(layout)
    from mrl_fast.search.index import device_rows, device_search

    return device_search, device_rows.Store(layout, dims, metric, place)


def _check_last(last: int) -> None:
    """One more than the largest id is an int64 too."""
    if last >= (1 << 63) - 1:
        raise ValueError(f"ids: expected ids below {(1 << 63) - 1}, got {last}")
