"""Gradients of the fold: scores are made again, prefix by prefix, and turn into their gradients.

Each program writes A_g = dL/dS_g of its tile to a workspace that holds a chunk of the scores, then
re-reads its own tiles from the widest prefix down and turns them into the suffix sums
T_g = Σ_{h >= g} A_h, from which two matrix products a slab make the gradients of x and weight. The
gradients of the scales and of the bias are written as partial sums, one a tile.

At a target, 1 − p is taken in fp32 before anything is rounded: near p = 1 no digits would be left.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.shared.tiling import (
    MASKING_CONFIGS,
    STORING_CONFIGS,
    Config,
    add_block,
    score_offsets,
    stored,
    tile_of,
)
from mrl_fast.kernels.training.fold import Fold, by_class, finite, load_soft, values_of
from mrl_fast.kernels.training.products import Wanted, nested_gradients
from torch import Tensor

# Half-precision workspaces hold gradients relative to the largest, which becomes this: fp16 keeps
# eight more powers of two below it, and has as many above for the sums.
LARGEST = 256.0
UNUSUAL = 1e9  # larger scales are of vectors with (almost) no norm: no measure for the others

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def sigmoid(y):
    e = tl.exp(-tl.abs(y))  # <= 1
    return tl.where(y < 0.0, e, 1.0) / (1.0 + e)


@triton.jit(do_not_specialize=["B", "V", "G", "first", "steps", "stride_rg"])
def _score_gradients_kernel(
    x_ptr,  # [B, D], a chunk of the rows
    w_ptr,  # [V, D], a chunk of the classes
    bias_ptr,  # [width], as all that belongs to columns
    row_scale_ptr,  # [G, B] fp32
    col_scale_ptr,  # [G, width] fp32
    target_ptr,  # [B] int32, −1: none
    own_ptr,  # [width] int32: the target whose own column this is
    soft_ptr,  # [width] or [B, readable]
    mask_ptr,  # [B, readable] bytes
    schedule_ptr,  # [steps, 4] int16
    row_max_ptr,  # [G, B] fp32, as the next four
    row_log_ptr,
    d_row_ptr,  # factor of P, or of the sigmoid
    d_target_ptr,  # what the target gets beside d_row · (P − 1); with LINK "sigmoid" d_hit
    d_soft_ptr,
    col_max_ptr,  # [G, width] fp32, as the next two
    col_log_ptr,
    d_col_ptr,
    unit_ptr,  # [] fp32: multiplies A
    out_ptr,  # [G, B, width], contiguous: A_g, then T_g
    d_row_scale_ptr,  # [G, tiles, B] fp32
    d_col_scale_ptr,  # [G, row tiles, width] fp32, as the next
    db_ptr,
    B,
    V,
    G,
    width,  # V up to whole tiles
    readable,  # V up to whole 16
    first,  # class that w's first row is
    steps,
    own_boost,
    other_boost,
    limit,
    stride_xb,  # in elements, as all strides; last axes are contiguous
    stride_wv,
    stride_rg,  # of every [G, B]
    stride_cg,  # of every [G, width]
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
    begin, offsets = score_offsets(width, BLOCK_B, BLOCK_V)
    out_ptr += begin
    plane = (tl.zeros((), tl.int64) + B) * width  # scores of a prefix
    acc = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    if HAS_BIAS and not HAS_SCALE:
        acc += tl.load(bias_ptr + offs_v).to(tl.float32)[None, :]
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
            at = g * stride_rg + rows
            hit = lanes[None, :] == lane[:, None]
            d_row = tl.load(d_row_ptr + at)[:, None]
            if LINK == "sigmoid":
                if HAS_HIT:
                    d_target = tl.load(d_target_ptr + at)[:, None]
                    grad = tl.where(hit, d_target, d_row) * sigmoid(tl.where(hit, -y, y))
                else:
                    grad = d_row * sigmoid(y)
            else:
                shifted = y - tl.load(row_max_ptr + at)[:, None]
                p = tl.exp(shifted - tl.load(row_log_ptr + at)[:, None])
                if HAS_HIT:
                    p -= tl.where(hit, 1.0, 0.0)
                grad = d_row * p
                if HAS_HIT:
                    rest = tl.load(d_target_ptr + at)[:, None]
                if COLUMNS:
                    at_col = g * stride_cg + offs_v
                    shifted = y - tl.load(col_max_ptr + at_col)[None, :]
                    p = tl.exp(shifted - tl.load(col_log_ptr + at_col)[None, :])
                    d_col = tl.load(d_col_ptr + at_col)[None, :]
                    if HAS_HIT:
                        p -= tl.where(hit, 1.0, 0.0)
                        rest += d_col
                    grad += d_col * p
                if HAS_HIT:
                    grad += tl.where(hit, rest, 0.0)
                if SOFT != "none":
                    soft = load_soft(soft_ptr, offs_v, readable, stride_sb, SOFT, BLOCK_B, BLOCK_V)
                    grad += tl.load(d_soft_ptr + at)[:, None] * soft
            if HAS_MASK or OWN == "exclude":
                grad = tl.where(y == -float("inf"), 0.0, grad)
            if HAS_SCALE:  # rows past the end repeat the last one; classes past the end have 0
                part = (g * tl.num_programs(1) + tl.program_id(1)) * width + offs_v
                if HAS_BIAS:
                    exists = mask_b[:, None].to(tl.float32)
                    tl.store(db_ptr + part, tl.sum(grad * exists, axis=0))
                row_scale = tl.load(row_scale_ptr + at, mask_b, other=0.0)[:, None]
                col_scale = tl.load(col_scale_ptr + g * stride_cg + offs_v)[None, :]
                tl.store(d_col_scale_ptr + part, tl.sum(grad * row_scale * acc, axis=0))
                grad *= col_scale
                part = (g * tl.num_programs(0) + tile) * B + offs_b
                tl.store(d_row_scale_ptr + part, tl.sum(grad * acc, axis=1), mask_b)
                grad *= row_scale * tl.load(unit_ptr)
                if out_ptr.dtype.element_ty == tl.float16:  # no infinity, which times 0 is NaN
                    grad = tl.where(tl.abs(grad) > limit, tl.where(grad > 0, limit, -limit), grad)
            tl.store(
                out_ptr + plane * g + offsets, grad.to(out_ptr.dtype.element_ty), mask_b[:, None]
            )
    tl.debug_barrier()  # a tile is re-read by the program that wrote it
    out_ptr += plane * (G - 1)
    suffix = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for _ in range(G):
        suffix += tl.load(out_ptr + offsets, mask_b[:, None], other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, suffix.to(out_ptr.dtype.element_ty), mask_b[:, None])
        out_ptr -= plane


def configs(flags: dict[str, Any]) -> dict[int, Config]:
    """Shapes of tiles by the width of an element, for a kernel with these flags."""
    configs = MASKING_CONFIGS if flags["HAS_MASK"] else STORING_CONFIGS
    if flags["LINK"] == "sigmoid":  # with three stages ptxas spills for Blackwell
        configs = configs | {4: configs[4]._replace(num_stages=4)}
    return configs


def largest_of(gradients: Sequence[Tensor], soft: Tensor | None, d_soft: Tensor | None) -> Tensor:
    """About the largest |dL/dy|, a scalar on the device; NaN where any is NaN."""
    sizes = [d.abs().amax() for d in gradients]
    if d_soft is not None:
        sizes.append(d_soft.abs().amax() * torch.linalg.vector_norm(soft, ord=torch.inf))
    return torch.stack(sizes).amax()


def usual_magnitude(scale: Tensor) -> Tensor:
    magnitude = scale.abs()
    return magnitude.where(magnitude < UNUSUAL, 0.0).amax()


def or_one(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1.0)


class KernelInputs(NamedTuple):
    """What the kernel reads of the upstream gradients, relative to the largest of them."""

    by_row: dict[str, Tensor | None]  # [G, B] each
    by_column: dict[str, Tensor | None]  # [G, V, padded] each
    largest: Tensor  # scalar on the device
    magnitude: Tensor  # scalar on the device: about the scales' product


def kernel_inputs(fold: Fold, spec: Any, upstream: Any) -> KernelInputs:
    d_soft, d_col, has_hit = upstream.d_soft, upstream.d_col, fold.flags["HAS_HIT"]
    softmax, soft = spec.link == "softmax", None if d_soft is None else spec.soft
    fp32 = dict(dtype=torch.float32, device=spec.x.device)
    zeros = torch.zeros(len(spec.dims), fold.B, **fp32)
    d_row = zeros if upstream.d_row is None else upstream.d_row
    d_hit = zeros if upstream.d_hit is None else upstream.d_hit
    given = [d_row, *([d_hit] if has_hit else []), *([] if d_col is None else [d_col])]
    # Half-precision tiles hold gradients relative to the largest: 1/n must not flush them to zero.
    largest = largest_of(given, soft, d_soft) if fold.B else zeros.sum()
    largest = or_one(largest) / LARGEST
    magnitude = torch.ones((), **fp32)
    if spec.row_scale is not None and fold.B:
        magnitude = or_one(usual_magnitude(fold.row_scale) * usual_magnitude(fold.col_scale))
    d_row, d_hit, d_soft, d_col = (
        None if d is None else (d / largest).contiguous() for d in (d_row, d_hit, d_soft, d_col)
    )
    of_p, at_target = d_row, d_hit  # the factor of P; what the target gets beside it
    if softmax:
        at_target = d_row if d_soft is None else d_row - d_soft * soft.sum(-1)
        of_p = at_target - d_hit if has_hit else at_target
    by_row = {
        "row_max_ptr": finite(upstream.row_max.contiguous()) if softmax else None,
        "row_log_ptr": upstream.row_log.contiguous() if softmax else None,
        "d_row_ptr": of_p.contiguous(),
        "d_target_ptr": at_target.contiguous() if has_hit else None,
        "d_soft_ptr": d_soft,
    }
    by_column = {
        "col_max_ptr": None if d_col is None else by_class(finite(upstream.col_max), torch.inf),
        "col_log_ptr": None if d_col is None else by_class(upstream.col_log),
        "d_col_ptr": None if d_col is None else by_class(d_col),
    }
    return KernelInputs(by_row, by_column, largest, magnitude)


def fold_backward(spec: Any, upstream: Any, into: Tensor | None = None) -> Gradients:
    """dx, dw, db in the dtypes of x, weight and bias, and those of the scales, fp32; dx is added to
    ``into``, where there is one.

    ``upstream`` has the forward's row_max, row_log, col_max and col_log, and the loss's gradients
    d_row and d_col of the log-sums, d_hit and d_soft; the maxima count as constants. With P the
    softmax, A = d_row·P + d_col·Q + d_hit·(δ − P) + d_soft·(soft − Σsoft·P). For the fields of
    ``spec`` see ``Fold``.
    """
    soft, bias = None if upstream.d_soft is None else spec.soft, spec.bias
    fold = Fold(spec._replace(soft=soft, columns=upstream.d_col is not None), configs)
    x, weight, dims, scaled = spec.x, spec.weight, spec.dims, spec.row_scale is not None
    G, B, V = len(dims), fold.B, fold.V
    by_row, by_column, largest, magnitude = kernel_inputs(fold, spec, upstream)
    fp32 = dict(dtype=torch.float32, device=x.device)
    unit = magnitude.reciprocal()
    workspace = torch.empty(0, dtype=stored(fold.dtype), device=x.device)
    d_row_scale = torch.zeros(G, B, **fp32) if scaled else None
    d_col_scale = torch.zeros(G, V, **fp32) if scaled else None
    db_scaled = torch.zeros(V, **fp32) if scaled and bias is not None else None

    def suffix_sums(rows: slice, classes: slice) -> Iterator[Tensor]:
        nonlocal workspace
        tiles, row_tiles = fold.grid(rows, classes)
        shape = G, rows.stop - rows.start, tiles * fold.blocks.BLOCK_V
        if workspace.numel() < math.prod(shape):  # the first chunk is the largest
            workspace = workspace.new_empty(math.prod(shape))
        out = workspace[: math.prod(shape)].view(shape)  # A_g, then T_g
        part_row = torch.empty(G, tiles, shape[1], **fp32) if scaled else None
        part_col = torch.empty(G, row_tiles, shape[2], **fp32) if scaled else None
        part_db = None if db_scaled is None else torch.empty_like(part_col)
        _score_gradients_kernel[tiles, row_tiles](
            **fold.arguments(rows, classes),
            **{k: None if t is None else t[:, rows] for k, t in by_row.items()},
            **{k: None if t is None else t[:, classes.start :] for k, t in by_column.items()},
            unit_ptr=unit, out_ptr=out,
            d_row_scale_ptr=part_row, d_col_scale_ptr=part_col, db_ptr=part_db,
            G=G, limit=torch.finfo(torch.float16).max / G,
        )  # fmt: skip
        if scaled:
            d_row_scale[:, rows].addcmul_(part_row.sum(dim=1), largest)
            size = classes.stop - classes.start
            d_col_scale[:, classes].addcmul_(part_col.sum(dim=1)[:, :size], largest)
            if db_scaled is not None:
                db_scaled[classes].addcmul_(part_db.sum(dim=(0, 1))[:size], largest)
        return reversed(out[:, :, : classes.stop - classes.start].unbind())

    bytes_a_score = G * workspace.element_size() + fold.copied_bytes()
    wanted = Wanted(x.dtype, weight.dtype, bias is not None and not scaled)
    dx, dw, db = nested_gradients(
        fold.x, fold.weight, dims, bytes_a_score, suffix_sums, largest * magnitude, wanted
    )
    db = db if db_scaled is None else db_scaled
    dx = dx if into is None else into.add_(dx)
    return dx, dw, None if db is None else db.to(bias.dtype), d_row_scale, d_col_scale
