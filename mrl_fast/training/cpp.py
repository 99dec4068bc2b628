"""Nested scores on the CPU: chunks of columns, each walked once by the C++ kernels.

Scores never leave its cache blocks in the forward; the backward holds a workspace of score
gradients. Results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast.shared import memory, native
from mrl_fast.shared.native import _C, PACKED_BYTES, chunks, rows_of
from mrl_fast.training.spec import FoldSpec, Upstream

WORKSPACE_BYTES = 8 << 20  # of score gradients held at a time: they stay in the last cache


def forward_chunks(
    rows: int, cols: int, depth: int, prefixes: int, columns: bool = False
) -> Iterator[slice]:
    """Ranges of columns whose packed form stays in the last cache, and so does what groups of rows
    leave of their statistics."""
    bytes_a_column = 4 * depth
    if columns:  # three numbers a prefix and group, see csrc/cpu/training/forward.cpp
        bytes_a_column += 12 * prefixes * (rows // _C.GROUP_ROWS + 1)
    return chunks(cols, PACKED_BYTES // bytes_a_column)


def gradient_chunks(rows: int, cols: int, depth: int, prefixes: int) -> Iterator[slice]:
    """Ranges of columns whose packed form and score gradients fit, the latter with about as many
    rows: products over a chunk are as deep as its sides."""
    area = WORKSPACE_BYTES // (4 * prefixes)
    widest = max(math.isqrt(area), area // max(_C.ROWS, rows))
    return chunks(cols, min(widest, PACKED_BYTES // (4 * depth)))


# The dtypes in which C++ reads a fold's inputs beside x and weight.
INPUTS = {
    "bias": torch.float32, "row_scale": torch.float32, "col_scale": torch.float32,
    "target": torch.int64, "soft": torch.float32, "mask": torch.bool,
}  # fmt: skip
BY_COLUMN = ("bias", "col_scale", "soft", "mask")  # columns are their last axis


class _Problem:
    """A fold's inputs as C++ reads them, by chunks of columns."""

    def __init__(self, spec: FoldSpec):
        self.spec = spec
        self.x = rows_of(spec.x.float())
        self.inputs: dict[str, Tensor] = {}
        for name, dtype in INPUTS.items():
            if (value := getattr(spec, name)) is not None:  # a mask may have any row stride
                self.inputs[name] = rows_of(value) if name == "mask" else _as(value, dtype)

    def chunk(self, columns: slice) -> tuple[Any, tuple[Any, ...]]:
        """Scores against some columns, and the tensors that have to live as long."""
        spec = self.spec
        w = rows_of(spec.weight[columns, : spec.dims[-1]].float())
        cut = {n: t[..., columns] if n in BY_COLUMN else t for n, t in self.inputs.items()}
        fields: dict[str, Any] = {n: memory.address(t, INPUTS[n]) for n, t in cut.items()}
        for name in ("soft", "mask"):
            if name in cut and cut[name].ndim == 2:  # else one row serves all
                fields[f"{name}_stride"] = cut[name].stride(0)
        scores = _C.Scores(
            x=memory.address(self.x, torch.float32), x_stride=self.x.stride(0),
            w=memory.address(w, torch.float32), w_stride=w.stride(0),
            rows=len(self.x), cols=len(w), dims=list(spec.dims), first_col=columns.start,
            cols_apart=len(spec.weight), period=spec.period, exclude_own=spec.exclude_own,
            own_boost=spec.own_boost, other_boost=spec.other_boost,
            sigmoid=spec.link == "sigmoid", **fields,
        )  # fmt: skip
        return scores, (w, self.inputs)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


def fold_forward(
    spec: FoldSpec,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``ops.fold``; the two log-sums are fp64, to be merged with others'. Products are fp32, as
    precise as any ``compute_dtype`` asks for."""
    problem = _Problem(spec)
    G, B, V = len(spec.dims), len(spec.x), len(spec.weight)
    row_max = memory.full((G, B), -torch.inf)
    row_sum = memory.zeros(G, B, dtype=torch.float64)
    hit = memory.full((G, B), torch.nan) if spec.has_hit else None  # NaN: the target is no column
    soft_sum = None if spec.soft is None else memory.zeros(G, B, dtype=torch.float64)
    col_max = memory.empty(G, V) if spec.columns else None
    col_sum = memory.empty(G, V, dtype=torch.float64) if spec.columns else None
    if col_max is not None and col_sum is not None and not B:  # nothing writes them
        col_max, col_sum = col_max.fill_(-torch.inf), col_sum.zero_()
    for part in forward_chunks(B, V, spec.dims[-1], G, spec.columns):
        scores, inputs = problem.chunk(part)
        out = {
            "row_max": memory.address(row_max, torch.float32),
            "row_sum": memory.address(row_sum, torch.float64),
            "soft_sum": memory.address(soft_sum, torch.float64),
            "hit": memory.address(hit, torch.float32),
            "col_max": memory.address(None if col_max is None else col_max[:, part], torch.float32),
            "col_sum": memory.address(None if col_sum is None else col_sum[:, part], torch.float64),
        }
        _C.fold(scores, native.run(), out)
        del inputs
    if spec.link == "sigmoid":
        hit = None if hit is None else F.logsigmoid(hit)
        return memory.zeros(G, B), row_sum.float(), hit, None, None, None
    row_log = log_of(row_sum)
    if spec.soft is not None and soft_sum is not None:
        soft_sum = soft_sum - spec.soft.double().sum(-1) * (row_max.double() + row_sum.log())
    hit = None if hit is None else (hit - row_max) - row_log.float()
    col_log = None if col_sum is None else log_of(col_sum)
    return row_max, row_log, hit, soft_sum, col_max, col_log


def log_of(total: Tensor) -> Tensor:
    """The logarithm, fp64, and 0 where nothing was summed: the maximum, −∞, says so already."""
    return torch.where(total == 0, 0.0, total.log())


def finite_or_0(maximum: Tensor) -> Tensor:
    """The maximum, and 0 where nothing was summed: every exp(y − maximum) is 0 there."""
    return maximum.where(maximum > -torch.inf, 0.0) if (maximum == -torch.inf).any() else maximum


def fold_backward(
    spec: FoldSpec, upstream: Upstream, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and both scales; that of x is added to ``into``, fp32 and
    contiguous, where there is one."""
    given = upstream._asdict() | {
        "row_max": finite_or_0(upstream.row_max),
        "d_hit": upstream.d_hit if spec.has_hit else None,
    }
    if upstream.col_max is not None:
        given["col_max"] = finite_or_0(upstream.col_max)
    if upstream.d_soft is None:
        spec = spec._replace(soft=None)
    elif spec.soft is not None:
        given["soft_total"] = spec.soft.double().sum(-1).reshape(-1)
    return _backward(spec, given, into)


def _backward(
    spec: FoldSpec, given: Mapping[str, Tensor | None], into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and scales, from what ``Given`` of nested.h names."""
    problem = _Problem(spec)
    x, weight, depth = problem.x, spec.weight, spec.dims[-1]
    fp32 = torch.float32
    given = {n: t if n == "grad" else _as(t, fp32) for n, t in given.items() if t is not None}
    dx = memory.zeros(*x.shape) if into is None else into
    dw = memory.zeros(*weight.shape, dtype=weight.dtype)
    db, d_row_scale, d_col_scale = (
        memory.zeros(*problem.inputs[name].shape) if name in problem.inputs else None
        for name in ("bias", "row_scale", "col_scale")
    )
    for part in gradient_chunks(len(x), len(weight), depth, len(spec.dims)):
        scores, inputs = problem.chunk(part)
        whole = dw.dtype == fp32
        dw_part = dw[part] if whole else memory.zeros(part.stop - part.start, depth)
        cut = dict(given)
        for name in ("col_max", "col_log", "d_col"):
            if name in cut:
                cut[name] = cut[name][:, part]
        strides = {}
        if "grad" in given:
            grad = cut["grad"] = rows_of(given["grad"][:, :, part].float())
            strides = dict(grad_apart=grad.stride(0), grad_stride=grad.stride(1))
        addresses = {name: memory.address(t, fp32) for name, t in cut.items()}
        out = {
            "dx": memory.address(dx, fp32),
            "dx_stride": dx.stride(0),
            "dw": memory.address(dw_part, fp32),
            "dw_stride": dw_part.stride(0),
            "d_row_scale": memory.address(d_row_scale, fp32),
            "d_col_scale": memory.address(
                None if d_col_scale is None else d_col_scale[:, part], fp32
            ),
            "db": memory.address(None if db is None else db[part], fp32),
        }
        _C.gradients(scores, native.run(), addresses | strides, WORKSPACE_BYTES, out)
        if not whole:
            dw[part, :depth] = dw_part.to(dw.dtype)
        del inputs
    db = None if db is None or spec.bias is None else db.to(spec.bias.dtype)
    return dx.to(spec.x.dtype), dw, db, d_row_scale, d_col_scale


def logits_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> Tensor:  # [G, B, V] in x's dtype
    problem = _Problem(FoldSpec(x, weight, dims, bias))
    out = memory.empty(len(dims), len(x), len(weight), dtype=x.dtype)
    for part in forward_chunks(len(x), len(weight), dims[-1], len(dims)):
        scores, inputs = problem.chunk(part)
        to = out[:, :, part]
        if out.dtype != torch.float32:
            to = memory.empty(*to.shape)
        address = memory.address(to, torch.float32)
        _C.store_scores(scores, native.run(), address, to.stride(0), to.stride(1))
        if out.dtype != torch.float32:
            out[:, :, part] = to
        del inputs
    return out


def logits_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, dw, db, _, _ = _backward(FoldSpec(x, weight, dims, bias), {"grad": grad})
    return dx, dw, db


def predict_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The first best class and its softmax, ``[G, B]`` each."""
    problem = _Problem(FoldSpec(x, weight, dims, bias))
    G, B = len(dims), len(x)
    row_max = memory.full((G, B), -torch.inf)
    row_sum = memory.zeros(G, B, dtype=torch.float64)
    labels = memory.zeros(G, B, dtype=torch.int64)
    for part in forward_chunks(B, len(weight), dims[-1], G):
        scores, inputs = problem.chunk(part)
        out = {
            "row_max": memory.address(row_max, torch.float32),
            "row_sum": memory.address(row_sum, torch.float64),
            "labels": memory.address(labels, torch.int64),
        }
        _C.fold(scores, native.run(), out)
        del inputs
    # beside NaN softmax is NaN all over, and its maximum the first
    return labels.masked_fill_(row_sum.isnan(), 0), (1.0 / row_sum).float()
