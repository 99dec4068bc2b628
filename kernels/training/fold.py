"""One fold of nested scores, from which every loss is made.

    S_g[i, j] = x[i, :d_g] · weight[j, :d_g]
    z_g[i, j] = row_scale[g, i] · col_scale[g, j] · S_g[i, j] + bias[j]

y is z, but z · own_boost where j is an own column of row i (``j % period == target[i]``) other than
its target, and z · other_boost where it is not an own column; boosts change values and not
gradients (dy/dz = 1). Excluded entries are −inf: where the mask is True, and every own column with
``exclude_own``. The forward sums y up by rows, and by columns; the backward makes y again.

This file has what the two share: the inputs as kernels read them, and the device function for y.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.shared.tiling import (
    Config,
    aligned,
    alignment,
    cdiv,
    config,
    operand,
    precision,
    schedule_of,
    score_offsets,
    whole_tiles,
)
from torch import Tensor


class Fold:
    """The inputs of a fold as its kernels read them.

    A ``spec`` has fields x ``[B, >= dims[-1]]``, weight ``[V, >= dims[-1]]``, dims, bias ``[V]``,
    row_scale ``[G, B]``, col_scale ``[G, V]``, target ``[B]`` int64, soft ``[V]`` or ``[B, V]``,
    mask ``[B, V]`` bool, period, exclude_own, own_boost, other_boost, link, columns and
    compute_dtype; tensors but the first two, and compute_dtype, may be None.
    """

    def __init__(
        self,
        spec: Any,
        configs: Callable[[dict[str, Any]], dict[int, Config]],  # by flags, then by element size
    ):
        x, target, soft = spec.x, spec.target, spec.soft
        self.B, self.V = len(x), len(spec.weight)
        self.dtype = spec.compute_dtype or x.dtype  # of the products, where not interpreted
        self.x, self.weight = (operand(t.to(self.dtype)) for t in (x, spec.weight))
        self.bias = None if spec.bias is None else by_class(operand(spec.bias), -torch.inf)
        self.soft = None if soft is None else operand(soft)
        if soft is not None and soft.dim() == 1:
            self.soft = by_class(self.soft)
        self.row_scale = None if spec.row_scale is None else spec.row_scale.float().contiguous()
        self.col_scale = None if spec.col_scale is None else by_class(spec.col_scale.float())
        self.target = None
        if target is not None:  # −1 stands for a target that is no class: it may not fit 32 bits
            valid = (target >= 0) & (target < self.V)
            self.target = target.where(valid, -1).int().contiguous()
        self.mask = None if spec.mask is None else operand_bytes(spec.mask)
        boosted = spec.own_boost != 1 or spec.other_boost != 1
        own = "exclude" if spec.exclude_own else "boost" if boosted else "none"
        if target is None and own == "exclude":
            own = "none"
        self.own = None
        if own != "none" and target is not None:
            self.own = by_class(
                torch.arange(self.V, dtype=torch.int64, device=x.device) % spec.period
            ).int()
        self.boosts = {"own_boost": float(spec.own_boost), "other_boost": float(spec.other_boost)}
        self.flags = {
            "HAS_BIAS": spec.bias is not None,
            "HAS_SCALE": spec.row_scale is not None,
            "HAS_TARGET": target is not None,
            "HAS_HIT": target is not None and not spec.exclude_own,
            "HAS_MASK": spec.mask is not None,
            "SOFT": "none" if soft is None else "row" if soft.dim() == 1 else "matrix",
            "OWN": own,
            "LINK": spec.link,
            "COLUMNS": spec.columns,
            "ALIGNMENT": alignment(spec.dims),
            "PRECISION": precision(self.x),
        }
        self.blocks = config(self.x, configs(self.flags))
        self.schedule = schedule_of(x, spec.dims, self.blocks.BLOCK_D)

    def arguments(self, rows: slice, classes: slice) -> dict[str, Any]:
        """The arguments that the forward and backward kernels share, for a chunk of the scores."""
        x, weight, soft = self.x[rows], self.weight[classes], self.soft
        if soft is not None:
            soft = soft[classes.start :] if soft.dim() == 1 else in_vectors(soft[rows, classes])
        mask = None if self.mask is None else in_vectors(self.mask[rows, classes])
        return {
            "x_ptr": x,
            "w_ptr": weight,
            "bias_ptr": None if self.bias is None else self.bias[classes.start :],
            "row_scale_ptr": None if self.row_scale is None else self.row_scale[:, rows],
            "col_scale_ptr": None if self.col_scale is None else self.col_scale[:, classes.start :],
            "target_ptr": None if self.target is None else self.target[rows],
            "own_ptr": None if self.own is None else self.own[classes.start :],
            "soft_ptr": soft,
            "mask_ptr": mask,
            "schedule_ptr": self.schedule,
            "B": len(x),
            "V": len(weight),
            "width": self.grid(rows, classes)[0] * self.blocks.BLOCK_V,
            "readable": cdiv(len(weight), 16) * 16,
            "first": classes.start,
            "steps": len(self.schedule),
            "stride_xb": x.stride(0),
            "stride_wv": weight.stride(0),
            "stride_rg": self.B,
            "stride_cg": whole_tiles(self.V),
            "stride_sb": 0 if soft is None else soft.stride(0),
            "stride_mb": 0 if mask is None else mask.stride(0),
            **self.boosts,
            **self.flags,
            **self.blocks._asdict(),
        }

    def copied_bytes(self) -> int:
        """Bytes that ``in_vectors`` copies for each score."""
        matrices = [self.mask, self.soft if self.flags["SOFT"] == "matrix" else None]
        return sum(
            t.element_size() for t in matrices if t is not None and not in_vectors_already(t)
        )

    def grid(self, rows: slice, classes: slice) -> tuple[int, int]:
        return (
            cdiv(classes.stop - classes.start, self.blocks.BLOCK_V),
            cdiv(rows.stop - rows.start, self.blocks.BLOCK_B),
        )


def operand_bytes(mask: Tensor) -> Tensor:
    """A boolean mask as bytes, in place where its last axis is contiguous."""
    return (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)


def by_class(t: Tensor, fill: float = 0.0) -> Tensor:
    """Pads ``[..., V]`` to whole tiles, so that kernels read it in vectors and without masks."""
    size = t.shape[-1]
    return torch.nn.functional.pad(t, (0, whole_tiles(size) - size), value=fill).contiguous()


def in_vectors_already(t: Tensor) -> bool:
    return t.shape[1] % 16 == 0 and aligned(t)


def in_vectors(t: Tensor) -> Tensor:
    """A chunk of a ``[B, V]`` matrix that can be read 16 bytes at a time: in place where its rows
    are whole and aligned, else a copy with wider rows. Reads of single elements would need an
    address and a predicate each, more registers than there are."""
    return t if in_vectors_already(t) else torch.nn.functional.pad(t, (0, -t.shape[1] % 16))


def finite(maximum: Tensor) -> Tensor:
    """What to subtract before exp: the maximum, but 0 where nothing is above −inf."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


@triton.jit
def load_soft(
    soft_ptr,
    offs_v,
    readable,
    stride_sb,
    SOFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """This tile of soft targets: [BLOCK_B, BLOCK_V] fp32, or [1, BLOCK_V] where rows share them."""
    if SOFT == "matrix":
        begin, offsets = score_offsets(stride_sb, BLOCK_B, BLOCK_V)
        soft = tl.load(soft_ptr + begin + offsets, readable, other=0.0)
    else:
        soft = tl.load(soft_ptr + offs_v)[None, :]
    return soft.to(tl.float32)


@triton.jit
def values_of(
    acc,  # [BLOCK_B, BLOCK_V] fp32: S_g, with the bias in it where there is no scale
    g,  # int64
    rows,  # [BLOCK_B] in [0, B)
    offs_v,  # [BLOCK_V]
    mask_v,  # [BLOCK_V]
    target,  # [BLOCK_B] int32
    readable,  # [BLOCK_B, BLOCK_V]: of the mask
    bias_ptr,
    row_scale_ptr,
    col_scale_ptr,
    own_ptr,
    mask_ptr,
    first,
    own_boost,
    other_boost,
    stride_rg,
    stride_cg,
    stride_mb,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_MASK: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """y of one prefix; with a scale, −inf past the last class. The inputs are read again at every
    prefix: kept, they would fill the registers."""
    y = acc
    if HAS_SCALE:
        row_scale = tl.load(row_scale_ptr + g * stride_rg + rows)
        col_scale = tl.load(col_scale_ptr + g * stride_cg + offs_v)
        y = y * row_scale[:, None] * col_scale[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_v).to(tl.float32)[None, :]
    if OWN != "none":
        if HAS_TARGET:
            own = tl.load(own_ptr + offs_v)[None, :] == target[:, None]
            if OWN == "exclude":
                y = tl.where(own, -float("inf"), y)
            else:
                lane = target - (first + tl.program_id(0) * BLOCK_V)
                hit = tl.arange(0, BLOCK_V)[None, :] == lane[:, None]
                y = tl.where(hit, y, y * tl.where(own, own_boost, other_boost))
        else:
            y = y * other_boost
    if HAS_MASK:
        begin, offsets = score_offsets(stride_mb, BLOCK_B, BLOCK_V)
        excluded = tl.load(mask_ptr + begin + offsets, readable, other=0)
        y = tl.where(excluded != 0, -float("inf"), y)
    if HAS_SCALE:
        y = tl.where(mask_v[None, :], y, -float("inf"))
    return y
