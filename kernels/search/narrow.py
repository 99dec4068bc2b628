"""Narrowing: finds the rank-th best score of a query's hits and drops what cannot be better.

The rank-th best is found bit by bit, from the highest, by counting scores; as soon as exactly
``rank`` scores are counted, the bits below change nothing that is kept. One program owns a query.
"""

import triton
import triton.language as tl
from mrl_fast.kernels.search.keys import ordered, score_of
from mrl_fast.kernels.search.plan import Buffers
from mrl_fast.kernels.search.queries import ScanQueries
from torch import Tensor

INFINITY = tl.constexpr(0x7F800000)  # keys.ordered(inf); that of −inf is −1 − this


@triton.jit(do_not_specialize=["rank", "seeds"])
def _narrow_kernel(
    hits_ptr,  # [B, C] int64, in and out: a score's bits above a bucket's number
    count_ptr,  # [B] int32: how many were appended, those beyond C dropped; out: how many are left
    flag_ptr,  # [B] int32, set where a hit was dropped
    theta_ptr,  # [B] fp32, out: what a score must not be below
    among_ptr,  # [B] int32: 0 for queries that have no hits
    q_norm_ptr,  # [B] fp32
    q_error_ptr,  # [B] fp32, the norm of what the scan's form of the query lacks
    norm_ptr,  # [1], no row's norm is larger: fp32, or its bits
    rank,
    seeds,  # hits that are there beside those that were counted
    least_norm,  # the bound of a query's norm: queries.NormBound
    lost,
    factor,
    e_a,  # the scan's error: metrics.Margin
    e_c,
    e_d,
    e_e,
    HAS_AMONG: tl.constexpr,
    HAS_ERROR: tl.constexpr,
    C: tl.constexpr,
    PART: tl.constexpr,  # hits that are moved at a time
):
    b = tl.program_id(0)
    hits_ptr += b.to(tl.int64) * C
    count = tl.load(count_ptr + b) + seeds
    if HAS_AMONG:
        count = tl.where(tl.load(among_ptr + b) != 0, count, 0)
    lanes = tl.arange(0, C)
    bits = (tl.load(hits_ptr + lanes, lanes < count, other=0) >> 32).to(tl.int32)
    bits = tl.where(lanes < count, ordered(bits.to(tl.float32, bitcast=True)), -(1 << 31))
    least = tl.full((), -(1 << 31), tl.int32)  # a number that `reached` scores reach
    reached = tl.full((), C, tl.int32)
    bit = tl.full((), 1 << 31, tl.int64)
    while (bit > 0) & (reached != rank):
        more = least ^ bit.to(tl.int32)
        larger = tl.sum((bits >= more).to(tl.int32))
        least = tl.where(larger >= rank, more, least)
        reached = tl.where(larger >= rank, larger, reached)
        bit >>= 1
    q, x = tl.load(q_norm_ptr + b), tl.load(norm_ptr)
    if norm_ptr.dtype.element_ty == tl.int32:
        x = x.to(tl.float32, bitcast=True)
    q = tl.where(q > least_norm, (q + lost) * factor, float("inf"))
    bounded = (x < float("inf")) & (q < float("inf"))
    q, x = tl.where(bounded, q, 0.0), tl.where(bounded, x, 0.0)
    error = e_a + e_c * q * q + e_d * q * x + e_e * x * x
    if HAS_ERROR:
        error += tl.load(q_error_ptr + b) * x
    bounded &= (least != -(1 << 31)) & (least <= INFINITY)
    least = tl.minimum(tl.maximum(least, -1 - INFINITY), INFINITY)  # further out are NaN alone
    theta = tl.where(bounded, score_of(least) - 2 * error, -float("inf"))
    left = 0
    for start in range(0, C, PART):  # hits only move towards the front
        part = start + tl.arange(0, PART)
        hits = tl.load(hits_ptr + part, part < count, other=0)
        score = (hits >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        kept = (part < count) & ~(score < theta)  # NaN stays, on either side
        place = left + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.debug_barrier()  # all of this part have been read
        tl.store(hits_ptr + place, hits, kept)
        left += tl.sum(kept.to(tl.int32))
    tl.store(count_ptr + b, left)
    tl.store(theta_ptr + b, theta)
    if count > C:
        tl.store(flag_ptr + b, 1)


def narrow(
    to: Buffers, q: ScanQueries, norm: Tensor, rank: int, *, seeds: int = 0,
    among: Tensor | None = None,
) -> None:  # fmt: skip
    """Cuts each query's buffer to the hits that may be among its ``rank`` best. A scan's score may
    be off by its margin, plus the query's error times the largest norm of a row.

    Args:
        seeds: Hits that are in the buffer and were not counted.
        among: ``[B]`` int32, 0 where a query has no hits.
    """
    B, C = to.hits.shape
    _narrow_kernel[(B,)](
        to.hits, to.count, to.flag, to.theta, among, q.norms, q.errors, norm, rank, seeds,
        *q.bound, *q.margin[1:], HAS_AMONG=among is not None, HAS_ERROR=q.errors is not None,
        C=C, PART=min(C, 2048), num_warps=narrow_warps(C),
    )  # fmt: skip


def narrow_warps(C: int) -> int:
    return min(16, max(4, C // 1024))  # 32 hits a thread
