"""Queries as a scan reads them: in the rows' dtype, in two parts where one would lose bits."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.search.metrics import LEAST_NORM, LOST, ROUNDED, Margin, row_norms
from mrl_fast.kernels.shared.tiling import next_power_of_2
from torch import Tensor

LOST_OF_A_NORM, UP = tl.constexpr(LOST), tl.constexpr(1 + ROUNDED)


class NormBound(NamedTuple):
    """An upper bound of a query's norm from its rounded norm: ``factor · (norm + lost)``; infinity,
    so that no score is bounded, where the rounded norm is not above ``least``."""

    least: float
    lost: float
    factor: float


class ScanQueries(NamedTuple):
    """Queries as the sum of one or two parts, and how far a scan's scores of these may be off.

    Attributes:
        q: ``[B, dim]`` of the rows' dtype.
        low: ``[B, dim]``, the second part; None where there is one part.
        norms: ``[B]`` fp32, rounded.
        errors: ``[B]`` fp32, at least the norms of what both parts lack; None: they lack nothing.
        margin: The error of a scan's scores.
        bound: Bounds the sum of both parts' norms.
    """

    q: Tensor
    low: Tensor | None
    norms: Tensor
    errors: Tensor | None
    margin: Margin
    bound: NormBound

    def part(self, part: slice) -> "ScanQueries":
        if part.stop - part.start == self.q.shape[0]:
            return self
        low, errors = (None if x is None else x[part] for x in (self.low, self.errors))
        return ScanQueries(self.q[part], low, self.norms[part], errors, self.margin, self.bound)

    def upper_norms(self) -> Tensor:
        least, lost, factor = self.bound
        return torch.where(self.norms > least, (self.norms + lost) * factor, torch.inf)


def scan_queries(q: Tensor, x: Tensor, metric: str) -> ScanQueries:
    dim, margin = x.shape[1], Margin.from_rows(x, metric)
    bound = NormBound(LEAST_NORM[metric], dim * LOST, 1 + ROUNDED)
    if q.dtype == x.dtype:
        return ScanQueries(q, None, row_norms(q), None, margin, bound)
    B, device = q.shape[0], q.device
    high, low = (torch.empty(B, dim, dtype=x.dtype, device=device) for _ in range(2))
    norms, errors = (torch.empty(B, dtype=torch.float32, device=device) for _ in range(2))
    _split_kernel[(B,)](
        q, high, low, norms, errors, dim, q.stride(0), BLOCK_D=min(1024, next_power_of_2(dim))
    )
    if x.is_floating_point():  # the parts' norms together
        bound = bound._replace(factor=bound.factor * (1 + torch.finfo(x.dtype).eps))
    return ScanQueries(high, low, norms, errors, margin, bound)


@triton.jit(do_not_specialize=["dim"])
def _split_kernel(
    q_ptr,  # [B, dim]
    high_ptr,  # [B, dim] of the rows' dtype, which has fewer bits; as the next
    low_ptr,
    norm_ptr,  # [B] fp32
    error_ptr,  # [B] fp32
    dim,
    stride_qb,
    BLOCK_D: tl.constexpr,
):
    """One program owns a query. Sums are fp64, in which no square of an fp32 is lost."""
    b = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK_D,), tl.float64)
    left = tl.zeros((BLOCK_D,), tl.float64)
    for start in range(0, dim, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < dim
        q = tl.load(q_ptr + b * stride_qb + offs_d, mask_d, other=0.0).to(tl.float32)
        high = q.to(high_ptr.dtype.element_ty)
        rest = q - high.to(tl.float32)
        low = rest.to(low_ptr.dtype.element_ty)
        tl.store(high_ptr + b * dim + offs_d, high, mask_d)
        tl.store(low_ptr + b * dim + offs_d, low, mask_d)
        rest = (rest - low.to(tl.float32)).to(tl.float64)
        q = q.to(tl.float64)
        square += q * q
        left += rest * rest
    error = (tl.sqrt(tl.sum(left)) + dim * LOST_OF_A_NORM) * UP
    tl.store(norm_ptr + b, tl.sqrt(tl.sum(square)).to(tl.float32))
    tl.store(error_ptr + b, error.to(tl.float32))
