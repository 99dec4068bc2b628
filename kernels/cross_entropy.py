"""Log-probabilities of every nested prefix and their gradients, with no logits in memory.

Forward: one program owns BLOCK_B × BLOCK_V scores and, at each slab's end, folds them into one
maximum and one sum of exponentials a row; the host folds those over the tiles. Backward: the same
programs compute the same scores again and write each prefix's gradient A_g to a workspace of a
chunk of scores, then re-read their own tiles from the widest prefix down and make them the suffix
sums T_g = Σ_{h >= g} A_h, which two matrix products a slab turn into the gradients of x and weight.

The maximum and the log-sum stay apart, and 1 − p is taken in fp32 before anything is rounded:
near p = 1 either shortcut would leave no digits.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.gradients import nested_gradients
from mrl_fast.kernels.tiling import (
    STORING_CONFIGS,
    add_block,
    alignment,
    chunks,
    config,
    make_schedule,
    operand,
    precision,
    row_step,
    score_offsets,
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
    schedule_ptr,  # [steps, 4] int16
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
    here = (lane >= 0) & (lane < tl.minimum(V - tile * BLOCK_V, BLOCK_V)) & mask_b
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
        g = tl.load(schedule_ptr + step * 4 + 3).to(tl.int32)
        if g >= 0:
            z = tl.where(mask_v[None, :], acc, -float("inf"))
            top = tl.max(z, axis=1)
            shift = tl.where(top == -float("inf"), 0.0, top)  # a tile may hold no finite score
            total = tl.sum(tl.exp(z - shift[:, None]), axis=1)
            z_target = tl.sum(tl.where(lanes[None, :] == lane[:, None], acc, 0.0), axis=1)
            part = (g.to(tl.int64) * tl.num_programs(0) + tile) * B + offs_b
            tl.store(max_ptr + part, top, mask_b)
            tl.store(sum_ptr + part, total, mask_b)
            tl.store(z_target_ptr + g.to(tl.int64) * B + offs_b, z_target, here)
            if HAS_SOFT:
                shifted = (acc - shift[:, None]) * soft[None, :]
                tl.store(soft_sum_ptr + part, tl.sum(shifted, axis=1), mask_b)


@triton.jit
def _score_gradients_kernel(
    x_ptr,  # [B, D], a chunk of the rows
    w_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # [B] int64
    soft_ptr,  # [V] fp32
    schedule_ptr,  # [steps, 4] int16
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
        g = tl.load(schedule_ptr + step * 4 + 3).to(tl.int32)
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
    x, weight, bias, soft = (None if t is None else operand(t) for t in (x, weight, bias, soft))
    target = target.contiguous()
    B, V, G = len(x), len(weight), len(dims)
    blocks = config(x)
    schedule = make_schedule(dims, blocks.BLOCK_D, x.device)
    tiles = triton.cdiv(V, blocks.BLOCK_V)
    row_max, log_sum, logp_target = (torch.empty(G, B, device=x.device) for _ in range(3))
    logp_soft = None if soft is None else torch.empty_like(log_sum)
    if soft is not None:
        padded = torch.nn.functional.pad(soft, (0, tiles * blocks.BLOCK_V - V))
        soft_tiles = padded.view(tiles, -1).sum(1)[:, None]  # [tiles, 1]
    for rows in chunks(B, row_step(24 * G * tiles)):  # six fp32 values a row, prefix and tile
        part, size = x[rows], rows.stop - rows.start
        part_max, part_sum = (torch.empty(G, tiles, size, device=x.device) for _ in range(2))
        part_soft = None if soft is None else torch.empty_like(part_sum)
        # a target that is no class is nobody's: NaN, not whatever stood there
        z_target = torch.full((G, size), torch.nan, device=x.device)
        _statistics_kernel[(tiles, triton.cdiv(size, blocks.BLOCK_B))](
            part, weight, bias, target[rows], soft, schedule,
            part_max, part_sum, z_target, part_soft,
            size, V, len(schedule), part.stride(0), weight.stride(0),
            HAS_BIAS=bias is not None, HAS_SOFT=soft is not None,
            ALIGNMENT=alignment(dims), PRECISION=precision(x), **blocks._asdict(),
        )  # fmt: skip
        top = part_max.amax(dim=1)
        above = part_max - top[:, None]  # <= 0
        total = (part_sum * above.exp()).sum(dim=1).log()
        row_max[:, rows], log_sum[:, rows] = top, total
        logp_target[:, rows] = (z_target - top) - total
        if soft is not None:
            # A tile's sum is relative to its own maximum: Σ soft·(z − max_t), then max_t − top
            relative = part_soft.addcmul_(soft_tiles, above).sum(dim=1)
            logp_soft[:, rows] = relative - soft_tiles.sum() * total
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
    dtype, weight_dtype = x.dtype, weight.dtype
    bias_dtype = None if bias is None else bias.dtype
    x, weight, bias, soft = (None if t is None else operand(t) for t in (x, weight, bias, soft))
    target = target.contiguous()
    B, G = len(x), len(dims)
    blocks = config(x, STORING_CONFIGS)
    schedule = make_schedule(dims, blocks.BLOCK_D, x.device)
    # Half-precision tiles hold gradients relative to the largest: 1/n must not flush them to zero.
    sources = [d_target]
    if soft is not None and d_soft is not None:
        sources += [d_soft * soft.sum(), d_soft]
    largest = torch.stack([d.abs().amax() for d in sources]).amax() if B else d_target.sum()
    scale = torch.where(largest > 0, largest, 1.0)
    scaled = [(d / scale).contiguous() for d in sources] + [None] * (3 - len(sources))
    statistics = [row_max, log_sum, *scaled]  # [G, B]
    workspace = torch.empty(0, dtype=x.dtype, device=x.device)

    def suffix_sums(rows: slice, classes: slice) -> Iterator[Tensor]:
        nonlocal workspace
        part, w = x[rows], weight[classes]
        shape = G, len(part), len(w)
        if workspace.numel() < math.prod(shape):  # the first chunk is the largest
            workspace = x.new_empty(math.prod(shape))
        out = workspace[: math.prod(shape)].view(shape)  # A_g, then T_g
        grid = triton.cdiv(len(w), blocks.BLOCK_V), triton.cdiv(len(part), blocks.BLOCK_B)
        _score_gradients_kernel[grid](
            part, w, None if bias is None else bias[classes], target[rows] - classes.start,
            None if soft is None else soft[classes], schedule,
            *(None if s is None else s[:, rows] for s in statistics), out,
            len(part), len(w), G, len(schedule), part.stride(0), w.stride(0), B,
            HAS_BIAS=bias is not None, HAS_SOFT=len(sources) > 1,
            ALIGNMENT=alignment(dims), PRECISION=precision(x), **blocks._asdict(),
        )  # fmt: skip
        return reversed(out.unbind())

    bytes_a_score = G * x.element_size()
    dx, dw, db = nested_gradients(x, weight, dims, bytes_a_score, suffix_sums, scale)
    return dx.to(dtype), dw.to(weight_dtype), None if bias is None else db.to(bias_dtype)
