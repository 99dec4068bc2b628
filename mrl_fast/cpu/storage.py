"""Where an index keeps its vectors: blocks of rows that are filled in place and never move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mrl_fast import _C
from mrl_fast._C import TILE
from mrl_fast._checks import check_finite
from mrl_fast.cpu import native
from mrl_fast.cpu.native import address
from mrl_fast.cpu.search import DTYPES

# Prefix norm, code unit, code error; then a tail's norm a level. As enum Stat in csrc/cpu/search.h.
STATS = 3
BLOCK_ROWS = 1 << 16, 1 << 10  # at most, at least
CHUNK_ROWS = 1 << 12  # converted at a time


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

    def rows(self, spans: list[tuple[int, ...]], ids: Tensor | None = None) -> _C.Rows:
        code_dim = self.prefix if self.coded else 0
        dtype = DTYPES[self.dtype]
        return _C.Rows(spans, self.packed, code_dim, dtype, self.levels, address(ids))


class Block:
    """Room for up to ``capacity`` rows."""

    def __init__(self, layout: Layout, capacity: int):
        self.layout, self.capacity = layout, capacity
        tiles = capacity // TILE
        self.tail = _empty(capacity, layout.width - layout.packed, dtype=layout.dtype)
        self.stats = _empty(STATS + len(layout.levels), capacity)
        self.packed = self.codes = None
        if layout.coded:
            self.codes = _empty(tiles, -(-layout.prefix // 4), TILE, 4, dtype=torch.uint8)
        else:
            self.packed = _empty(tiles, layout.packed, TILE)

    def store(self, vectors: Tensor, begin: int) -> None:
        """Writes rows from ``begin`` on; ``vectors`` are of the layout's dtype."""
        self.tail[begin : begin + len(vectors)] = vectors[:, self.layout.packed :]
        problem = _C.store(
            self.layout.rows([]), vectors.data_ptr(), DTYPES[vectors.dtype], vectors.stride(0),
            vectors.shape[1], begin, len(vectors), torch.get_num_threads(), native.ISA,
            address(self.packed), address(self.codes), address(self.stats), self.capacity,
        )  # fmt: skip
        if problem:
            check_finite(vectors, "vectors")

    def span(self, first: int, rows: int) -> tuple[int, ...]:
        tail = self.tail
        return (
            first, rows, address(self.packed), address(self.codes), tail.data_ptr(), tail.stride(0),
            self.stats.data_ptr(), self.capacity,
        )  # fmt: skip

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows of the block, ``[n, D]`` fp32."""
        tail = self.tail[rows].float()
        if self.packed is None:
            return tail
        return torch.cat([self.packed[rows // TILE, :, rows % TILE], tail], dim=1)

    def nbytes(self, rows: int) -> int:
        """Of ``rows`` rows, padding included."""
        stored = [t for t in (self.tail, self.stats, self.packed, self.codes) if t is not None]
        bytes_a_row = sum(t.numel() * t.element_size() for t in stored) // self.capacity
        return bytes_a_row * (rows + -rows % TILE)


class Store:
    """Rows in the order they were appended."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.blocks: list[Block] = []
        self.counts: list[int] = []  # rows of each block
        self.ids = torch.empty(0, dtype=torch.int64)
        # What a search reads, with the ids it points to: it holds no row that is half written.
        self.snapshot = layout.rows([]), self.ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        blocks = zip(self.blocks, self.counts, strict=True)
        return sum(b.nbytes(n) for b, n in blocks) + 8 * len(self.ids)

    def append(self, vectors: Tensor, ids: Tensor, convert: Callable[[Tensor], Tensor]) -> None:
        """Appends all vectors or, where something is raised, none.

        ``convert`` turns a few vectors into those to be stored.
        """
        blocks, counts = list(self.blocks), list(self.counts)
        done = 0
        while done < len(vectors):
            if not blocks or counts[-1] == blocks[-1].capacity:
                # Small at first, so that a small index is small; never moved to grow.
                most, least = BLOCK_ROWS
                wanted = min(max(len(vectors) - done, sum(counts), least), most)
                blocks.append(Block(self.layout, wanted + -wanted % TILE))
                counts.append(0)
            count = min(len(vectors) - done, blocks[-1].capacity - counts[-1], CHUNK_ROWS)
            blocks[-1].store(convert(vectors[done : done + count]), counts[-1])
            counts[-1] += count
            done += count
        firsts = torch.tensor([0, *counts]).cumsum(0).tolist()
        spans = [b.span(f, n) for b, f, n in zip(blocks, firsts, counts, strict=False)]
        ids = torch.cat([self.ids, ids])
        self.blocks, self.counts, self.ids = blocks, counts, ids
        self.snapshot = self.layout.rows(spans, ids), ids

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows by their number, ``[n, D]`` fp32."""
        result = torch.empty(len(rows), self.layout.width)
        ends = torch.tensor(self.counts, dtype=torch.int64).cumsum(0)
        which = torch.searchsorted(ends, rows, right=True)
        for i in which.unique().tolist():
            mine = (which == i).nonzero()[:, 0]
            result[mine] = self.blocks[i].vectors(rows[mine] - (ends[i] - self.counts[i]))
        return result


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.empty(*shape, dtype=dtype)
    _C.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor
