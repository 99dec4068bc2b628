"""out[g, b, v] = x[b, :d_g] · weight[v, :d_g] + bias[v] for every prefix, in one pass over columns.

One program owns BLOCK_B × BLOCK_V scores and stores them at each slab's end; x and weight are read
once a tile, not once a prefix.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.shared import tiling
from mrl_fast.kernels.shared.tiling import (
    STORING_CONFIGS,
    add_block,
    alignment,
    cdiv,
    chunks,
    config,
    operand,
    precision,
    schedule_of,
    score_offsets,
    tile_of,
)
from mrl_fast.kernels.training.products import Wanted, nested_gradients
from torch import Tensor


@triton.jit(do_not_specialize=["B", "all_rows", "steps"])
def _nested_logits_kernel(
    x_ptr,  # [B, D]
    w_ptr,  # [V, D]
    bias_ptr,  # [V]
    out_ptr,  # [G, >= B, V]
    schedule_ptr,  # [steps, 4] int16
    B,
    V,
    all_rows,  # of a prefix's scores
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
    offs_v, mask_v, classes = tile_of(0, V, BLOCK_V)
    offs_b, mask_b, rows = tile_of(1, B, BLOCK_B)
    begin, offsets = score_offsets(V, BLOCK_B, BLOCK_V)
    out_ptr += begin
    plane = (tl.zeros((), tl.int64) + all_rows) * V  # scores of a prefix
    acc = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + classes).to(tl.float32)[None, :]
    for step in range(steps):
        acc = add_block(
            acc, x_ptr, w_ptr, schedule_ptr, step, rows, classes, stride_xb, stride_wv,
            BLOCK_D, ALIGNMENT, PRECISION,
        )  # fmt: skip
        g = tl.load(schedule_ptr + step * 4 + 3).to(tl.int32)
        if g >= 0:
            tl.store(
                out_ptr + plane * g + offsets,
                acc.to(out_ptr.dtype.element_ty),
                mask_b[:, None] & mask_v[None, :],
            )


def logits_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> Tensor:  # [G, B, V]
    dtype, x, weight = x.dtype, operand(x), operand(weight)
    bias = None if bias is None else operand(bias)
    (B, _), V = x.shape, len(weight)
    blocks = config(x, STORING_CONFIGS)
    schedule = schedule_of(x, dims, blocks.BLOCK_D)
    out = x.new_empty(len(dims), B, V)
    for rows in chunks(B, tiling.MOST_ROWS):
        size = rows.stop - rows.start
        _nested_logits_kernel[(cdiv(V, blocks.BLOCK_V), cdiv(size, blocks.BLOCK_B))](
            x[rows], weight, bias, out[:, rows], schedule, size, V, B, len(schedule),
            x.stride(0), weight.stride(0),
            HAS_BIAS=bias is not None, ALIGNMENT=alignment(dims), PRECISION=precision(x),
            **blocks._asdict(),
        )  # fmt: skip
    return out.to(dtype)


def logits_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    def suffix_sums(rows: slice, classes: slice) -> Iterator[Tensor]:
        suffix = torch.zeros_like(grad[0, rows, classes], dtype=torch.float32)
        for part in reversed(grad[:, rows, classes].unbind()):
            suffix += part
            yield suffix

    bytes_a_score = 4 + x.element_size()  # the sum, and the sum rounded
    one = torch.ones((), dtype=torch.float32, device=x.device)
    wanted = Wanted(x.dtype, weight.dtype, bias is not None)
    dx, dw, db = nested_gradients(x, weight, dims, bytes_a_score, suffix_sums, one, wanted)
    return dx, dw, None if bias is None or db is None else db.to(bias.dtype)
