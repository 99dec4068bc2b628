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


class Fold(NamedTuple):
    """Statistics of the scores y, fp32; the two maxima are constants to autograd."""

    row_max: Tensor  # [G, B]
    row_log: Tensor  # [G, B]: log Σ_j exp(y − row_max); sigmoid: Σ_{j ≠ target} softplus(y)
    hit: Tensor  # [G, B]: y − row_max − row_log at the target; sigmoid: log σ(y); [0] without one
    soft_sum: Tensor  # [G, B] fp64: Σ_j soft · (y − row_max − row_log); [0] without soft
    col_max: Tensor  # [G, V], as the next: the same of columns; [0] unless asked for
    col_log: Tensor


def fold(
    x: Tensor,
    weight: Tensor,
    dims: Sequence[int],
    *,
    impl: str,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    target: Tensor | None = None,
    period: int | None = None,
    exclude_own: bool = False,
    own_boost: float = 1.0,
    other_boost: float = 1.0,
    soft: Tensor | None = None,
    mask: Tensor | None = None,
    link: str = "softmax",
    columns: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Fold:
    """Statistics of ``z = row_scale · col_scale · S_g + bias`` for every prefix, in one pass.

    Differentiable once, in x, weight, bias and both scales.

    Args:
        x: ``[B, >= dims[-1]]``.
        weight: ``[V, >= dims[-1]]``.
        dims: Checked prefix widths.
        impl: A name that ``implementation`` has accepted for these tensors.
        bias: ``[V]``.
        row_scale, col_scale: ``[G, B]`` and ``[G, V]`` fp32; both or neither.
        target: ``[B]`` int64, the column of each row's positive.
        period: Columns equal to the target modulo ``period`` are a row's own; default V.
        exclude_own: Leave a row's own columns out, its target too; there is no hit then.
        own_boost, other_boost: y is z times this at own columns but the target, and at all others;
            to autograd the factor adds a constant.
        soft: ``[V]`` or ``[B, V]`` fp32, weights of a row's scores in ``soft_sum``.
        mask: ``[B, V]`` bool, True is left out.
        link: ``"softmax"``, or ``"sigmoid"`` for sums of softplus.
        columns: Also fold over the rows of each column.
        compute_dtype: Round x and weight to this for their products, as tensor cores ask.
    """
    out = torch.ops.mrl_fast.fold(
        x, weight, bias, row_scale, col_scale, target, soft, mask, list(dims),
        len(weight) if period is None else period, exclude_own, own_boost, other_boost, link,
        columns, compute_dtype, impl,
    )  # fmt: skip
    result = Fold(*out)
    return result._replace(row_max=result.row_max.detach(), col_max=result.col_max.detach())


OPTIONS = "int[] dims, int period, bool exclude_own, float own_boost, float other_boost, str link, "
ARRAYS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? row_scale, Tensor? col_scale, Tensor? target, "
    "Tensor? soft, Tensor? mask, "
)


def _or_empty(x: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """An op returns tensors only: an absent one is empty."""
    return [x.new_empty(0, dtype=torch.float32) if t is None else t for t in tensors]


@custom_op(
    "mrl_fast::fold",
    mutates_args=(),
    schema=f"({ARRAYS}{OPTIONS}bool columns, ScalarType? compute_dtype, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _fold(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *rest, impl = arguments
    top, log, hit, soft_sum, *columns = module_of(impl, "training").fold_forward(x, *rest)
    soft_sum = x.new_empty(0, dtype=torch.float64) if soft_sum is None else soft_sum.double()
    return tuple(_or_empty(x, (top, log, hit, soft_sum, *columns)))


@_fold.register_fake
def _(
    x, weight, bias, row_scale, col_scale, target, soft, mask, dims, period, exclude_own,
    own_boost, other_boost, link, columns, compute_dtype, impl,
):  # fmt: skip
    def of(present: bool, size) -> Tensor:
        return x.new_empty((len(dims), size) if present else (0,), dtype=torch.float32)

    hit = target is not None and not exclude_own
    rows, cols = x.shape[0], weight.shape[0]
    return (
        of(True, rows), of(True, rows), of(hit, rows), of(soft is not None, rows).double(),
        of(columns, cols), of(columns, cols),
    )  # fmt: skip


@custom_op(
    "mrl_fast::fold_backward",
    mutates_args=(),
    schema=f"({ARRAYS}{OPTIONS}ScalarType? compute_dtype, Tensor row_max, Tensor row_log, "
    "Tensor? col_max, Tensor? col_log, Tensor d_row, Tensor? d_hit, Tensor? d_soft, "
    "Tensor? d_col, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _fold_backward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *rest, impl = arguments
    return tuple(_or_empty(x, module_of(impl, "training").fold_backward(x, *rest)))


@_fold_backward.register_fake
def _(x, weight, bias, row_scale, col_scale, *_):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        *(
            x.new_empty(
                (0,) if t is None else t.shape, dtype=torch.float32 if t is None else t.dtype
            )
            for t in (bias, row_scale, col_scale)
        ),
    )


def _save(ctx, inputs, output) -> None:
    *arrays, ctx.dims, ctx.period = inputs[:10]
    ctx.options = inputs[10:14]  # exclude_own … link
    ctx.compute_dtype, ctx.impl = inputs[15:]
    row_max, row_log, _, _, col_max, col_log = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arrays, row_max, row_log, col_max, col_log)


def _gradients(ctx, d_row_max, d_row, d_hit, d_soft, d_col_max, d_col):
    *arrays, row_max, row_log, col_max, col_log = ctx.saved_tensors
    has_hit = arrays[5] is not None and not ctx.options[0]
    out = torch.ops.mrl_fast.fold_backward(
        *arrays, ctx.dims, ctx.period, *ctx.options, ctx.compute_dtype, row_max, row_log,
        col_max if d_col is not None else None, col_log if d_col is not None else None,
        torch.zeros_like(row_log) if d_row is None else d_row,
        torch.zeros_like(row_log) if d_hit is None and has_hit else d_hit,
        None if d_soft is None or arrays[6] is None else d_soft.float(), d_col, ctx.impl,
    )  # fmt: skip
    gradients = [None if of is None else grad for of, grad in zip(arrays[:5], out, strict=True)]
    return *gradients, *[None] * 12


_fold.register_autograd(_gradients, setup_context=_save)


def refuse_double_backward(op: Any) -> None:
    """Second derivatives of a fused loss raise, rather than being silently zero."""

    def raise_(ctx, *grads):
        raise RuntimeError(
            "mrl_fast: a fused loss can be differentiated once; for second derivatives pass "
            "impl='reference'"
        )

    op.register_autograd(raise_, setup_context=lambda ctx, inputs, output: None)


refuse_double_backward(_fold_backward)


EPSILON = 1e-12  # of F.normalize


def _slabs(x: Tensor, dims: Sequence[int]) -> list[Tensor]:
    return [x[:, begin:end] for begin, end in zip((0, *dims), dims, strict=False)]


def _norms(x: Tensor, dims: Sequence[int]) -> Tensor:  # [G, B] fp64
    parts = [torch.linalg.vector_norm(s, dim=1, dtype=torch.float64) for s in _slabs(x, dims)]
    return torch.stack(parts).square().cumsum(0).sqrt()


@custom_op("mrl_fast::inverse_norms", mutates_args=())
def inverse_norms(x: Tensor, dims: Sequence[int]) -> Tensor:
    """``1 / max(‖x[:, :d]‖, 1e-12)`` of every prefix, ``[G, B]`` fp64: what ``F.normalize`` divides
    by. An error here is one of all of a row's scores, and would not average out."""
    return _norms(x, dims).clamp_min(EPSILON).reciprocal()


@inverse_norms.register_fake
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
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_norms(ctx, inputs, output) -> None:
    x, ctx.dims = inputs
    ctx.save_for_backward(x)


inverse_norms.register_autograd(
    lambda ctx, grad: (_inverse_norms_backward(*ctx.saved_tensors, grad, ctx.dims), None),
    setup_context=_save_norms,
)
refuse_double_backward(_inverse_norms_backward)


@custom_op(
    "mrl_fast::nested_logits",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] dims, str impl) -> Tensor",
)
def nested_logits(x, weight, bias, dims, impl):
    """``[G, B, V]``: S_g + bias, in x's dtype."""
    return module_of(impl, "training").logits_forward(x, weight, bias, dims)


@nested_logits.register_fake
def _(x, weight, bias, dims, impl):
    return x.new_empty((len(dims), x.shape[0], weight.shape[0]))


@custom_op(
    "mrl_fast::nested_logits_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[] dims, str impl) "
    "-> (Tensor, Tensor, Tensor)",
)
def _nested_logits_backward(grad, x, weight, bias, dims, impl):
    return tuple(
        _or_empty(x, module_of(impl, "training").logits_backward(grad, x, weight, bias, dims))
    )


@_nested_logits_backward.register_fake
def _(grad, x, weight, bias, dims, impl):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        x.new_empty(0, dtype=torch.float32) if bias is None else torch.empty_like(bias),
    )


def _save_logits(ctx, inputs, output) -> None:
    x, weight, bias, ctx.dims, ctx.impl = inputs
    ctx.save_for_backward(x, weight, bias)


def _logits_gradients(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    dx, dw, db = torch.ops.mrl_fast.nested_logits_backward(
        grad, x, weight, bias, ctx.dims, ctx.impl
    )
    return dx, dw, None if bias is None else db, None, None


nested_logits.register_autograd(_logits_gradients, setup_context=_save_logits)
refuse_double_backward(_nested_logits_backward)


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
