"""Candidates as int64 keys that sort by (score descending, row ascending), and their selection.

A key holds a score's 32 bits, made to compare as integers do, above the bits of a row or bucket, so
that selecting, sorting and comparing candidates is integer work with one answer.
"""

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.shared.tiling import cdiv, interpreted, next_power_of_2
from torch import Tensor

EMPTY = tl.constexpr(-(1 << 63))  # sorts after every key
SORTED_AT_ONCE = 2048  # keys a program sorts; of more, torch.topk picks first
SORTED_INTERPRETED = 16  # the same in the interpreter, where sorting is slow

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


@triton.jit(do_not_specialize=["C", "k", "stride_sb", "stride_ob"])
def _decode_kernel(
    keys_ptr,  # [B, C] int64
    ids_ptr,  # [N] int64, the rows' ids in a result
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


def select(keys: Tensor, result: Result, ids: Tensor | None = None) -> None:
    """Writes the best of each query's keys ``[B, C]``, in order, to ``result``, ``[B, k]`` each."""
    (B, C), k = keys.shape, result[0].shape[1]
    if not B * k:
        return
    sort = max(C, k) <= (SORTED_INTERPRETED if interpreted() else SORTED_AT_ONCE)
    if not sort:
        keys = keys.topk(min(k, C), dim=1).values  # keys differ: there is one answer
    block = next_power_of_2(max(C, k, 16)) if sort else 1024
    _decode_kernel[(B, 1 if sort else cdiv(k, block))](
        keys, ids, *result, keys.shape[1], k, result[0].stride(0), result[1].stride(0),
        HAS_IDS=ids is not None, SORT=sort, BLOCK_C=block, num_warps=4 if block <= 1024 else 8,
    )  # fmt: skip


def scores_of(keys: Tensor) -> Tensor:
    """The fp32 scores in the keys, −inf where there is no row."""
    bits = keys >> 32
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
    return torch.where(keys == EMPTY.value, -torch.inf, score)


def empty(q: Tensor, k: int) -> Result:
    """Room for a result, all of which will be written."""
    B, device = q.shape[0], q.device
    return (
        torch.empty(B, k, dtype=torch.float32, device=device),
        torch.empty(B, k, dtype=torch.int64, device=device),
    )
