"""One state of an index's rows: what a search reads, whatever is added or removed meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.search.index import scaled
from mrl_fast.search.index.blocks import Block
from mrl_fast.shared import memory
from mrl_fast.shared.memory import HOST, address
from mrl_fast.shared.native import TILE, Rows, pack_flags

I64 = torch.int64


class IdRun:
    """Ids of consecutive rows in ascending order, each with its newest row last."""

    def __init__(self, ids: Tensor, rows: Tensor):
        if not bool((ids.diff() > 0).all()):
            ids, order = ids.sort(stable=True)
            rows = rows[order]
        self.ids, self.rows = ids, rows
        self.gapless = int(ids[-1] - ids[0]) == len(ids) - 1 and bool((ids.diff() == 1).all())

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these ids there are, and their rows."""
        if self.gapless:
            place = ids - self.ids[0]
            there = (place >= 0) & (place < len(self.ids))
        else:
            place = torch.searchsorted(self.ids, ids, right=True) - 1
            there = (place >= 0) & (self.ids[place.clamp(min=0)] == ids)
        return there, self.rows[place[there]]


class Snapshot:
    """Rows [0, count), in blocks; some may have been removed.

    Attributes:
        rows: What the kernels read: all rows, and which of them are live.
        blocks, counts: The blocks that hold the rows, and how many each holds; in all but the last
            whole tiles.
        live: The live mask, ``[tiles]`` int64: bit r of a word is row r of the tile. None: every
            row is live.
        size: How many rows are live.
    """

    def __init__(
        self,
        rows: Rows,
        blocks: Sequence[Block],
        counts: Sequence[int],
        live: Tensor | None,
        keepalive: Any,
        before: Snapshot | None = None,
    ):
        self.blocks, self.counts, self.live = tuple(blocks), tuple(counts), live
        self.count = sum(counts)
        self.keepalive = keepalive  # memory that `rows` points to beside the blocks
        self.device_rows: Any = None  # the same rows on a device, where the index is on one
        self.graph: Any = None  # a RowGraph over the first rows, where one was built
        self.rows = rows if live is None else rows.restricted(address(live, I64))
        self.size = self.rows.eligible
        # The ids of the first so many rows; the others join them when an id is looked up.
        self._runs: tuple[tuple[IdRun, ...], int] = before._runs if before else ((), 0)

    @property
    def on_disk(self) -> bool:
        """Whether vectors lie in files, which are mapped to memory."""
        return any(block.fixed for block in self.blocks)

    @property
    def nbytes(self) -> int:
        blocks = zip(self.blocks, self.counts, strict=True)
        runs = sum(run.ids.nbytes + run.rows.nbytes for run in self._runs[0])
        words = 0 if self.live is None else self.live.nbytes
        graph = 0 if self.graph is None else self.graph.nbytes
        return sum(block.nbytes(n) for block, n in blocks) + runs + words + graph

    @property
    def ids(self) -> Tensor:
        """Of the live rows, in their order, ``[size]``."""
        return self._ids(0) if self.live is None else self._ids(0)[self._live_flags()]

    def find(self, ids: Tensor) -> Tensor:
        """The rows that have these ids, −1 where there is none, ``[n]``."""
        found = torch.full_like(ids, -1)
        for run in self._cover():  # a newer row of the same id comes later
            there, rows = run.find(ids)
            found[there] = rows
        if self.live is not None:
            known = found.clamp(min=0)
            dead = (self.live[known // TILE] >> (known % TILE)) & 1 == 0
            found[dead] = -1
        return found

    def restricted(self, allowed: Tensor) -> tuple[Rows, Tensor]:
        """The rows that are live and allowed, and the mask that they point to."""
        words = words_of(self.flags(allowed))
        return self.rows.restricted(address(words, I64)), words

    def flags(self, allowed: Tensor) -> Tensor:
        """Whether each row is live and allowed, ``[count]`` bool.

        Args:
            allowed: Ids, ``[n]`` int64, of which unknown ones are ignored; or a bool for each live
                row, ``[size]``.
        """
        if allowed.dtype == torch.bool and self.live is None:
            return allowed
        flags = memory.zeros(self.count, dtype=torch.bool)
        if allowed.dtype == torch.bool:
            flags[self._live_flags()] = allowed
        else:
            rows = self.find(allowed)
            flags[rows[rows >= 0]] = True
        return flags

    def vectors(self, rows: Tensor, width: int) -> Tensor:
        """Rows by their number, ``[n, width]`` fp32."""
        result = memory.empty(len(rows), width)
        ends = torch.tensor(self.counts, dtype=I64, device=HOST).cumsum(0)
        which = torch.searchsorted(ends, rows, right=True)
        for i in which.unique().tolist():
            mine = (which == i).nonzero()[:, 0]
            local = rows[mine] - (ends[i] - self.counts[i])
            result[mine] = scaled.values(self.blocks[i].vectors(local)).float()
        return result

    def without(self, rows: Tensor) -> Tensor:
        """The live mask less these rows."""
        flags = memory.full((self.count,), True, torch.bool)
        flags[rows] = False
        words = words_of(flags)
        return words if self.live is None else words & self.live

    def first_gone(self) -> int:
        """The number of the first row that is not live, of an index where there is one."""
        return int((~self._live_flags()).nonzero()[0])

    def live_rows(self, begin: int, end: int) -> Tensor:
        """The numbers of the live rows in [begin, end), which begins a tile."""
        if self.live is None:
            return memory.arange(begin, end)
        flags = flags_of(self.live[begin // TILE : -(-end // TILE)], end - begin)
        return flags.nonzero()[:, 0] + begin

    def _live_flags(self) -> Tensor:
        assert self.live is not None
        return flags_of(self.live, self.count)

    def _ids(self, begin: int) -> Tensor:
        parts, first = [memory.empty(0, dtype=I64)], 0
        for block, count in zip(self.blocks, self.counts, strict=True):
            parts.append(block.ids[max(begin - first, 0) : count])
            first += count
        return torch.cat(parts)

    def _cover(self) -> tuple[IdRun, ...]:
        runs, covered = self._runs
        if covered < self.count:
            new = IdRun(self._ids(covered), memory.arange(covered, self.count))
            merged = [*runs]
            while merged and len(merged[-1].ids) <= 2 * len(new.ids):  # so that they stay few
                last = merged.pop()
                new = IdRun(torch.cat([last.ids, new.ids]), torch.cat([last.rows, new.rows]))
            runs = (*merged, new)
            self._runs = runs, self.count
        return runs


def words_of(flags: Tensor) -> Tensor:
    """``[n]`` bool as int64 words of 64 bits, the first the lowest, padded with zeros."""
    flags, words = flags.contiguous(), memory.empty(-(-len(flags) // TILE), dtype=I64)
    pack_flags(address(flags, torch.bool), len(flags), address(words, I64))
    return words


def flags_of(words: Tensor, count: int) -> Tensor:
    bits = np.unpackbits(words.numpy().view(np.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits.view(bool))


def restricted(now: Snapshot, allowed: Tensor | None) -> tuple[Rows, Any]:
    """The rows of a snapshot that are live and allowed, as of ``Snapshot.flags``, and a keepalive
    for what they point to."""
    if allowed is None:
        return now.rows, now
    return now.restricted(allowed.cpu())
