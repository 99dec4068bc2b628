"""The CPU implementation (``impl="cpp"``): BLAS for the slab products, C++ SIMD kernels for everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 << 20  # of scores held at a time, whatever B and V are


def slabs(dims: Sequence[int]) -> Iterator[slice]:
    """The columns that are new to each prefix."""
    for begin, end in zip((0, *dims), dims, strict=False):
        yield slice(begin, end)


def class_chunks(rows: int, classes: int, copies: int) -> Iterator[slice]:
    """Ranges of classes for which ``copies`` fp32 matrices ``[rows, range]`` fit the workspace."""
    step = max(64, WORKSPACE_BYTES // (4 * max(1, rows) * copies))
    for begin in range(0, classes, step):
        yield slice(begin, min(begin + step, classes))


def nested_scores(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> Iterator[Tensor]:
    """The running sum S_g, ``[B, V]`` fp32, yielded in place after each slab."""
    scores = None
    for slab in slabs(dims):
        columns, rows = x[:, slab], weight[:, slab].float()
        if scores is None:
            product = columns @ rows.T
            scores = product if bias is None else product.add_(bias)
        else:
            scores.addmm_(columns, rows.T)
        yield scores


def logits_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> Tensor:  # [G, B, V]
    out = x.new_empty(len(dims), x.shape[0], weight.shape[0])
    bias = None if bias is None else bias.float()
    for g, scores in enumerate(nested_scores(x.float(), weight, bias, dims)):
        out[g].copy_(scores)
    return out


def logits_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    x32, w32 = x.float(), weight.float()
    dx, dw = torch.zeros_like(x32), torch.zeros_like(w32)
    suffix = torch.zeros(grad.shape[1:])  # [B, V], T_g = Σ_{h >= g} A_h
    for g, slab in reversed(list(enumerate(slabs(dims)))):
        suffix += grad[g]
        torch.mm(suffix, w32[:, slab], out=dx[:, slab])
        torch.mm(suffix.T, x32[:, slab], out=dw[:, slab])
    db = None if bias is None else suffix.sum(0).to(bias.dtype)
    return dx.to(x.dtype), dw.to(weight.dtype), db
