"""The forms in which rows are scanned: one row of the table each, with a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mrl_fast.shared.native import TILE


class Code(NamedTuple):
    """What an index scans, in tiles of rows side by side.

    Attributes:
        arrays: The dtype of an array's elements and the shape of a tile, by the number of columns
            that are coded; by the array's name in an index's files, and as the kernels take it.
        bits: The numbers of bits of a column that a scan may read.
        whole: All columns are coded; else the first prefix.
        exact: The array holds the vectors' own columns, which lie nowhere else, so that scores are
            carried on from it. Else it ranks a shortlist, and reranking begins at column 0.
        widest: The columns that are coded, at most.
        signed: ``[n, columns]`` of the array's elements as a device multiplies them; None where it
            reads the vectors themselves.
    """

    arrays: Mapping[str, tuple[torch.dtype, Callable[[int], tuple[int, ...]]]]
    bits: tuple[int, ...]
    whole: bool
    exact: bool
    widest: int
    signed: Callable[[Tensor], Tensor] | None = None


def _eights(columns: int) -> int:
    """Steps of eight columns, an even number."""
    return -(-columns // 16) * 2


CODES = {
    "float32": Code(
        {"packed": (torch.float32, lambda prefix: (prefix, TILE))}, (32,), whole=False, exact=True,
        widest=1 << 24,
    ),
    "int8": Code(  # plus 128, four columns of a row together; sums of products are int32
        {"codes": (torch.uint8, lambda prefix: (-(-prefix // 4), TILE, 4))}, (8,), whole=False,
        exact=False, widest=1 << 15,
        signed=lambda codes: (codes.to(torch.int16) - 128).to(torch.int8),
    ),
    # Eight bits of every column, the first four and the last; the first, the sign, lies apart too.
    # Sums of products are exact in fp32.
    "bits": Code(
        {
            "signs": (torch.uint8, lambda width: (_eights(width), TILE)),
            "nibbles": (torch.uint8, lambda width: (_eights(width), TILE, 4)),
            "lows": (torch.uint8, lambda width: (_eights(width), TILE, 4)),
        },
        (1, 4), whole=True, exact=False, widest=1 << 13,
    ),
}  # fmt: skip
TILED = [name for code in CODES.values() for name in code.arrays]
