"""Log-probabilities of every nested prefix and their gradients, with no logits in memory.

Forward: one program owns BLOCK_B × BLOCK_V scores and, at each slab's end, folds them into one
maximum and one sum of exponentials a row; the host folds those over the tiles. Backward: the same
programs compute the same scores again and write each prefix's gradient A_g to a workspace of a
chunk of rows, then re-read their own tiles from the widest prefix down and make them the suffix
sums T_g = Σ_{h >= g} A_h, which two matrix products a slab turn into the gradients of x and weight.

The maximum and the log-sum stay apart, and 1 − p is taken in fp32 before anything is rounded:
near p = 1 either shortcut would leave no digits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.tiling import (
    STORING_CONFIGS,
    add_block,
    alignment,
    config,
    make_schedule,
    operand,
    precision,
    product,
    row_chunks,
    score_offsets,
    slabs,
    tile_of,
)
from torch import Tensor


@triton.jit
def _statistics_kernel(
    x_ptr,  # [B, D]
    w_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # [B] int64
    soft_ptr,  # [V] fp32
    schedule_ptr,  # [steps, 4] int32
    max_ptr,  # [G, tiles, B] fp32, as the next and the last
    sum_ptr,
    z_target_ptr,  # [G, B] fp32
    soft_sum_ptr,
    B,
    V,
    steps,
    stride_xb,  # in elements, as the next; last axes are contiguous
    stride_wv,
    HAS_BIAS: tl.constexpr,
    HAS_SOFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_v, mask_v, classes = tile_of(0, V, BLOCK_V)
    offs_b, mask_b, rows = tile_of(1, B, BLOCK_B)
    tile = tl.program_id(0)
    lane = (tl.load(target_ptr + rows) - tile * BLOCK_V).to(
        tl.int32
    )  # in this tile, if >= 0 and < BLOCK_V
    lanes = tl.arange(0, BLOCK_V)
    here = (lane >= 0) & (lane < BLOCK_V) & mask_b
    acc = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + classes).to(tl.float32)[None, :]
    if HAS_SOFT:
        soft = tl.load(soft_ptr + offs_v, mask_v, other=0.0)
    for step in range(steps):
        acc = add_block(
            acc, x_ptr, w_ptr, schedule_ptr, step, rows, classes, stride_xb, stride_wv,
            BLOCK_D, ALIGNMENT, PRECISION,
        )  # fmt: skip
        g = tl.load(schedule_ptr + step * 4 + 3)
        if g >= 0:
            z = tl.where(mask_v[None, :], acc, -float("inf"))
            top = tl.max(z, axis=1)
            total = tl.sum(tl.exp(z - top[:, None]), axis=1)
            z_target = tl.sum(tl.where(lanes[None, :] == lane[:, None], acc, 0.0), axis=1)
            part = (g.to(tl.int64) * tl.num_programs(0) + tile) * B + offs_b
            tl.store(max_ptr + part, top, mask_b)
            tl.store(sum_ptr + part, total, mask_b)
            tl.store(z_target_ptr + g.to(tl.int64) * B + offs_b, z_target, here)
            if HAS_SOFT:
                shifted = (acc - top[:, None]) * soft[None, :]
                tl.store(soft_sum_ptr + part, tl.sum(shifted, axis=1), mask_b)


@triton.jit
def _score_gradients_kernel(
    x_ptr,  # [B, D], a chunk of the rows
    w_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # [B] int64
    soft_ptr,  # [V] fp32
    schedule_ptr,  # [steps, 4] int32
    row_max_ptr,  # [G, B] fp32 with row stride stride_g, as the next four
    log_sum_ptr,
    d_target_ptr,
    soft_scale_ptr,
    d_soft_ptr,
    out_ptr,  # [G, B, V], contiguous: A_g, then T_g
    B,
    V,
    G,
    steps,
    stride_xb,  # in elements, as all strides; last axes are contiguous
    stride_wv,
    stride_g,
    HAS_BIAS: tl.constexpr,
    HAS_SOFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_v, mask_v, classes = tile_of(0, V, BLOCK_V)
    offs_b, mask_b, rows = tile_of(1, B, BLOCK_B)
    lane = (tl.load(target_ptr + rows) - tl.program_id(0) * BLOCK_V).to(tl.int32)  # in this tile
    lanes = tl.arange(0, BLOCK_V)
    mask = mask_b[:, None] & mask_v[None, :]
    begin, offsets = score_offsets(V, BLOCK_B, BLOCK_V)
    out_ptr += begin
    plane = (tl.zeros((), tl.int64) + B) * V  # scores of a prefix
    acc = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + classes).to(tl.float32)[None, :]
    if HAS_SOFT:
        soft = tl.load(soft_ptr + offs_v, mask_v, other=0.0)
    for step in range(steps):
        acc = add_block(
            acc, x_ptr, w_ptr, schedule_ptr, step, rows, classes, stride_xb, stride_wv,
            BLOCK_D, ALIGNMENT, PRECISION,
        )  # fmt: skip
        g = tl.load(schedule_ptr + step * 4 + 3)
        if g >= 0:
            at = g.to(tl.int64) * stride_g + rows
            shifted = acc - tl.load(row_max_ptr + at)[:, None]
            p = tl.exp(shifted - tl.load(log_sum_ptr + at)[:, None])
            # A = d_target·(δ − p) + d_soft·soft − soft_scale·p, with soft_scale = d_soft·Σsoft
            d_target = tl.load(d_target_ptr + at)
            hit = lanes[None, :] == lane[:, None]
            grad = d_target[:, None] * (tl.where(hit, 1.0, 0.0) - p)
            if HAS_SOFT:
                grad -= tl.load(soft_scale_ptr + at)[:, None] * p
                grad += tl.load(d_soft_ptr + at)[:, None] * soft[None, :]
            tl.store(out_ptr + plane * g + offsets, grad.to(out_ptr.dtype.element_ty), mask)
    tl.debug_barrier()  # a tile is re-read by the program that wrote it
    out_ptr += plane * (G - 1)
    suffix = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for _ in range(G):
        suffix += tl.load(out_ptr + offsets, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, suffix.to(out_ptr.dtype.element_ty), mask)
        out_ptr -= plane


def cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    soft: Tensor | None,
    dims: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Row maximum, log Σ exp(z − maximum), target's and soft targets' log-probability: each
    ``[G, B]`` fp32."""
    x, weight = operand(x), operand(weight)
    (B, _), V, G = x.shape, len(weight), len(dims)
    blocks = config(x)
    schedule = make_schedule(dims, blocks.BLOCK_D, x.device)
    tiles = triton.cdiv(V, blocks.BLOCK_V)
    part_max, part_sum = (torch.empty(G, tiles, B, device=x.device) for _ in range(2))
    part_soft = None if soft is None else torch.empty_like(part_sum)
    z_target = torch.empty(G, B, device=x.device)
    if B:
        _statistics_kernel[(tiles, triton.cdiv(B, blocks.BLOCK_B))](
            x, weight, bias, target, soft, schedule, part_max, part_sum, z_target, part_soft,
            B, V, len(schedule), x.stride(0), weight.stride(0),
            HAS_BIAS=bias is not None, HAS_SOFT=soft is not None,
            ALIGNMENT=alignment(dims), PRECISION=precision(x), **blocks._asdict(),
        )  # fmt: skip
    row_max = part_max.amax(dim=1)
    log_sum = (part_sum * (part_max - row_max[:, None]).exp()).sum(dim=1).log()
    logp_target = (z_target - row_max) - log_sum
    if soft is None or part_soft is None:
        return row_max, log_sum, logp_target, None
    # A tile's sum is relative to its own maximum: Σ soft·(z − max_t) + Σ_t soft·(max_t − row_max)
    pad = tiles * blocks.BLOCK_V - V
    soft_tiles = torch.nn.functional.pad(soft, (0, pad)).view(tiles, -1).sum(1)[:, None]
    relative = part_soft + soft_tiles * (part_max - row_max[:, None])
    logp_soft = relative.sum(dim=1) - soft_tiles.sum() * log_sum
    return row_max, log_sum, logp_target, logp_soft


def cross_entropy_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    soft: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    dims: Sequence[int],
    d_target: Tensor,
    d_soft: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients from those of the two log-probabilities, ``[G, B]`` fp32 each."""
    dtype, weight_dtype, x, weight = x.dtype, weight.dtype, operand(x), operand(weight)
    (B, _), V, G = x.shape, len(weight), len(dims)
    blocks = config(x, STORING_CONFIGS)
    schedule = make_schedule(dims, blocks.BLOCK_D, x.device)
    has_soft = soft is not None and d_soft is not None
    # Half-precision tiles hold gradients relative to the largest: 1/n must not flush them to zero.
    sources = [d_target, d_soft * soft.sum(), d_soft] if has_soft else [d_target]
    largest = torch.stack([d.abs().amax() for d in sources]).amax() if B else d_target.sum()
    scale = torch.where(largest > 0, largest, 1.0)
    scaled = [(d / scale).contiguous() for d in sources]

    dx = torch.zeros_like(x)
    dw = torch.zeros_like(weight, dtype=torch.float32)
    db = torch.zeros(V, device=x.device)
    for chunk in row_chunks(B, G * V * x.element_size()):
        part, size = x[chunk], chunk.stop - chunk.start
        suffix = torch.empty(G, size, V, dtype=x.dtype, device=x.device)  # A_g, then T_g
        grid = triton.cdiv(V, blocks.BLOCK_V), triton.cdiv(size, blocks.BLOCK_B)
        _score_gradients_kernel[grid](
            part, weight, bias, target[chunk], soft, schedule,
            row_max[:, chunk], log_sum[:, chunk], scaled[0][:, chunk],
            scaled[1][:, chunk] if has_soft else None, scaled[2][:, chunk] if has_soft else None,
            suffix,
            size, V, G, len(schedule), part.stride(0), weight.stride(0), B,
            HAS_BIAS=bias is not None, HAS_SOFT=has_soft,
            ALIGNMENT=alignment(dims), PRECISION=precision(x), **blocks._asdict(),
        )  # fmt: skip
        for g, slab in enumerate(slabs(dims)):
            dx[chunk, slab] = (product(suffix[g], weight[:, slab]) * scale).to(x.dtype)
            dw[:, slab] += product(suffix[g].T, part[:, slab])
        db += suffix[0].sum(0, dtype=torch.float32)
    dw, db = dw.mul_(scale).to(weight_dtype), db.mul_(scale)
    return dx.to(dtype), dw, None if bias is None else db.to(bias.dtype)
