"""Distillation of similarity rows: every student prefix against a teacher's softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from mrl_fast.shared.checks import check_choice, check_matrix, check_same_device
from mrl_fast.shared.dispatch import choose, module_of
from mrl_fast.shared.types import NestedLoss
from mrl_fast.training import reference
from mrl_fast.training.losses.embeddings import Side, check_pairs
from mrl_fast.training.losses.reductions import check_dim_weights, nested_loss
from mrl_fast.training.ops import refuse_double_backward

CHUNK_BYTES = 16 << 20  # of teacher probabilities held at a time

Pair = Tensor | tuple[Tensor, Tensor]


def matryoshka_distill(
    student: Pair,
    teacher: Pair,
    dims: Sequence[int],
    *,
    dim_weights: Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    teacher_kind: str | None = None,
    impl: str | None = None,
) -> NestedLoss:
    """KL divergence of every nested prefix's similarity rows from a teacher's, summed.

    With cosine similarities t of the teacher and s_d of the student's prefix equals ``sum(c * T² *
    F.kl_div((s_d / T).log_softmax(1), (t / T).softmax(1), reduction="batchmean") for ...)``, and
    neither is held in memory. The teacher takes no gradient, so a student may be its own teacher at
    its full width. Differentiable once.

    Args:
        student: Vectors ``[B, D]``, compared with one another, or a pair of queries ``[B, D]`` and
            documents ``[C, D]``.
        teacher: Vectors of any width, ``[B, E]`` or a pair as the student's; or scores ``[B, C]``,
            taken as they are.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        dim_weights: c_g, ``[G]``; default all 1: a sum over prefixes, not a mean.
        temperature: T > 0, of both sides; the loss is multiplied by T².
        teacher_kind: ``"vectors"`` or ``"scores"``. None sees it by the shapes: one tensor beside a
            pair is scores; beside a single student it is vectors, or an error where ``[B, B]``
            could be either.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        NestedLoss: scalar ``loss`` and detached ``per_dim`` ``[G]``.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range.

    Source: Hinton et al. 2015, section 2 (T²); Park et al. 2019 (relations between examples).
    """
    single = isinstance(student, Tensor)
    first, second = _check_sides(student, "student")
    queries, (documents,), dims = check_pairs(first, second, dims, "student[0]", "student[1]")
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
    dim_weights = check_dim_weights(dim_weights, len(dims), queries)
    rows, cols = _check_teacher(teacher, teacher_kind, queries, documents, single)

    impl = choose(impl, queries, documents)
    if impl == "reference":
        kl = reference.distill_rows(queries, documents, dims, rows, cols, temperature)
    else:
        q = Side.of(queries, dims)
        d = q if single else Side.of(documents, dims)
        if cols is not None:
            rows, cols = F.normalize(rows.float()), F.normalize(cols.float())
        kl = torch.ops.mrl_fast.distill(
            q.x, d.x, q.scaled(1 / temperature), d.inverse, rows.detach(),
            None if cols is None else cols.detach(), list(dims), float(temperature),
            q.compute_dtype, impl,
        )[0]  # fmt: skip
    return nested_loss(kl * temperature**2, dim_weights, "mean", len(queries))


def _check_sides(pair: Any, name: str) -> tuple[Tensor, Tensor]:
    """A tensor twice, or the two of a pair."""
    sides = (pair, pair) if isinstance(pair, Tensor) else pair
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        kind = f"{len(pair)} of them" if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise TypeError(f"{name}: expected a tensor or a pair of tensors, got {kind}")
    check_matrix(sides[0], name if isinstance(pair, Tensor) else f"{name}[0]")
    check_matrix(sides[1], name if isinstance(pair, Tensor) else f"{name}[1]")
    return sides[0], sides[1]


def _check_teacher(
    teacher: Pair, kind: str | None, queries: Tensor, documents: Tensor, single: bool
) -> tuple[Tensor, Tensor | None]:
    """The teacher's two sides, or its scores and None."""
    shape = [len(queries), len(documents)]
    if kind is not None:
        check_choice(kind, "teacher_kind", ("vectors", "scores"))
    rows, cols = _check_sides(teacher, "teacher")
    if not isinstance(teacher, Tensor):
        if kind == "scores":
            raise ValueError("teacher: expected one tensor of scores, got a pair")
        for name, side, count in (
            ("teacher[0]", rows, shape[0]),
            ("teacher[1]", cols, shape[1]),
        ):
            check_same_device(check_matrix(side, name), name, queries)
            if len(side) != count or side.shape[1] != rows.shape[1]:
                raise ValueError(
                    f"{name}: expected shape [{count}, {rows.shape[1]}], got {list(side.shape)}"
                )
        return rows, cols
    check_same_device(check_matrix(teacher, "teacher"), "teacher", queries)
    if kind is None:
        if single and list(teacher.shape) == shape:
            raise ValueError(
                f"teacher: a tensor of shape {shape} may be vectors or scores; expected "
                "teacher_kind='vectors' or 'scores'"
            )
        kind = "vectors" if single else "scores"
    if kind == "vectors":
        if not single:
            raise ValueError("teacher: expected a pair of vectors as the student's, got one tensor")
        if len(teacher) != shape[0]:
            raise ValueError(f"teacher: expected {shape[0]} rows, got {len(teacher)}")
        return teacher, teacher
    if list(teacher.shape) != shape:
        raise ValueError(f"teacher: expected scores of shape {shape}, got {list(teacher.shape)}")
    return teacher, None


def _chunks(
    rows: Tensor, cols: Tensor | None, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of rows and the teacher's log-probabilities there."""
    columns = rows.shape[1] if cols is None else len(cols)
    step = max(64, CHUNK_BYTES // (4 * max(1, columns)))
    for begin in range(0, len(rows), step):
        part = slice(begin, min(begin + step, len(rows)))
        with torch.autocast(rows.device.type, enabled=False):  # the same in every context
            scores = rows[part].float() if cols is None else rows[part] @ cols.T
            logp = (scores / temperature).log_softmax(1)
        yield part, logp


ARRAYS = (
    "Tensor x, Tensor weight, Tensor row_scale, Tensor col_scale, Tensor rows, Tensor? cols, "
    "int[] dims, float temperature, ScalarType? compute_dtype, "
)


def _options(dims: Sequence[int], columns: int) -> tuple:
    return dims, columns, False, 1.0, 1.0, "softmax"


@custom_op(
    "mrl_fast::distill", mutates_args=(), schema=f"({ARRAYS}str impl) -> (Tensor, Tensor, Tensor)"
)
def _distill(x, weight, row_scale, col_scale, rows, cols, dims, temperature, compute_dtype, impl):
    """KL of every row and prefix, and the student's two statistics, ``[G, B]`` each."""
    kl, row_max, row_log = (x.new_empty(len(dims), len(x), dtype=torch.float32) for _ in range(3))
    for part, logp in _chunks(rows, cols, temperature):
        p = logp.exp()
        top, log, _, cross, _, _ = module_of(impl, "training").fold_forward(
            x[part], weight, None, row_scale[:, part], col_scale, None, p, None,
            *_options(dims, len(weight)), False, compute_dtype,
        )  # fmt: skip
        row_max[:, part], row_log[:, part] = top, log
        entropy = torch.where(p > 0, p * logp, 0.0).double().sum(1)  # −H, [b]
        kl[:, part] = (entropy - cross).float()  # a small difference of larger numbers
    return kl, row_max, row_log


@_distill.register_fake
def _(x, weight, row_scale, *_):
    return tuple(torch.empty_like(row_scale) for _ in range(3))


@custom_op(
    "mrl_fast::distill_backward",
    mutates_args=(),
    schema=f"({ARRAYS}Tensor row_max, Tensor row_log, Tensor grad, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _distill_backward(
    x, weight, row_scale, col_scale, rows, cols, dims, temperature, compute_dtype,
    row_max, row_log, grad, impl,
):  # fmt: skip
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    d_rows, d_cols = torch.zeros_like(row_scale), torch.zeros_like(col_scale)
    for part, logp in _chunks(rows, cols, temperature):
        dx[part], more, _, d_rows[:, part], more_cols = module_of(impl, "training").fold_backward(
            x[part], weight, None, row_scale[:, part], col_scale, None, logp.exp(), None,
            *_options(dims, len(weight)), compute_dtype, row_max[:, part], row_log[:, part],
            None, None, torch.zeros_like(grad[:, part]), None, -grad[:, part], None,
        )  # fmt: skip
        dw += more
        d_cols += more_cols
    return dx, dw, d_rows, d_cols


@_distill_backward.register_fake
def _(x, weight, row_scale, col_scale, *_):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, weight, row_scale, col_scale)
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.options, ctx.impl = inputs[6:9], inputs[9]


def _gradients(ctx, grad, *_):
    *arrays, row_max, row_log = ctx.saved_tensors
    out = torch.ops.mrl_fast.distill_backward(
        *arrays, *ctx.options, row_max, row_log, grad, ctx.impl
    )
    return *out, *[None] * 6


_distill.register_autograd(_gradients, setup_context=_save)
refuse_double_backward(_distill_backward)
