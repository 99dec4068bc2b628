"""Nested scores on the CPU: chunks of columns, each walked once by the C++ engine.

Scores never leave its cache blocks in the forward; the backward holds a workspace of score
gradients. Results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast.shared import native
from mrl_fast.shared.native import _C, PACKED_BYTES, address, chunks, rows_of

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


class _Problem:
    """The arrays of a fold, and chunks of its columns as C++ reads them."""

    def __init__(self, x: Tensor, weight: Tensor, dims: Sequence[int], **arrays: Any):
        self.x, self.weight, self.dims = rows_of(x.float()), weight, list(dims)
        self.link = arrays.pop("link", "softmax")
        self.scalars = {
            name: arrays.pop(name)
            for name in ("period", "exclude_own", "own_boost", "other_boost")
            if name in arrays
        }
        self.arrays: dict[str, Tensor] = {}
        for name, value in arrays.items():
            if name == "mask" and value is not None:
                self.arrays[name] = rows_of(value)  # any row stride
            elif value is not None:
                self.arrays[name] = (value if name == "target" else value.float()).contiguous()

    def chunk(self, columns: slice) -> tuple[Any, tuple[Any, ...]]:
        """Scores against some columns, and what has to live as long."""
        w = rows_of(self.weight[columns, : self.dims[-1]].float())
        cut = self.arrays
        fields: dict[str, Any] = {name: array.data_ptr() for name, array in cut.items()}
        for name in ("bias", "col_scale", "soft", "mask"):
            if name in cut:  # columns are the last axis of each
                fields[name] += columns.start * cut[name].element_size()
        for name in ("soft", "mask"):
            if name in cut and cut[name].ndim == 2:  # else one row serves all
                fields[f"{name}_stride"] = cut[name].stride(0)
        scores = _C.Scores(
            x=self.x.data_ptr(), x_stride=self.x.stride(0), w=w.data_ptr(), w_stride=w.stride(0),
            rows=len(self.x), cols=len(w), dims=self.dims, first_col=columns.start,
            cols_apart=len(self.weight), sigmoid=self.link == "sigmoid", **fields, **self.scalars,
        )  # fmt: skip
        return scores, (w, cut)


def fold_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    target: Tensor | None,
    soft: Tensor | None,
    mask: Tensor | None,
    dims: Sequence[int],
    period: int,
    exclude_own: bool,
    own_boost: float,
    other_boost: float,
    link: str,
    columns: bool,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``engine.fold``. Products are fp32 whatever ``compute_dtype`` asks for at least."""
    problem = _Problem(
        x, weight, dims, bias=bias, row_scale=row_scale, col_scale=col_scale, target=target,
        soft=soft, mask=mask, period=period, exclude_own=exclude_own, own_boost=own_boost,
        other_boost=other_boost, link=link,
    )  # fmt: skip
    rows, cols = (len(dims), len(x)), (len(dims), len(weight))
    row_max, row_sum = torch.full(rows, -torch.inf), torch.zeros(rows, dtype=torch.float64)
    hit = None
    if target is not None and not exclude_own:
        hit = torch.full(rows, torch.nan)  # a target that is no column is nobody's
    soft_sum = None if soft is None else torch.zeros(rows, dtype=torch.float64)
    col_max = torch.empty(cols) if columns else None
    col_sum = torch.empty(cols, dtype=torch.float64) if columns else None
    for part in forward_chunks(len(x), len(weight), dims[-1], len(dims), columns):
        scores, alive = problem.chunk(part)
        _C.fold(
            scores, torch.get_num_threads(), native.ISA, row_max.data_ptr(), row_sum.data_ptr(), 0,
            address(soft_sum), address(hit),
            0 if col_max is None else col_max[:, part].data_ptr(),
            0 if col_sum is None else col_sum[:, part].data_ptr(),
        )  # fmt: skip
        del alive
    if link == "sigmoid":
        hit = None if hit is None else F.logsigmoid(hit)
        return torch.zeros(rows), row_sum.float(), hit, None, None, None
    row_log = log_of(row_sum)
    if soft is not None and soft_sum is not None:
        soft_sum = soft_sum - soft.double().sum(-1) * (row_max.double() + row_sum.log())
    hit = None if hit is None else (hit - row_max) - row_log
    return row_max, row_log, hit, soft_sum, col_max, log_of(col_sum)


def log_of(total: Any) -> Any:
    """log, and 0 where nothing was summed: the maximum, −∞, says so already."""
    return None if total is None else torch.where(total == 0, 0.0, total.log()).float()


def fold_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    target: Tensor | None,
    soft: Tensor | None,
    mask: Tensor | None,
    dims: Sequence[int],
    period: int,
    exclude_own: bool,
    own_boost: float,
    other_boost: float,
    link: str,
    compute_dtype: torch.dtype | None,
    row_max: Tensor,
    row_log: Tensor,
    col_max: Tensor | None,
    col_log: Tensor | None,
    d_row: Tensor,
    d_hit: Tensor | None,
    d_soft: Tensor | None,
    d_col: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    problem = _Problem(
        x, weight, dims, bias=bias, row_scale=row_scale, col_scale=col_scale, target=target,
        soft=None if d_soft is None else soft, mask=mask, period=period, exclude_own=exclude_own,
        own_boost=own_boost, other_boost=other_boost, link=link,
    )  # fmt: skip
    given = dict(row_max=finite_or_0(row_max), row_log=row_log, d_row=d_row)
    given |= dict(d_hit=None if exclude_own else d_hit, d_soft=d_soft)
    if soft is not None and d_soft is not None:
        given["soft_total"] = soft.double().sum(-1).float().reshape(-1)
    if d_col is not None and col_max is not None:
        given |= dict(col_max=finite_or_0(col_max), col_log=col_log, d_col=d_col)
    given = {name: t.contiguous() for name, t in given.items() if t is not None}
    dx, dw, db, d_row_scale, d_col_scale = _backward(problem, given)
    db = None if db is None or bias is None else db.to(bias.dtype)
    return dx.to(x.dtype), dw, db, d_row_scale, d_col_scale


def finite_or_0(maximum: Tensor) -> Tensor:
    """Where nothing was summed, every exp(y − maximum) is to be 0."""
    return maximum.where(maximum > -torch.inf, 0.0) if (maximum == -torch.inf).any() else maximum


def _backward(
    problem: _Problem, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    x, weight, depth = problem.x, problem.weight, problem.dims[-1]
    bias, row_scale, col_scale = (
        problem.arrays.get(name) for name in ("bias", "row_scale", "col_scale")
    )
    dx, dw = x.new_zeros(x.shape), weight.new_zeros(weight.shape)
    db = None if bias is None else torch.zeros_like(bias)
    d_row_scale, d_col_scale = (
        None if scale is None else torch.zeros_like(scale) for scale in (row_scale, col_scale)
    )
    prefixes = len(problem.dims)
    for part in gradient_chunks(len(x), len(weight), depth, prefixes):
        scores, alive = problem.chunk(part)
        width = part.stop - part.start
        whole = dw.dtype == torch.float32
        dw_part = dw[part] if whole else torch.zeros(width, depth)
        addresses: dict[str, int] = {name: t.data_ptr() for name, t in given.items()}
        for name in ("col_max", "col_log", "d_col"):
            if name in addresses:
                addresses[name] += 4 * part.start
        if (grad := given.get("grad")) is not None:
            grad = grad[:, :, part].float()
            grad = grad if grad.stride(2) == 1 else grad.contiguous()
            addresses["grad"] = grad.data_ptr()
            addresses |= dict(grad_apart=grad.stride(0), grad_stride=grad.stride(1))
        _C.gradients(
            scores, torch.get_num_threads(), native.ISA, addresses, WORKSPACE_BYTES,
            dx.data_ptr(), dx.stride(0), dw_part.data_ptr(), dw_part.stride(0),
            address(d_row_scale), 0 if d_col_scale is None else d_col_scale[:, part].data_ptr(),
            0 if db is None else db[part].data_ptr(),
        )  # fmt: skip
        if not whole:
            dw[part, :depth] = dw_part.to(dw.dtype)
        del alive
    return dx, dw, db, d_row_scale, d_col_scale


def logits_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> Tensor:  # [G, B, V] in x's dtype
    problem = _Problem(x, weight, dims, bias=bias)
    out = x.new_empty(len(dims), len(x), len(weight))
    for part in forward_chunks(len(x), len(weight), dims[-1], len(dims)):
        scores, alive = problem.chunk(part)
        to = out[:, :, part]
        if out.dtype != torch.float32:
            to = torch.empty(len(dims), len(x), part.stop - part.start)
        _C.store_scores(
            scores, torch.get_num_threads(), native.ISA, to.data_ptr(), to.stride(0), to.stride(1)
        )
        if out.dtype != torch.float32:
            out[:, :, part] = to
        del alive
    return out


def logits_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, dw, db, _, _ = _backward(_Problem(x, weight, dims, bias=bias), dict(grad=grad))
    return dx.to(x.dtype), dw, None if db is None or bias is None else db.to(bias.dtype)


def predict_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The first best class and its softmax, ``[G, B]`` each."""
    problem = _Problem(x, weight, dims, bias=bias)
    shape = len(dims), len(x)
    row_max, row_sum = torch.full(shape, -torch.inf), torch.zeros(shape, dtype=torch.float64)
    labels = torch.zeros(shape, dtype=torch.int64)
    for part in forward_chunks(len(x), len(weight), dims[-1], len(dims)):
        scores, alive = problem.chunk(part)
        _C.fold(
            scores, torch.get_num_threads(), native.ISA, row_max.data_ptr(), row_sum.data_ptr(),
            labels.data_ptr(), 0, 0, 0, 0,
        )  # fmt: skip
        del alive
    # beside NaN softmax is NaN all over, and its maximum the first
    return labels.masked_fill_(row_sum.isnan(), 0), (1.0 / row_sum).float()
