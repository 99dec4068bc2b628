"""Where an index keeps its vectors: blocks of rows that are filled in place and never move."""

from __future__ import annotations

import torch
from torch import Tensor

from mrl_fast.search.cpp import DTYPES
from mrl_fast.shared import native
from mrl_fast.shared.checks import check_finite
from mrl_fast.shared.native import _C, TILE, address

# Prefix norm, code unit, code error; then a tail's norm a level: enum Stat in search/search.h.
STATS = 3


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
            arrays["stats"].zero_()  # those of codes stay 0 where there are none
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


def _empty(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
