"""The most probable class of every nested prefix and its probability, with no logits in memory.

One program owns BLOCK_B × BLOCK_V scores and keeps, at each slab's end, a row's best score, its
first class and the sum of exponentials relative to it; the host takes the best of the tiles.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.shared.tiling import (
    CONFIGS,
    add_block,
    alignment,
    cdiv,
    chunks,
    config,
    operand,
    precision,
    row_step,
    schedule_of,
    tile_of,
)
from torch import Tensor


@triton.jit(do_not_specialize=["B", "V", "steps"])
def _predict_kernel(
    x_ptr,  # [B, D]
    w_ptr,  # [V, D]
    bias_ptr,  # [V]
    schedule_ptr,  # [steps, 4] int16
    max_ptr,  # [G, tiles, B] fp32, as the next
    sum_ptr,
    label_ptr,  # [G, tiles, B] int32
    B,
    V,
    steps,
    stride_xb,  # in elements, as the next; last axes are contiguous
    stride_wv,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, mask_v, classes = tile_of(0, V, BLOCK_V)
    offs_b, mask_b, rows = tile_of(1, B, BLOCK_B)
    tile = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + classes).to(tl.float32)[None, :]
    for step in range(steps):
        acc = add_block(
            acc, x_ptr, w_ptr, schedule_ptr, step, rows, classes, stride_xb, stride_wv,
            BLOCK_D, ALIGNMENT, PRECISION,
        )  # fmt: skip
        g = tl.load(schedule_ptr + step * 4 + 3).to(tl.int64)
        if g >= 0:
            z = tl.where(mask_v[None, :], acc, -float("inf"))
            top = tl.max(z, axis=1)
            shift = tl.where(top == -float("inf"), 0.0, top)  # a tile may hold no finite score
            total = tl.sum(tl.exp(z - shift[:, None]), axis=1)
            lane = tl.min(tl.where(z == top[:, None], lanes[None, :], BLOCK_V), axis=1)
            part = (g * tl.num_programs(0) + tile) * B + offs_b
            tl.store(max_ptr + part, top, mask_b)
            tl.store(sum_ptr + part, total, mask_b)
            tl.store(label_ptr + part, tile * BLOCK_V + lane, mask_b)


def predict_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Labels int64 and their softmax fp32, ``[G, B]`` each; of equal scores the first class. A row
    with a score that is NaN has label 0 and confidence NaN, as of ``softmax(-1).max(-1)``."""
    x, weight = operand(x), operand(weight)
    bias = None if bias is None else operand(bias)
    B, V, G = len(x), len(weight), len(dims)
    blocks = config(x, CONFIGS)
    schedule = schedule_of(x, dims, blocks.BLOCK_D)
    tiles = cdiv(V, blocks.BLOCK_V)
    fp32 = dict(dtype=torch.float32, device=x.device)
    labels = torch.empty(G, B, dtype=torch.int64, device=x.device)
    confidence = torch.empty(G, B, **fp32)
    for rows in chunks(B, row_step(24 * G * tiles)):  # six 4-byte values a row, prefix and tile
        part, size = x[rows], rows.stop - rows.start
        part_max, part_sum = (torch.empty(G, tiles, size, **fp32) for _ in range(2))
        part_label = torch.empty(G, tiles, size, dtype=torch.int32, device=x.device)
        _predict_kernel[(tiles, cdiv(size, blocks.BLOCK_B))](
            part, weight, bias, schedule, part_max, part_sum, part_label,
            size, V, len(schedule), part.stride(0), weight.stride(0),
            HAS_BIAS=bias is not None, ALIGNMENT=alignment(dims), PRECISION=precision(x),
            **blocks._asdict(),
        )  # fmt: skip
        top, tile = part_max.max(dim=1)  # the first tile of equal ones
        total = (part_sum * (part_max - top[:, None]).exp()).sum(dim=1)
        confidence[:, rows] = total.reciprocal()
        label = part_label.gather(1, tile[:, None])[:, 0]
        labels[:, rows] = torch.where(total.isnan(), 0, label)
    return labels, confidence
