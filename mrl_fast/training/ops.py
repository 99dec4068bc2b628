"""The one differentiable op behind every loss: nested scores folded into row and column statistics.

``S_g = x[:, :d_g] @ weight[:, :d_g].T`` is a running sum over slabs, so one pass over the columns
gives every prefix's scores. ``fold`` reduces them as they appear, to a maximum and a log-sum a row
(and column) and prefix; its backward computes them again and turns the statistics' gradients into
those of x, weight, bias and scales. A loss is what it makes of the statistics: see ``losses/``.

Custom ops with fake kernels, so that ``torch.compile`` sees one opaque call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from mrl_fast.shared.dispatch import module_of
from mrl_fast.training.differentiation import (
    differentiable,
    differentiated,
    save_spec,
    saved_spec,
)
from mrl_fast.training.spec import FoldSpec, Upstream, schema_of

DIFFERENTIABLE = ("x", "weight", "bias", "row_scale", "col_scale")


class Fold(NamedTuple):
    """Statistics of the scores y, fp32; the two maxima are constants to autograd."""

    row_max: Tensor  # [G, B]
    row_log: Tensor  # [G, B]: log Σ_j exp(y − row_max); sigmoid: Σ_{j ≠ target} softplus(y)
    hit: Tensor  # [G, B]: y − row_max − row_log at the target; sigmoid: log σ(y); [0] without one
    soft_sum: Tensor  # [G, B] fp64: Σ_j soft · (y − row_max − row_log); [0] without soft
    col_max: Tensor  # [G, V], as the next: the same of columns; [0] unless asked for
    col_log: Tensor


def fold(spec: FoldSpec, impl: str) -> Fold:
    """Statistics of the scores that ``spec`` describes, from one pass over the columns.

    Differentiable once, in x, weight, bias and both scales.

    Args:
        spec: Checked arguments.
        impl: A name that ``dispatch.choose`` has accepted for these tensors.
    """
    result = Fold(*_fold_once(*spec._replace(dims=list(spec.dims)), impl))
    return result._replace(row_max=result.row_max.detach(), col_max=result.col_max.detach())


def or_empty(x: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """An op returns tensors only: an absent one is empty."""
    return tuple(x.new_empty(0, dtype=torch.float32) if t is None else t for t in tensors)


@custom_op("mrl_fast::fold", mutates_args=(), schema=schema_of(FoldSpec, returns=6))
def _fold(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, impl = arguments
    spec = FoldSpec(*fields)
    f = Fold(*module_of(impl, "training").fold_forward(spec))
    return rounded(f, spec.x)


def rounded(f: Fold, x: Tensor) -> Fold:
    """What an op returns of the statistics that a module's ``fold_forward`` gives."""
    f = Fold(*or_empty(x, f))
    return f._replace(
        row_log=f.row_log.float(), col_log=f.col_log.float(), soft_sum=f.soft_sum.double()
    )


@_fold.register_fake
def _(*arguments):
    *fields, _ = arguments
    return empty_fold(FoldSpec(*fields))


def empty_fold(spec: FoldSpec) -> Fold:
    """Tensors as those of a fold, with nothing in them."""

    def empty(present: bool, of: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return of.new_empty((len(spec.dims), len(of)) if present else (0,), dtype=dtype)

    x, weight = spec.x, spec.weight
    return Fold(
        row_max=empty(True, x),
        row_log=empty(True, x),
        hit=empty(spec.has_hit, x),
        soft_sum=empty(spec.soft is not None, x, torch.float64),
        col_max=empty(spec.columns, weight),
        col_log=empty(spec.columns, weight),
    )


@custom_op(
    "mrl_fast::fold_backward", mutates_args=(), schema=schema_of(FoldSpec, Upstream, returns=5)
)
def _fold_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, impl = arguments
    spec, upstream = _split(fields)
    return or_empty(spec.x, module_of(impl, "training").fold_backward(spec, upstream))


def _split(fields: Sequence[Any]) -> tuple[FoldSpec, Upstream]:
    size = len(FoldSpec._fields)
    return FoldSpec(*fields[:size]), Upstream(*fields[size:])


@_fold_backward.register_fake
def _(*arguments):
    *fields, _ = arguments
    return empty_gradients(_split(fields)[0])


def empty_gradients(spec: FoldSpec) -> tuple[Tensor, ...]:
    """Tensors as the gradients of a fold's inputs, with nothing in them."""
    inputs: list[Tensor | None] = [getattr(spec, name) for name in DIFFERENTIABLE]
    return or_empty(spec.x, [None if t is None else _contiguous_like(t) for t in inputs])


def _contiguous_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    *fields, ctx.impl = inputs
    f = Fold(*output)
    ctx.set_materialize_grads(False)
    save_spec(ctx, FoldSpec(*fields), f.row_max, f.row_log, f.col_max, f.col_log)


def _gradients(ctx, *gradients):
    spec, statistics = saved_spec(ctx)
    upstream = upstream_of(spec, statistics, Fold(*gradients))
    found = _fold_backward_once(*spec, *upstream, ctx.impl)
    return *by_field(ctx, spec, found), None


def upstream_of(spec: FoldSpec, statistics: Sequence[Tensor], d: Fold) -> Upstream:
    """What a backward is given, of the forward's statistics of rows and columns and the gradients
    ``d``, where None is 0."""
    row_max, row_log, col_max, col_log = statistics
    zeros, by_columns = torch.zeros_like(row_log), d.col_log is not None
    return Upstream(
        row_max=row_max,
        row_log=row_log,
        col_max=col_max if by_columns else None,
        col_log=col_log if by_columns else None,
        d_row=zeros if d.row_log is None else d.row_log,
        d_hit=zeros if d.hit is None and spec.has_hit else d.hit,
        d_soft=None if d.soft_sum is None or spec.soft is None else d.soft_sum.float(),
        d_col=d.col_log,
    )


def by_field(ctx: Any, spec: FoldSpec, found: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a fold's inputs, in the order of ``FoldSpec``."""
    by_name = dict(zip(DIFFERENTIABLE, found, strict=True))
    return [by_name[n] if n in by_name and n in ctx.tensors else None for n in spec._fields]


_fold_backward_once = differentiated(_fold_backward)
_fold_once = differentiable(_fold, _save, _gradients)


EPSILON = 1e-12  # of F.normalize


def _slabs(x: Tensor, dims: Sequence[int]) -> list[Tensor]:
    return [x[:, begin:end] for begin, end in zip((0, *dims), dims, strict=False)]


def _norms(x: Tensor, dims: Sequence[int]) -> Tensor:  # [G, B] fp64
    parts = [torch.linalg.vector_norm(s, dim=1, dtype=torch.float64) for s in _slabs(x, dims)]
    return torch.stack(parts).square().cumsum(0).sqrt()


@custom_op("mrl_fast::inverse_norms", mutates_args=())
def _inverse_norms(x: Tensor, dims: Sequence[int]) -> Tensor:
    return _norms(x, dims).clamp_min(EPSILON).reciprocal()


@_inverse_norms.register_fake
def _(x, dims):
    return x.new_empty((len(dims), x.shape[0]), dtype=torch.float64)


@custom_op("mrl_fast::inverse_norms_backward", mutates_args=())
def _inverse_norms_backward(x: Tensor, grad: Tensor, dims: Sequence[int]) -> Tensor:
    # d(1/n)/dx = −x/n³, and 0 where the norm was clamped; column j counts in every wider prefix
    norms = _norms(x, dims)
    factor = torch.where(norms > EPSILON, -grad.double() / norms.pow(3), 0.0)
    factor = factor.flip(0).cumsum(0).flip(0).to(x.dtype)  # [G, B]
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for to, part, of in zip(_slabs(out, dims), _slabs(x, dims), factor, strict=True):
        torch.mul(part, of[:, None], out=to)
    return out


@_inverse_norms_backward.register_fake
def _(x, grad, dims):
    return _contiguous_like(x)


def _save_norms(ctx, inputs, output) -> None:
    x, ctx.dims = inputs
    ctx.save_for_backward(x)


def _norm_gradients(ctx, grad):
    return _inverse_norms_backward_once(*ctx.saved_tensors, grad, ctx.dims), None


_inverse_norms_backward_once = differentiated(_inverse_norms_backward)
_inverse_norms_once = differentiable(_inverse_norms, _save_norms, _norm_gradients)


def inverse_norms(x: Tensor, dims: Sequence[int]) -> Tensor:
    """``1 / max(‖x[:, :d]‖, 1e-12)`` of every prefix, ``[G, B]`` fp64: ``F.normalize`` divides by
    these norms. Their errors are those of all of a row's scores and would not average out."""
    return _inverse_norms_once(x, list(dims))


@custom_op(
    "mrl_fast::nested_logits",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] dims, str impl) -> Tensor",
)
def _nested_logits(x, weight, bias, dims, impl):
    return module_of(impl, "training").logits_forward(x, weight, bias, dims)


@_nested_logits.register_fake
def _(x, weight, bias, dims, impl):
    return x.new_empty((len(dims), x.shape[0], weight.shape[0]))


@custom_op(
    "mrl_fast::nested_logits_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[] dims, str impl) "
    "-> (Tensor, Tensor, Tensor)",
)
def _nested_logits_backward(grad, x, weight, bias, dims, impl):
    return or_empty(x, module_of(impl, "training").logits_backward(grad, x, weight, bias, dims))


@_nested_logits_backward.register_fake
def _(grad, x, weight, bias, dims, impl):
    db = None if bias is None else _contiguous_like(bias)
    return or_empty(x, [_contiguous_like(x), _contiguous_like(weight), db])


def _save_logits(ctx, inputs, output) -> None:
    x, weight, bias, ctx.dims, ctx.impl = inputs
    ctx.save_for_backward(x, weight, bias)


def _logits_gradients(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    dx, dw, db = _nested_logits_backward_once(grad, x, weight, bias, ctx.dims, ctx.impl)
    return dx, dw, None if bias is None else db, None, None


_nested_logits_backward_once = differentiated(_nested_logits_backward)
_nested_logits_once = differentiable(_nested_logits, _save_logits, _logits_gradients)


def nested_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int], impl: str
) -> Tensor:
    """``[G, B, V]``: S_g + bias, in x's dtype."""
    return _nested_logits_once(x, weight, bias, list(dims), impl)


@custom_op(
    "mrl_fast::predict",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] dims, str impl) -> (Tensor, Tensor)",
)
def predict(x, weight, bias, dims, impl):
    """The first best class and its softmax, ``[G, B]`` int64 and fp32."""
    return module_of(impl, "training").predict_forward(x, weight, bias, dims)


@predict.register_fake
def _(x, weight, bias, dims, impl):
    shape = len(dims), x.shape[0]
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)
