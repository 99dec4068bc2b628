"""Sums of exponentials of nested scores, by rows and by columns, with no scores in memory.

One program owns BLOCK_B × BLOCK_V scores. At each slab's end it folds them into partial sums of
its rows (and columns), relative to its own maxima; the host folds those over the tiles in a fixed
order. Maximum and log-sum stay apart: near probability 1 their sum would leave no digits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.shared.tiling import (
    CONFIGS,
    STORING_CONFIGS,
    Config,
    add_block,
    cdiv,
    chunks,
    row_step,
    tile_of,
)
from mrl_fast.kernels.training.fold import Fold, finite, load_soft, values_of
from torch import Tensor

Statistics = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def softplus(y):
    """log(1 + exp(y)) with every digit where it is small: most negatives of a sigmoid loss are."""
    e = tl.exp(-tl.abs(y))
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s), s <= 1/3
    q = s * s
    series = 1 / 13
    series = series * q + 1 / 11
    series = series * q + 1 / 9
    series = series * q + 1 / 7
    series = series * q + 1 / 5
    series = series * q + 1 / 3
    return tl.maximum(y, 0.0) + 2.0 * (s + s * q * series)


@triton.jit(do_not_specialize=["B", "V", "first", "steps", "stride_rg"])
def _statistics_kernel(
    x_ptr,  # [B, D]
    w_ptr,  # [V, D]
    bias_ptr,  # [width], as all that belongs to columns
    row_scale_ptr,  # [G, B] fp32
    col_scale_ptr,  # [G, width] fp32
    target_ptr,  # [B] int32, −1: none
    own_ptr,  # [width] int32: the target whose own column this is
    soft_ptr,  # [width] or [B, readable]
    mask_ptr,  # [B, readable] bytes
    schedule_ptr,  # [steps, 4] int16
    row_max_ptr,  # [G, tiles, B] fp32, as the next
    row_sum_ptr,
    hit_ptr,  # [G, B] fp32
    soft_sum_ptr,  # [G, tiles, B] fp32
    soft_total_ptr,  # [tiles, B] fp32
    col_max_ptr,  # [G, row tiles, width] fp32, as the next
    col_sum_ptr,
    B,
    V,
    width,  # V up to whole tiles
    readable,  # V up to whole 16
    first,  # class that w's first row is
    steps,
    own_boost,
    other_boost,
    stride_xb,  # in elements, as all strides; last axes are contiguous
    stride_wv,
    stride_rg,
    stride_cg,
    stride_sb,
    stride_mb,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_HIT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SOFT: tl.constexpr,
    OWN: tl.constexpr,
    LINK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_v, mask_v, classes = tile_of(0, V, BLOCK_V)
    offs_b, mask_b, rows = tile_of(1, B, BLOCK_B)
    tile = tl.program_id(0)
    readable = mask_b[:, None] & (offs_v < readable)[None, :]
    target = rows.to(tl.int32)
    if HAS_TARGET:
        target = tl.load(target_ptr + rows)
    lane = target - (first + tile * BLOCK_V)  # in this tile, if >= 0 and < BLOCK_V
    lanes = tl.arange(0, BLOCK_V)
    here = (lane >= 0) & (lane < tl.minimum(V - tile * BLOCK_V, BLOCK_V)) & mask_b
    acc = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    if HAS_BIAS and not HAS_SCALE:
        acc += tl.load(bias_ptr + offs_v).to(tl.float32)[None, :]
    if SOFT != "none":
        soft = load_soft(soft_ptr, offs_v, readable, stride_sb, SOFT, BLOCK_B, BLOCK_V)
        soft_total = tl.sum(soft, axis=1) + tl.zeros((BLOCK_B,), tl.float32)
        tl.store(soft_total_ptr + tile.to(tl.int64) * B + offs_b, soft_total, mask_b)
    for step in range(steps):
        acc = add_block(
            acc, x_ptr, w_ptr, schedule_ptr, step, rows, classes, stride_xb, stride_wv,
            BLOCK_D, ALIGNMENT, PRECISION,
        )  # fmt: skip
        g = tl.load(schedule_ptr + step * 4 + 3).to(tl.int64)
        if g >= 0:
            y = values_of(
                acc, g, rows, offs_v, mask_v, target, readable,
                bias_ptr, row_scale_ptr, col_scale_ptr, own_ptr, mask_ptr,
                first, own_boost, other_boost, stride_rg, stride_cg, stride_mb,
                HAS_BIAS, HAS_SCALE, HAS_TARGET, HAS_MASK, OWN, BLOCK_B, BLOCK_V,
            )  # fmt: skip
            part = (g * tl.num_programs(0) + tile) * B + offs_b
            hit = lanes[None, :] == lane[:, None]
            if HAS_HIT:
                y_target = tl.sum(tl.where(hit, y, 0.0), axis=1)
                tl.store(hit_ptr + g * B + offs_b, y_target, here)
            if not HAS_SCALE:
                y = tl.where(mask_v[None, :], y, -float("inf"))
            if LINK == "sigmoid":
                if HAS_HIT:
                    y = tl.where(hit, -float("inf"), y)
                tl.store(row_sum_ptr + part, tl.sum(softplus(y), axis=1), mask_b)
            else:
                top = tl.max(y, axis=1)
                shift = tl.where(top == -float("inf"), 0.0, top)  # a tile may be excluded whole
                total = tl.sum(tl.exp(y - shift[:, None]), axis=1)
                tl.store(row_max_ptr + part, top, mask_b)
                tl.store(row_sum_ptr + part, total, mask_b)
                if SOFT != "none":
                    soft = load_soft(soft_ptr, offs_v, readable, stride_sb, SOFT, BLOCK_B, BLOCK_V)
                    shifted = tl.where(soft == 0.0, 0.0, y - shift[:, None])  # no 0 · −inf
                    tl.store(soft_sum_ptr + part, tl.sum(soft * shifted, axis=1), mask_b)
                if COLUMNS:
                    y = tl.where(mask_b[:, None], y, -float("inf"))
                    top = tl.max(y, axis=0)
                    shift = tl.where(top == -float("inf"), 0.0, top)
                    total = tl.sum(tl.exp(y - shift[None, :]), axis=0)
                    part = (g * tl.num_programs(1) + tl.program_id(1)) * width + offs_v
                    tl.store(col_max_ptr + part, top)
                    tl.store(col_sum_ptr + part, total)


def configs(flags: dict[str, Any]) -> dict[int, Config]:
    """Shapes of tiles by the width of an element, for a kernel with these flags: narrower where it
    keeps more than scores and exponentials."""
    extra = flags["HAS_BIAS"] or flags["SOFT"] != "none"  # beside scales
    light = not (flags["HAS_SCALE"] and extra or flags["HAS_MASK"] or flags["COLUMNS"])
    light = light and flags["OWN"] == "none" and flags["SOFT"] != "matrix"
    if not light or flags["LINK"] == "sigmoid":
        return STORING_CONFIGS
    multiply_adds = flags["HAS_SCALE"] and flags["PRECISION"] == "ieee"  # of fp32, from registers
    return CONFIGS | ({4: STORING_CONFIGS[4]} if multiply_adds else {})


def merged(part_max: Tensor, part_sum: Tensor) -> tuple[Tensor, Tensor]:
    """``[G, tiles, n]`` → ``[G, n]``: the maximum, and the sum relative to it, fp64."""
    top = part_max.amax(dim=1)
    return top, (part_max - finite(top)[:, None]).double().exp_().mul_(part_sum).sum(dim=1)


def log_sum(total: Tensor) -> Tensor:
    return total.where(total != 0, 1.0).log()  # 0 where everything was excluded; NaN stays


def fold_forward(spec: Any) -> Statistics:
    """Row maximum and log Σ_j exp(y − maximum); log-probability of the target; Σ_j soft ·
    log-probability (fp64); each ``[G, B]``. Column maximum and log-sum, ``[G, V]``. What is not
    asked for is None. For the fields of ``spec`` see ``Fold``.

    With link "sigmoid": 0, Σ softplus(y) over the columns but the target, logsigmoid(y) there.
    """
    fold = Fold(spec, configs)
    soft, columns, sigmoid = spec.soft is not None, spec.columns, spec.link == "sigmoid"
    fp32 = dict(dtype=torch.float32, device=spec.x.device)
    fp64 = fp32 | dict(dtype=torch.float64)
    B, V, G = fold.B, fold.V, len(spec.dims)
    tiles = cdiv(V, fold.blocks.BLOCK_V)
    row_max, row_log = (torch.zeros(G, B, **fp32) for _ in range(2))
    # NaN where the target is no class, as nothing writes those
    hit = torch.full((G, B), torch.nan, **fp32) if fold.flags["HAS_HIT"] else None
    soft_sum = torch.empty(G, B, **fp64) if soft else None
    width = tiles * fold.blocks.BLOCK_V
    col_max = torch.full((G, width), -torch.inf, **fp32) if columns else None
    col_sum = torch.zeros(G, width, **fp64) if columns else None

    col_log = None
    partials = tiles + (cdiv(V, fold.blocks.BLOCK_B) if columns else 0)
    row_bytes = 32 * G * partials + fold.copied_bytes() * V  # eight values a row, prefix and tile
    for rows in chunks(B, row_step(row_bytes)):
        size = rows.stop - rows.start
        grid = fold.grid(rows, slice(0, V))
        part_max, part_sum, part_soft = (
            torch.empty(G, tiles, size, **fp32) if wanted else None
            for wanted in (not sigmoid, True, soft)
        )
        part_col_max, part_col_sum = (
            torch.empty(G, grid[1], width, **fp32) if columns else None for _ in range(2)
        )
        soft_total = torch.empty(tiles, size, **fp32) if soft else None
        y_target = None if hit is None else torch.full((G, size), torch.nan, **fp32)
        _statistics_kernel[grid](
            **fold.arguments(rows, slice(0, V)),
            row_max_ptr=part_max, row_sum_ptr=part_sum, hit_ptr=y_target,
            soft_sum_ptr=part_soft, soft_total_ptr=soft_total,
            col_max_ptr=part_col_max, col_sum_ptr=part_col_sum,
        )  # fmt: skip
        if sigmoid:
            row_log[:, rows] = part_sum.sum(dim=1)
            if hit is not None:
                hit[:, rows] = torch.nn.functional.logsigmoid(y_target)
            continue
        top, total = merged(part_max, part_sum)
        row_max[:, rows], row_log[:, rows] = top, log_sum(total)
        top = finite(top)
        if hit is not None:
            hit[:, rows] = (y_target - top) - row_log[:, rows]
        if soft:
            # A tile's sum is relative to its own maximum: Σ soft·(y − max_t), then max_t − top
            above = finite(part_max).sub_(top[:, None])
            relative = (part_soft.double() + soft_total * above.double()).sum(dim=1)
            all_soft = soft_total.sum(dim=0, dtype=torch.float64)
            soft_sum[:, rows] = relative - all_soft * log_sum(total)
        if columns:
            col_max, col_sum = merged(
                torch.cat([col_max[:, None], part_col_max], dim=1),
                torch.cat([col_sum[:, None], part_col_sum], dim=1),
            )
    if columns:
        col_max, col_log = col_max[:, :V].contiguous(), log_sum(col_sum[:, :V]).float()
    return row_max, row_log, hit, soft_sum, col_max, col_log
