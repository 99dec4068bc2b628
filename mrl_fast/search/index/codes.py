"""The forms in which rows are scanned: one row of the table each, with a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mrl_fast.shared.native import TILE, TileStat


class TileArray(NamedTuple):
    """An array of a code.

    Attributes:
        dtype: Of its elements.
        tile: The shape of a tile, by the number of columns that are coded.
        rows: Which axis of that shape is the tile's rows; None: there is none.
    """

    dtype: torch.dtype
    tile: Callable[[int], tuple[int, ...]]
    rows: int | None

    def clear(self, tile: Tensor, used: int) -> None:
        """Sets what a tile holds of the rows from ``used`` on to zeros."""
        if self.rows is not None:
            tile.narrow(self.rows, used, TILE - used).zero_()


class Code(NamedTuple):
    """What an index scans, in tiles of rows.

    Attributes:
        arrays: By their names in an index's files, and as the kernels take them.
        bits: The numbers of bits of a column that a scan may read.
        reranking: Those by which a shortlist may be ranked, row by row.
        whole: All columns are coded; else the first prefix.
        exact: The array holds the vectors' own columns, which lie nowhere else, so that scores are
            carried on from it. Else it ranks a shortlist, and reranking begins at column 0.
        widest: The columns that are coded, at most.
        signed: ``[n, columns]`` of the array's elements as a device multiplies them; None where it
            reads the vectors themselves.
    """

    arrays: Mapping[str, TileArray]
    bits: tuple[int, ...]
    whole: bool
    exact: bool
    widest: int
    signed: Callable[[Tensor], Tensor] | None = None
    reranking: tuple[int, ...] = ()


def _eights(columns: int) -> int:
    """Steps of eight columns, an even number."""
    return -(-columns // 16) * 2


CODES = {
    "float32": Code(
        {"packed": TileArray(torch.float32, lambda prefix: (prefix, TILE), 1)}, (32,),
        whole=False, exact=True, widest=1 << 24,
    ),
    "int8": Code(  # plus 128, four columns of a row together; sums of products are int32
        {"codes": TileArray(torch.uint8, lambda prefix: (-(-prefix // 4), TILE, 4), 1)}, (8,),
        whole=False, exact=False, widest=1 << 15,
        signed=lambda codes: (codes.to(torch.int16) - 128).to(torch.int8),
    ),
    # Eight bits of every column, the first four and the last; the first, the sign, lies apart too.
    # The last four lie row by row. Sums of products are exact in fp32.
    "bits": Code(
        {
            "signs": TileArray(torch.uint8, lambda width: (_eights(width), TILE), 1),
            "nibbles": TileArray(torch.uint8, lambda width: (_eights(width), TILE, 4), 1),
            "lows": TileArray(torch.uint8, lambda width: (TILE, 4 * _eights(width)), 0),
            "tile_stats": TileArray(torch.float32, lambda width: (int(TileStat.TILE_STATS),), None),
        },
        (1, 4), whole=True, exact=False, widest=1 << 13, reranking=(4, 8),
    ),
}  # fmt: skip
# None: rows of int8 are scanned as they lie.
ROWS = Code({}, (8,), whole=False, exact=True, widest=1 << 24)
TILED = {name: array for code in CODES.values() for name, array in code.arrays.items()}

# Of a centre: vectors read, at most and at least (of a rotation too), and the share of their
# squares.
MEAN_ROWS, FEWEST_ROWS, LEAST_MEAN = 1 << 12, 64, 0.05


def centre_of(samples: Tensor) -> Tensor:
    """What codes of such vectors are less, ``[1, D]`` fp32: their mean where it holds more than 5 %
    of their squares, else 0, as where there are too few to tell."""
    samples = samples.double()  # whose squares no fp32 can be too large for
    mean = samples.mean(dim=0, keepdim=True)
    if len(samples) < FEWEST_ROWS:
        return torch.zeros_like(mean).float()
    large = mean.square().sum() > LEAST_MEAN * samples.square().sum() / len(samples)
    return mean.float() if large else torch.zeros_like(mean).float()
