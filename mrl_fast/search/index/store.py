"""The rows of an index as they change: appended to blocks, removed by a mask, moved together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from mrl_fast.search.index.blocks import Block, Layout
from mrl_fast.search.index.graph import RowGraph
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.shared import memory
from mrl_fast.shared.native import TILE

BLOCK_ROWS = 1 << 16, 1 << 10  # at most, at least
CHUNK_ROWS = 1 << 11  # converted at a time


class Mirror(Protocol):
    """A copy of the rows elsewhere, which is searched instead."""

    def follow(self, now: Snapshot, before: Snapshot | None) -> None:
        """Brings the copy to this state, before anybody can find it; after ``before`` rows were
        appended or removed only, without it they may have moved."""
        ...


class RowStore:
    """The rows of an index in the order they were added. One thread writes at a time; any number
    read ``snapshot``, which is replaced whole.

    Attributes:
        graph: Over the first rows, until one of these moves; None: there is none.
        saved_prefix_rows: So many rows at the beginning have not moved since they were saved.
    """

    def __init__(self, layout: Layout, mirror: Mirror | None = None):
        self.layout, self.mirror = layout, mirror
        self.saved_prefix_rows = 0
        self.graph: RowGraph | None = None
        self._publish([], [], None)

    def adopt(
        self,
        blocks: Sequence[Block],
        counts: Sequence[int],
        live: Tensor | None,
        graph: RowGraph | None = None,
    ) -> None:
        """Takes over read-only blocks, all but the last of whole tiles."""
        self.graph = graph
        self._publish(blocks, counts, live)

    def restore(self, before: Snapshot) -> None:
        """Goes back to a state after which rows were appended or removed only: nobody may have
        seen what came after."""
        self.graph = before.graph
        self._publish(before.blocks, before.counts, before.live)

    def use_graph(self, graph: RowGraph) -> None:
        now, self.graph = self.snapshot, graph
        self._publish(now.blocks, now.counts, now.live, now)

    def append(
        self,
        vectors: Tensor,
        ids: Tensor,
        convert: Callable[[Tensor], Tensor],
        replacing: Tensor | None = None,
    ) -> None:
        """Appends all vectors, and removes the rows ``replacing``; or raises and does nothing.

        Args:
            convert: Turns a few vectors into those to be stored.
        """
        now = self.snapshot
        blocks, counts = list(now.blocks), list(now.counts)
        chunks = zip(vectors.split(CHUNK_ROWS), ids.split(CHUNK_ROWS), strict=True)
        self._fill(blocks, counts, ((convert(x), its) for x, its in chunks), len(vectors))
        live = now.live if replacing is None else now.without(replacing)
        if live is not None:
            live = _extended(live, now.count, sum(counts))
        self._publish(blocks, counts, live, now)

    def remove(self, rows: Tensor) -> None:
        now = self.snapshot
        self._publish(now.blocks, now.counts, now.without(rows), now)

    def compact(self) -> None:
        """Moves the rows after the first removed one together; nothing before it moves."""
        now = self.snapshot
        if now.size == now.count:
            return
        blocks, counts, first = [], [], 0
        for block, count in zip(now.blocks, now.counts, strict=True):
            if len(now.live_rows(first, first + count)) < count:
                break
            blocks.append(block)
            counts.append(count)
            first += count
        moved = zip(now.blocks[len(blocks) :], now.counts[len(blocks) :], strict=True)

        def kept() -> Iterator[tuple[Tensor, Tensor]]:
            begin = first
            for block, count in moved:
                rows = now.live_rows(begin, begin + count) - begin
                for part in rows.split(CHUNK_ROWS):
                    yield block.vectors(part), block.ids[part]
                begin += count

        fresh, fresh_counts = [], []
        self._fill(fresh, fresh_counts, kept(), now.size - first)
        self.saved_prefix_rows = min(self.saved_prefix_rows, first)
        if self.graph is not None and self.graph.rows > now.first_gone():
            self.graph = None
        self._publish(blocks + fresh, counts + fresh_counts, None)

    def _fill(
        self,
        blocks: list[Block],
        counts: list[int],
        parts: Iterable[tuple[Tensor, Tensor]],
        total: int,
    ) -> None:
        """Stores parts (vectors, ids) of ``total`` rows after those that the blocks hold."""
        left = total
        if total and blocks and blocks[-1].fixed and counts[-1] % TILE:
            # The rows of a read-only block's last tile are written anew, to a block of ours.
            begin = counts[-1] - counts[-1] % TILE
            rows = memory.arange(begin, counts[-1])
            parts = chain([(blocks[-1].vectors(rows), blocks[-1].ids[rows])], parts)
            left += len(rows)
            counts[-1] = begin
            if begin == 0:
                blocks.pop()
                counts.pop()
        for vectors, ids in parts:
            done = 0
            while done < len(vectors):
                if not blocks or blocks[-1].fixed or counts[-1] == blocks[-1].capacity:
                    # Small at first, so that a small index is small; never moved to grow.
                    most, least = BLOCK_ROWS
                    wanted = min(max(left, sum(counts), least), most)
                    blocks.append(Block(self.layout, wanted + -wanted % TILE))
                    counts.append(0)
                n = min(len(vectors) - done, blocks[-1].capacity - counts[-1])
                blocks[-1].store(vectors[done : done + n], ids[done : done + n], counts[-1])
                counts[-1] += n
                done += n
                left -= n
            del vectors, ids  # before the next are made

    def _publish(
        self,
        blocks: Sequence[Block],
        counts: Sequence[int],
        live: Tensor | None,
        before: Snapshot | None = None,
    ) -> None:
        spans, copies, first = [], [], 0
        for block, count in zip(blocks, counts, strict=True):
            mine, its = block.spans(first, count)
            spans += mine
            copies += its
            first += count
        kept = copies, self.layout.centre, self.layout.signs
        now = Snapshot(self.layout.rows(spans), blocks, counts, live, kept, before)
        now.graph = self.graph
        if self.mirror is not None:
            self.mirror.follow(now, before)
        self.snapshot = now


def _extended(live: Tensor, before: int, after: int) -> Tensor:
    """The live mask of ``after`` rows, all live from ``before`` on."""
    words = memory.full((-(-after // TILE),), -1, torch.int64)
    whole = before // TILE
    words[:whole] = live[:whole]
    if before % TILE:
        words[whole] = live[whole] | (-1 << before % TILE)
    if after % TILE:
        words[-1] &= (1 << after % TILE) - 1
    return words
