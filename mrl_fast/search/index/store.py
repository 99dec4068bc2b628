"""The rows of an index as they change: appended to blocks, removed by a mask, moved together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mrl_fast.search.index.blocks import Block, Layout
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.shared.native import TILE

BLOCK_ROWS = 1 << 16, 1 << 10  # at most, at least
CHUNK_ROWS = 1 << 11  # converted at a time


class Store:
    """The rows of an index in the order they were added. One thread writes at a time; any number
    read ``snapshot``, which is replaced whole.

    Attributes:
        unmoved: The rows before this one are where they were when it was last set.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.unmoved = 0
        self.snapshot = Snapshot(layout.rows([]), [], [], None, None)

    def adopt(self, blocks: list[Block], counts: list[int], alive: Tensor | None) -> None:
        """Takes over full blocks, all but the last of whole tiles."""
        self.unmoved = sum(counts)
        self._publish(blocks, counts, alive)

    def append(
        self,
        vectors: Tensor,
        ids: Tensor,
        convert: Callable[[Tensor], Tensor],
        replacing: Tensor | None = None,
    ) -> None:
        """Appends all vectors, and removes the rows ``replacing``, or, where something is raised,
        does nothing. ``convert`` turns a few vectors into those to be stored."""
        now = self.snapshot
        blocks, counts = list(now.blocks), list(now.counts)
        chunks = zip(vectors.split(CHUNK_ROWS), ids.split(CHUNK_ROWS), strict=True)
        self._fill(blocks, counts, ((convert(x), its) for x, its in chunks), len(vectors))
        alive = now.alive if replacing is None else now.without(replacing)
        if alive is not None:
            alive = _extended(alive, now.count, sum(counts))
        self._publish(blocks, counts, alive, now)

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
            if len(now.alive_rows(first, first + count)) < count:
                break
            blocks.append(block)
            counts.append(count)
            first += count

        def kept() -> Iterator[tuple[Tensor, Tensor]]:
            begin = first
            for block, count in zip(now.blocks[len(blocks) :], now.counts[len(blocks) :]):  # noqa: B905
                rows = now.alive_rows(begin, begin + count) - begin
                for part in rows.split(CHUNK_ROWS):
                    yield block.vectors(part), block.ids[part]
                begin += count

        parts = kept()
        fresh, fresh_counts = [], []
        self._fill(fresh, fresh_counts, parts, now.size - first)
        self.unmoved = min(self.unmoved, first)
        self._publish(blocks + fresh, counts + fresh_counts, None)

    def _fill(
        self,
        blocks: list[Block],
        counts: list[int],
        parts: Any,
        total: int,
    ) -> None:
        """Stores parts (vectors, ids) of ``total`` rows after what the blocks hold."""
        parts, left = iter(parts), total
        if total and blocks and blocks[-1].fixed and counts[-1] % TILE:
            # The rows of its last tile go on in a block of ours.
            begin = counts[-1] - counts[-1] % TILE
            rows = torch.arange(begin, counts[-1])
            parts = _before((blocks[-1].vectors(rows), blocks[-1].ids[rows]), parts)
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
        self, blocks: Any, counts: Any, alive: Tensor | None, before: Snapshot | None = None
    ) -> None:
        self.snapshot = self._state(blocks, counts, alive, before)

    def _state(
        self, blocks: Any, counts: Any, alive: Tensor | None, before: Snapshot | None
    ) -> Snapshot:
        spans, held, first = [], [], 0
        for block, count in zip(blocks, counts, strict=True):
            mine, copies = block.spans(first, count)
            spans += mine
            held += copies
            first += count
        return Snapshot(self.layout.rows(spans), blocks, counts, alive, held, before)


def _before(first: Any, others: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from others


def _extended(alive: Tensor, before: int, after: int) -> Tensor:
    """The words of ``after`` rows, those from ``before`` on alive."""
    words = torch.full((-(-after // TILE),), -1)
    whole = before // TILE
    words[:whole] = alive[:whole]
    if before % TILE:
        words[whole] = alive[whole] | (-1 << before % TILE)
    if after % TILE:
        words[-1] &= (1 << after % TILE) - 1
    return words
