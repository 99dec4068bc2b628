"""Every row scored again for the queries whose buffer overflowed, found and done by the device."""

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.search.keys import EMPTY, make_key
from mrl_fast.kernels.search.pair_scores import ROOMY, ROUNDED, Pairs, pair_blocks, pair_scores
from mrl_fast.kernels.shared.tiling import programs
from torch import Tensor

RESCAN_BYTES = 64 << 20


@triton.jit
def _best_of_both(best, new):
    """Of as many in descending order as there are in no order: as one falls and the other rises,
    the larger of each pair are the best."""
    return tl.sort(tl.maximum(best, tl.sort(new)), descending=True)


@triton.jit(do_not_specialize=["N", "splits", "rows_each"])
def _rescan_kernel(
    q_ptr,  # [B, dim]
    x_ptr,  # [N, dim]
    scale_ptr,
    outer_ptr,
    factor_ptr,  # [B]
    flag_ptr,  # [B] int32
    allowed_ptr,  # [N] uint8
    parts_ptr,  # [B, splits, KEPT] int64: the best of each split
    N,
    splits,
    rows_each,  # a multiple of KEPT
    dim,
    stride_qb,
    stride_xn,
    METRIC: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    KEPT: tl.constexpr,  # at least k
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The best of a split's rows, for queries that are flagged. Their place is also where KEPT new
    keys are gathered, tile by tile, before they are sorted."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    if tl.load(flag_ptr + b) == 0:
        return
    split = tl.program_id(0) % splits
    part_ptr = parts_ptr + tl.program_id(0).to(tl.int64) * KEPT
    first = split.to(tl.int64) * rows_each
    factor = tl.load(factor_ptr + b) if HAS_OUTER else 0.0
    best = tl.full((KEPT,), EMPTY, tl.int64)
    worst = tl.min(best)
    for start in range(0, rows_each, KEPT):
        for tile in range(0, KEPT, ROWS):
            lanes = tile + tl.arange(0, ROWS)
            rows = first + start + lanes
            there = rows < N
            if HAS_ALLOWED:
                there &= tl.load(allowed_ptr + rows, there, other=0) != 0
            score = pair_scores(
                q_ptr + b * stride_qb, x_ptr, scale_ptr, outer_ptr, factor, rows, there,
                tl.zeros((ROWS,), ACC), 0, dim, stride_xn, METRIC, HAS_OUTER, ROWS, BLOCKS, ACC,
            )  # fmt: skip
            tl.store(part_ptr + lanes, tl.where(there, make_key(score, rows), EMPTY))
        tl.debug_barrier()
        new = tl.load(part_ptr + tl.arange(0, KEPT))
        if tl.max(new) > worst:
            best = _best_of_both(best, new)
            worst = tl.min(best)
        tl.debug_barrier()  # before it is written again
    tl.store(part_ptr + tl.arange(0, KEPT), best)


@triton.jit(do_not_specialize=["width", "splits"])
def _merge_kernel(
    parts_ptr,  # [B, splits, KEPT] int64, each in descending order
    flag_ptr,  # [B] int32
    keys_ptr,  # [B, width] int64: the best go first
    width,
    splits,
    KEPT: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    if tl.load(flag_ptr + b) == 0:
        return
    lanes = tl.arange(0, KEPT)
    best = tl.load(parts_ptr + b * splits * KEPT + lanes)
    for split in range(1, splits):
        new = tl.load(parts_ptr + (b * splits + split) * KEPT + lanes)
        if tl.max(new) > tl.min(best):
            best = _best_of_both(best, new)
    tl.store(keys_ptr + b * width + lanes, best)


def rescan(pairs: Pairs, keys: Tensor, flag: Tensor, k: int) -> None:
    """The k best of all rows, for the queries that are flagged, to their keys ``[B, width]``.
    The others cost next to nothing."""
    kept = max(32, triton.next_power_of_2(k))
    B, N = len(keys), len(pairs.x)
    # As many as keep the device busy with one query, or with several within the bytes.
    splits = min(programs(pairs.q), triton.cdiv(N, kept), RESCAN_BYTES // (8 * kept * B))
    parts = torch.empty(B, max(splits, 1), kept, dtype=torch.int64, device=keys.device)
    splits = parts.shape[1]
    rows = triton.cdiv(triton.cdiv(N, splits), kept) * kept
    blocks = pair_blocks(pairs.x, B * N)
    warps = 8 if kept > 512 else 4
    blocks |= {"ROWS": min(blocks["ROWS"], kept), "num_warps": warps}
    _rescan_kernel[(B * splits,)](
        pairs.q, pairs.x, pairs.scale, pairs.outer, pairs.factor, flag, pairs.allowed, parts,
        N, splits, rows, pairs.x.shape[1], pairs.q.stride(0),
        pairs.x.stride(0), KEPT=kept, **pairs.flags, **blocks, **ROOMY, **ROUNDED,
    )  # fmt: skip
    _merge_kernel[(B,)](
        parts, flag, keys, keys.shape[1], splits, KEPT=kept, num_warps=warps
    )  # fmt: skip
