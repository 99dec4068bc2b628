"""One shard: a whole index, and where its rows stand in the order of adding to all shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.search.index import MatryoshkaIndex, answers, cost
from mrl_fast.search.index.answers import Asked
from mrl_fast.search.index.graph import walks
from mrl_fast.search.index.rows import IndexRows
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.search.sharded.order import RowOrder
from mrl_fast.search.sharded.protocol import ShardFound, ShardFoundRange, ShardInfo
from mrl_fast.shared.types import Stage


class ShardState:
    """A shard as one change left it: what a transport asks. Nothing in it changes."""

    def __init__(self, rows: IndexRows, now: Snapshot, order: RowOrder, next_id: int):
        self.rows, self.now, self.order, self.next_id = rows, now, order, next_id

    def info(self) -> ShardInfo:
        now = self.now
        has_graph = now.graph is not None
        return ShardInfo(now.size, now.count, now.nbytes, self.next_id, has_graph, now.on_disk)

    def ids(self) -> tuple[Tensor, Tensor]:
        """The ids of the live rows in their order, and their places."""
        rows = self.now.live_rows(0, self.now.count)
        return self.now.ids, self.order.at(rows)

    def contains(self, ids: Tensor) -> Tensor:
        return self.now.find(ids) >= 0

    def vectors(self, ids: Tensor) -> Tensor:
        """``[n, D]`` fp32 of ids that are all there, as ``reconstruct`` returns them."""
        found = self.now.vectors(self.now.find(ids), self.rows.config.width)
        return self.rows.rotation.undo(found) if self.rows.rotation and len(found) else found

    def explain(self, stages: list[Stage], batch: int) -> cost.Explanation:
        keep = stages[-1][1]
        own, dim = self._own(stages, keep)
        return cost.explained(self.rows.config, self.now, own or [(dim, keep)], batch)

    def search(self, asked: Asked, allowed: Tensor | None) -> ShardFound:
        """The shard's k best of each query, or all that it holds.

        Args:
            allowed: ids ``[n]`` int64, or a bool for each of the shard's vectors.
        """
        k = max(1, min(asked.k, self.now.size))
        stages, dim = self._own(asked.stages, k) if asked.stages else (None, asked.dim)
        own = Asked(asked.queries, k, dim, stages)
        found = answers.nearest(self.rows, self.now, own, allowed, ranked=True)
        scores, numbers, touched, ranks = found
        assert ranks is not None
        ids, places = self._named(numbers)
        at = None if touched is None else touched.cpu()
        return ShardFound(scores.cpu(), ids, ranks.cpu(), places, at)

    def range_search(
        self, asked: Asked, threshold: float, allowed: Tensor | None
    ) -> ShardFoundRange:
        found = answers.ranked_within(self.rows, self.now, asked, threshold, allowed)
        ids, places = self._named(found.ids)
        lims, scores, _, ranks = (x.cpu() for x in found)
        return ShardFoundRange(lims, scores, ids, ranks, places)

    def _named(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The ids and the places of rows by their numbers."""
        ids = self.rows.backend.name(self.now, numbers)
        return ids.cpu(), self.order.at(numbers.cpu())

    def _own(self, stages: list[Stage], k: int) -> tuple[list[Stage] | None, int]:
        """The stages for k, without a walk where this shard alone has no graph: it is searched
        exactly by the dim."""
        dim = stages[-1][0]
        if walks(stages) and self.now.graph is None:
            return None, dim
        return [*stages[:-1], (dim, k)], dim


class IndexShard:
    """A shard that can be changed. Its index is changed by nobody else.

    Attributes:
        state: As the last change left it.
    """

    def __init__(self, index: MatryoshkaIndex, order: RowOrder | None = None):
        self.index = index
        count = index._rows.snapshot.count
        order = RowOrder.of(np.arange(count)) if order is None else order
        self.state = self._of(order)
        self._before = self.state

    def use_frame(self, frame: Tensor | None) -> None:
        """Takes over what vectors are given in, where there are none: see ``IndexRows.frame``."""
        with self.index._rows.changing():
            self.index._rows.adopt([], [], None, frame, 0)
        self._set(self.state.order)

    def add(self, vectors: Tensor, ids: Tensor, places: Tensor) -> None:
        self.index.add(vectors, ids)
        self._set(self.state.order.extended(places.numpy()))

    def update(self, ids: Tensor, vectors: Tensor, places: Tensor) -> None:
        self.index.update(ids, vectors)
        self._set(self.state.order.extended(places.numpy()))

    def remove(self, ids: Tensor) -> None:
        self.index.remove(ids)
        self._set(self.state.order)

    def compact(self) -> None:
        before = self.state
        kept = before.now.live_rows(0, before.now.count)
        self.index.compact()
        order = before.order
        if len(kept) < before.now.count:
            order = RowOrder.of(order.at(kept).numpy())
        self._set(order)

    def build_graph(self, progress: bool) -> None:
        self.index.build_graph(progress=progress)
        self._set(self.state.order)

    def save(self, path: Path, kept: dict[str, Any] | None) -> dict[str, Any]:
        """Writes the index's folder; its manifest. Files that ``kept`` names stay, too."""
        return self.index._save(path, kept)

    def undo(self) -> None:
        """Goes back to before the last of add, update and remove."""
        rows, before = self.index._rows, self._before
        with rows.changing():
            rows.store.restore(before.now)
            rows.next_id = before.next_id
        self.state = self._of(before.order)

    def _set(self, order: RowOrder) -> None:
        self._before, self.state = self.state, self._of(order)

    def _of(self, order: RowOrder) -> ShardState:
        rows = self.index._rows
        with torch.inference_mode(False):
            return ShardState(rows, rows.snapshot, order, rows.next_id)
