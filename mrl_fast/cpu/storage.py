"""Where an index keeps its vectors: blocks of rows that are filled in place and never move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mrl_fast import _C
from mrl_fast._C import TILE
from mrl_fast._checks import check_finite
from mrl_fast.cpu import native
from mrl_fast.cpu.native import address
from mrl_fast.cpu.search import DTYPES
from mrl_fast.cpu.snapshot import Snapshot

# Prefix norm, code unit, code error; then a tail's norm a level. As enum Stat in csrc/cpu/search.h.
STATS = 3
BLOCK_ROWS = 1 << 16, 1 << 10  # at most, at least
CHUNK_ROWS = 1 << 11  # converted at a time


class Layout:
    """Which of a vector's columns lie where.

    Without codes the prefix lies in vertical fp32 tiles and the other columns row-major. With codes
    all columns lie row-major and the prefix as int8 beside them, in tiles.
    """

    def __init__(self, prefix: int, width: int, dtype: torch.dtype, *, coded: bool):
        self.prefix, self.width, self.dtype, self.coded = prefix, width, dtype, coded
        self.packed = 0 if coded else prefix
        self.levels = []  # columns where a tail's norm is known: the prefix, doubled and doubled
        while prefix < width:
            self.levels.append(prefix)
            prefix *= 2

    def parts(self, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The arrays that hold so many rows, whole tiles, and what each is."""
        tiles, stats = rows // TILE, STATS + len(self.levels)
        parts = {"ids": (torch.int64, (rows,)), "stats": (torch.float32, (stats, rows))}
        if self.coded:
            parts["codes"] = (torch.uint8, (tiles, -(-self.prefix // 4), TILE, 4))
        else:
            parts["packed"] = (torch.float32, (tiles, self.packed, TILE))
        return {**parts, "tail": (self.dtype, (rows, self.width - self.packed))}

    def rows(self, spans: list[tuple[int, ...]]) -> _C.Rows:
        code_dim = self.prefix if self.coded else 0
        return _C.Rows(spans, self.packed, code_dim, DTYPES[self.dtype], self.levels)


class Block:
    """Rows in arrays as of ``Layout.parts``: its own, to be filled, or given ones, read only."""

    def __init__(self, layout: Layout, capacity: int, arrays: dict[str, Tensor] | None = None):
        self.layout, self.capacity, self.fixed = layout, capacity, arrays is not None
        if arrays is None:
            arrays = {name: _empty(*part) for name, part in layout.parts(capacity).items()}
        self.ids, self.stats, self.tail = arrays["ids"], arrays["stats"], arrays["tail"]
        self.codes, self.packed = arrays.get("codes"), arrays.get("packed")

    def store(self, vectors: Tensor, ids: Tensor, begin: int) -> None:
        """Writes rows from ``begin`` on; ``vectors`` are of the layout's dtype."""
        self.ids[begin : begin + len(vectors)] = ids
        problem = _C.store(
            self.layout.rows([]), vectors.data_ptr(), DTYPES[vectors.dtype], vectors.stride(0),
            vectors.shape[1], begin, len(vectors), torch.get_num_threads(), native.ISA,
            address(self.packed), address(self.codes), address(self.stats), self.capacity,
            self.tail.data_ptr(), self.tail.stride(0),
        )  # fmt: skip
        if problem:
            check_finite(vectors, "vectors")

    def spans(self, first: int, rows: int) -> tuple[list[tuple[int, ...]], list[Tensor]]:
        """The first ``rows`` rows as the kernels read them, called first, first + 1, ...; and
        copies that these point to: of a tile that others may be writing rows to."""
        whole = rows if self.fixed else rows - rows % TILE
        spans, copies = [], []
        for begin, end in ((0, whole), (whole, rows)):
            if begin == end:
                continue
            tiles = slice(begin // TILE, -(-end // TILE))
            packed, codes = (None if x is None else x[tiles] for x in (self.packed, self.codes))
            if end % TILE and not self.fixed:
                packed, codes = (None if x is None else x.clone() for x in (packed, codes))
                copies += [x for x in (packed, codes) if x is not None]
            tail = self.tail[begin:]
            spans.append((
                first + begin, end - begin, address(packed), address(codes), tail.data_ptr(),
                tail.stride(0), self.stats[:, begin:].data_ptr(), self.stats.stride(0),
                self.ids[begin:].data_ptr(),
            ))  # fmt: skip
        return spans, copies

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows of the block, ``[n, D]``, of the layout's dtype."""
        tail = self.tail[rows]
        if self.packed is None:
            return tail
        head = self.packed[rows // TILE, :, rows % TILE].to(tail.dtype)
        return torch.cat([head, tail], dim=1)

    def nbytes(self, rows: int) -> int:
        """Of ``rows`` rows, padding included."""
        arrays = (self.ids, self.tail, self.stats, self.packed, self.codes)
        bytes_a_row = sum(x.nbytes for x in arrays if x is not None) // self.capacity
        return bytes_a_row * (rows + -rows % TILE)


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


def _empty(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
