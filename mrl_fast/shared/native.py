"""The extension, and how its kernels run: on which instruction set, and in whose threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mrl_fast import _C
from mrl_fast._C import TILE, Rows, pack_flags

__all__ = [
    "ISA",
    "OPENMP",
    "TILE",
    "_C",
    "Rows",
    "address",
    "chunks",
    "pack_flags",
    "product",
    "rows_of",
]

ISA = ""  # the instruction set; empty is the best this processor has. Tests set it.
# PyTorch's own thread team, where it is GNU OpenMP's; else the kernels start threads of their own.
OPENMP = any(map(_C.use_openmp, map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*"))))
PACKED_BYTES = 8 << 20  # of columns packed at a time: they stay in the last cache


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rows_of(x: Tensor) -> Tensor:
    """x with a contiguous last axis, whatever the row stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def chunks(size: int, step: int) -> Iterator[slice]:
    """Ranges of columns; ``step`` is rounded to whole tiles."""
    step = max(_C.TILE, step // _C.TILE * _C.TILE)
    for begin in range(0, size, step):
        yield slice(begin, min(begin + step, size))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, ``[B, V]`` fp32; a row's bits depend on neither the other rows nor the
    number of threads."""
    x, depth = rows_of(x.float()), weight.shape[1]
    out = torch.empty(len(x), len(weight))
    for part in chunks(len(weight), PACKED_BYTES // (4 * depth)):
        w = rows_of(weight[part].float())
        scores = _C.Scores(
            x=x.data_ptr(), x_stride=x.stride(0), w=w.data_ptr(), w_stride=w.stride(0),
            rows=len(x), cols=len(w), dims=[depth], first_col=part.start, cols_apart=len(weight),
        )  # fmt: skip
        _C.store_scores(
            scores, torch.get_num_threads(), ISA, out[:, part].data_ptr(), 0, out.stride(0)
        )
    return out
