"""The codes of a first prefix: one row of the table each, and a kernel that scans it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mrl_fast.shared.native import TILE


class PrefixCode(NamedTuple):
    """How an index holds its first prefix for scanning, in tiles of rows side by side.

    Attributes:
        array: The array's name in an index's files, and among the arguments of the kernels.
        dtype: Of the array's elements.
        bits: That a scan reads of each column.
        tile: The shape of a tile, by the prefix's width.
        exact: The array holds the vectors' own columns, which lie nowhere else, so that scores are
            carried on from it. Else it ranks a shortlist, and reranking begins at column 0.
        widest: The prefix's columns at most.
        signed: ``[n, columns]`` of the array's elements as a device multiplies them; None where it
            reads the vectors themselves.
    """

    array: str
    dtype: torch.dtype
    bits: int
    tile: Callable[[int], tuple[int, ...]]
    exact: bool
    widest: int
    signed: Callable[[Tensor], Tensor] | None = None


CODES = {
    "float32": PrefixCode(
        "packed", torch.float32, 32, lambda prefix: (prefix, TILE), exact=True, widest=1 << 24
    ),
    "int8": PrefixCode(  # plus 128, four columns of a row together; sums of products are int32
        "codes", torch.uint8, 8, lambda prefix: (-(-prefix // 4), TILE, 4), exact=False,
        widest=1 << 15, signed=lambda codes: (codes.to(torch.int16) - 128).to(torch.int8),
    ),
}  # fmt: skip
