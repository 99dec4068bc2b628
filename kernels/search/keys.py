"""Candidates as int64 keys that sort by (score descending, row ascending), and their selection.

A key holds a score's 32 bits, made to compare as integers do, above the bits of a row or bucket, so
that selecting, sorting and comparing candidates is integer work with one answer. Narrowing finds
the rank-th best score of a query's buffer bit by bit, and keeps what the scan's error cannot
exclude; one program owns a query.
"""

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.shared.tiling import interpreted
from torch import Tensor

EMPTY = tl.constexpr(-(1 << 63))  # sorts after every key
SORTED_AT_ONCE = 2048  # keys a program sorts; of more, torch.topk picks first
SORTED_INTERPRETED = 16  # sorting takes the interpreter long

Result = tuple[Tensor, Tensor]  # scores [B, k] fp32, rows [B, k] int64


@triton.jit
def ordered(score):
    """fp32 as int32 of the same order; NaN is largest, as torch ranks it."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # −0 becomes +0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score == score, bits, 0x7FFFFFFF)


@triton.jit
def score_of(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def make_key(score, row):
    return (ordered(score).to(tl.int64) << 32) | (0xFFFFFFFF - row.to(tl.int64))


@triton.jit
def row_of(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit(do_not_specialize=["rank"])
def _narrow_kernel(
    hits_ptr,  # [B, C] int64, in and out: a score's bits above a bucket's number
    count_ptr,  # [B] int32: how many were appended, those beyond C dropped; out: how many are left
    flag_ptr,  # [B] int32, set where a hit was dropped
    theta_ptr,  # [B] fp32, out: what a score must not be below
    q_norm_ptr,  # [B] fp32
    q_error_ptr,  # [B] fp32, the norm of what the scan's queries leave out
    norm_ptr,  # [1] fp32, no row's norm is larger
    rank,
    e_a,  # the scan's error, as of scan.Margin
    e_c,
    e_d,
    e_e,
    HAS_ERROR: tl.constexpr,
    C: tl.constexpr,
    PART: tl.constexpr,  # hits that are moved at a time
):
    b = tl.program_id(0)
    hits_ptr += b.to(tl.int64) * C
    count = tl.load(count_ptr + b)
    lanes = tl.arange(0, C)
    halves = hits_ptr.to(tl.pointer_type(tl.int32))  # the upper half of each is a score
    bits = tl.load(halves + 2 * lanes + 1, lanes < count, other=0)
    bits = tl.where(lanes < count, ordered(bits.to(tl.float32, bitcast=True)), -(1 << 31))
    least = tl.full((), -(1 << 31), tl.int32)  # the largest number that `rank` scores reach
    for bit in tl.static_range(32):
        more = least ^ tl.full((), (1 << 31) >> bit, tl.int64).to(tl.int32)
        least = tl.where(tl.sum((bits >= more).to(tl.int32)) >= rank, more, least)
    q, x = tl.load(q_norm_ptr + b), tl.load(norm_ptr)
    bounded = (x < float("inf")) & (q < float("inf"))
    q, x = tl.where(bounded, q, 0.0), tl.where(bounded, x, 0.0)
    error = e_a + e_c * q * q + e_d * q * x + e_e * x * x
    if HAS_ERROR:
        error += tl.load(q_error_ptr + b) * x
    bounded &= least != -(1 << 31)
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


@triton.jit(do_not_specialize=["C", "k", "stride_sb", "stride_ob"])
def _decode_kernel(
    keys_ptr,  # [B, C] int64
    ids_ptr,  # [N] int64, what a result calls a row
    scores_ptr,  # [B, k] fp32
    out_ptr,  # [B, k] int64
    C,
    k,
    stride_sb,  # in elements, as the next
    stride_ob,
    HAS_IDS: tl.constexpr,
    SORT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    keys = tl.load(keys_ptr + b * C + lanes, lanes < C, other=EMPTY)
    if SORT:
        keys = tl.sort(keys, descending=True)
    there = keys != EMPTY
    rows = row_of(keys)
    if HAS_IDS:
        rows = tl.load(ids_ptr + rows, there & (lanes < k), other=0)
    score = tl.where(there, score_of((keys >> 32).to(tl.int32)), -float("inf"))
    tl.store(scores_ptr + b * stride_sb + lanes, score, lanes < k)
    tl.store(out_ptr + b * stride_ob + lanes, tl.where(there, rows, -1), lanes < k)


def narrow(
    hits: Tensor, count: Tensor, flag: Tensor, theta: Tensor, q_norms: Tensor,
    q_errors: Tensor | None, norm: Tensor, rank: int, margin: tuple[float, ...],
) -> None:  # fmt: skip
    """Cuts each query's buffer ``[B, C]`` to what may be among its ``rank`` best, where the scan
    may be wrong by a margin, and by ``q_errors`` times the largest norm."""
    C = hits.shape[1]
    _narrow_kernel[(len(hits),)](
        hits, count, flag, theta, q_norms, q_errors, norm, rank, *margin,
        HAS_ERROR=q_errors is not None, C=C, PART=min(C, 4096), num_warps=narrow_warps(C),
    )  # fmt: skip


def narrow_warps(C: int) -> int:
    return min(16, max(4, C // 1024))  # 32 hits a thread


def select(keys: Tensor, result: Result, ids: Tensor | None = None) -> None:
    """The best of each query's keys ``[B, C]``, in order, to ``result``, ``[B, k]`` each."""
    (B, C), k = keys.shape, result[0].shape[1]
    if not B * k:
        return
    sort = max(C, k) <= (SORTED_INTERPRETED if interpreted() else SORTED_AT_ONCE)
    if not sort:
        keys = keys.topk(min(k, C), dim=1).values  # keys differ: there is one answer
    block = triton.next_power_of_2(max(C, k, 16)) if sort else 1024
    _decode_kernel[(B, 1 if sort else triton.cdiv(k, block))](
        keys, ids, *result, keys.shape[1], k, result[0].stride(0), result[1].stride(0),
        HAS_IDS=ids is not None, SORT=sort, BLOCK_C=block, num_warps=4 if block <= 1024 else 8,
    )  # fmt: skip


def scores_of(keys: Tensor) -> Tensor:
    """fp32, −inf where there is no row."""
    bits = keys >> 32
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
    return torch.where(keys == EMPTY.value, -torch.inf, score)


def empty(q: Tensor, k: int) -> Result:
    """Room for a result, all of which will be written."""
    return (
        torch.empty(len(q), k, dtype=torch.float32, device=q.device),
        torch.empty(len(q), k, dtype=torch.int64, device=q.device),
    )
