"""How a sharded index changes: each change reaches the shards that it is for, or none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.rows import check_last
from mrl_fast.search.sharded.protocol import Shards
from mrl_fast.search.sharded.routing import Placing, by_shard
from mrl_fast.shared import memory
from mrl_fast.shared.locks import Lock


class Changes:
    """The vectors of a sharded index, as they are added, replaced and removed."""

    config: IndexConfig

    def _hold(self, shards: Shards, placing: Placing, frame: Tensor | None) -> None:
        self._shards, self._placing, self._frame = shards, placing, frame
        self._lock = Lock()

    def fit(self, samples: Any) -> None:
        """Fits the rotation, and what codes need, to samples, as of a MatryoshkaIndex.

        Args:
            samples: ``[n, D]`` floating point.

        Raises:
            ValueError, TypeError: As there.
        """
        with self._lock:
            fitted = self._empty()
            fitted.fit(samples)
            if count := sum(info.rows for info in self._shards.ask("info", self._each())):
                raise ValueError(f"samples: expected an empty index, got {count} vectors in it")
            self._use(fitted._rows.frame)

    def add(self, vectors: Any, ids: Any = None) -> None:
        """Appends vectors, to the shards that they are routed to; all of them or, where anything
        is wrong, none.

        Args:
            vectors: ``[n, D]`` floating point, as of a MatryoshkaIndex.
            ids: ``[n]`` integers, at least 0, none of them in use in any shard; default:
                consecutive after the largest so far.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values, an id that is
                taken.
        """
        x = inputs.vectors(vectors, "vectors", self.config.width)
        new = None if ids is None else inputs.new_ids(ids, len(x))
        with self._lock, torch.inference_mode(False):
            placing = self._placing
            if new is None:
                check_last(placing.next_id + len(x) - 1)
                new = memory.arange(placing.next_id, placing.next_id + len(x))
            elif len(new) and int(new.min()) < placing.next_id:
                taken = new[self._owners(new) >= 0]
                if len(taken):
                    raise ValueError(f"ids: expected ids that are not in use, got {int(taken[0])}")
            if not len(x):
                return
            check_last(int(new.max()))
            if self._frame is None and (self.config.rotation or self.config.code.whole):
                self._add_first(x, new)
            else:
                self._append(x, new)

    def update(self, ids: Any, vectors: Any) -> None:
        """Replaces the vectors of these ids, where they are; they come last in the order of rows.

        Args:
            ids: ``[n]`` integers, each in use, none twice.
            vectors: ``[n, D]``, as in ``add``.

        Raises:
            ValueError, TypeError: As in ``add``; an unknown id.
        """
        inputs.check_order(ids, vectors)
        x = inputs.vectors(vectors, "vectors", self.config.width)
        new = inputs.new_ids(ids, len(x))
        with self._lock, torch.inference_mode(False):
            parts = self._known_parts(new)
            places = self._placing.places(len(new))
            given = [(new[p], x[p], places[p]) for p in parts]
            self._change("update", given)
            self._placing = self._placing.after(new, dealt=False)

    def remove(self, ids: Any) -> None:
        """Removes the vectors of these ids; all of them or, where one is unknown, none.

        Args:
            ids: ``[n]`` integers, as in ``add``.

        Raises:
            ValueError, TypeError: An unknown id; a wrong shape or dtype.
        """
        gone = inputs.ids(ids)
        with self._lock, torch.inference_mode(False):
            self._change("remove", [(gone[part],) for part in self._known_parts(gone)])

    def compact(self) -> None:
        """Frees the room of vectors that were removed or replaced, shard by shard."""
        with self._lock:
            self._shards.change("compact", self._each())

    def build_graph(self, *, progress: bool = True) -> None:
        """Builds a graph over each shard's vectors, as of a MatryoshkaIndex; a shard without
        vectors has none, and is searched exactly once it has some.

        Args:
            progress: Show a bar for each shard.

        Raises:
            ValueError: An index without vectors, or on a device.
        """
        with self._lock:
            infos = self._shards.ask("info", self._each())
            if not any(info.size for info in infos):
                self._empty().build_graph()  # which says what is wrong
            each = [(progress,) if info.size else None for info in infos]
            self._shards.change("build_graph", each)

    def _each(self) -> list[tuple[()]]:
        return [()] * len(self._shards)

    def _empty(self) -> MatryoshkaIndex:
        """An index of the same options."""
        empty = MatryoshkaIndex.__new__(MatryoshkaIndex)
        empty._make(self.config)
        return empty

    def _use(self, frame: Tensor | None) -> None:
        self._shards.change("use_frame", [(frame,)] * len(self._shards))
        self._frame = frame

    def _add_first(self, x: Tensor, ids: Tensor) -> None:
        """Adds rows that say what all rows are given in."""
        fitted = self._empty()
        fitted.fit(x)
        self._use(fitted._rows.frame)
        try:
            self._append(x, ids)
        except BaseException:
            self._use(None)
            raise

    def _append(self, x: Tensor, ids: Tensor) -> None:
        placing = self._placing
        parts, places = placing.parts(ids, len(self._shards)), placing.places(len(ids))
        self._change("add", [(x[p], ids[p], places[p]) for p in parts])
        self._placing = placing.after(ids, dealt=placing.route == "turn")

    def _change(self, method: str, arguments: Sequence[tuple[Tensor, ...]]) -> None:
        """Of the shards that have rows to change."""
        self._shards.change(method, [given if len(given[0]) else None for given in arguments])

    def _owners(self, ids: Tensor) -> Tensor:
        """The shard that holds each id, −1 where none does, ``[n]``."""
        owners = torch.full_like(ids, -1)
        answers = self._shards.ask("contains", [(ids,)] * len(self._shards))
        for shard, there in enumerate(answers):
            owners[there] = shard
        return owners

    def _known_parts(self, ids: Tensor) -> list[Any]:
        """Which of these ids each shard holds; all there must be."""
        owners = self._owners(ids)
        if bool((owners < 0).any()):
            raise ValueError(f"ids: expected ids of the index, got {int(ids[owners < 0][0])}")
        return by_shard(owners, len(self._shards))
