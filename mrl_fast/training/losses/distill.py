"""Distillation of similarity rows: every student prefix against a teacher's softmax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from mrl_fast.shared.checks import check_choice, check_matrix, check_number, check_same_device
from mrl_fast.shared.dispatch import choose, module_of
from mrl_fast.shared.types import NestedLoss
from mrl_fast.training import reference
from mrl_fast.training.differentiation import (
    differentiable,
    differentiated,
    save_spec,
    saved_spec,
)
from mrl_fast.training.losses.embeddings import Side, check_pairs
from mrl_fast.training.losses.reductions import check_dim_weights, nested_loss
from mrl_fast.training.ops import Fold
from mrl_fast.training.spec import FoldSpec, Upstream, schema_of

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
        teacher_kind: ``"vectors"`` or ``"scores"``. None tells by the shapes: one tensor beside a
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
    temperature = check_number(temperature, "temperature", above=True)
    dim_weights = check_dim_weights(dim_weights, len(dims), queries)
    rows, cols = _check_teacher(teacher, teacher_kind, queries, documents, single)

    impl = choose(impl, queries, documents)
    if impl == "reference":
        kl = reference.distill_rows(queries, documents, dims, rows, cols, temperature)
    else:
        q = Side.from_embeddings(queries, dims)
        d = q if single else Side.from_embeddings(documents, dims)
        if cols is not None:
            rows, cols = F.normalize(rows.float()), F.normalize(cols.float())
        spec = DistillSpec(
            q.x, d.x, list(dims), q.scaled(1 / temperature), d.inverse, rows.detach(),
            None if cols is None else cols.detach(), temperature, q.compute_dtype,
        )  # fmt: skip
        kl, _, _ = _distill_once(*spec, impl)
    return nested_loss(kl * temperature**2, dim_weights, "mean", len(queries))


def _check_sides(pair: Any, name: str) -> tuple[Tensor, Tensor]:
    """The two sides: a tensor twice, or the two tensors of a pair."""
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


class DistillSpec(NamedTuple):
    """What the op reads: the student's sides in fp32, and the teacher."""

    x: Tensor  # [B, D]
    weight: Tensor  # [C, D]
    dims: Sequence[int]
    row_scale: Tensor  # [G, B] fp32
    col_scale: Tensor  # [G, C] fp32
    rows: Tensor  # the teacher's scores [B, C], or its normalised rows [B, E]
    cols: Tensor | None  # [C, E]
    temperature: float
    compute_dtype: torch.dtype | None

    def chunks(self) -> Iterator[tuple[slice, Tensor, FoldSpec]]:
        """Ranges of rows, the teacher's log-probabilities there, and the student's fold."""
        step = max(64, CHUNK_BYTES // (4 * max(1, len(self.weight))))
        for begin in range(0, len(self.rows), step):
            part = slice(begin, min(begin + step, len(self.rows)))
            rows, cols = self.rows[part], self.cols
            # The backward makes these again, and must get the same in any autocast context.
            with torch.autocast(rows.device.type, enabled=False):
                scores = rows.float() if cols is None else rows @ cols.T
                logp = (scores / self.temperature).log_softmax(1)
            yield (
                part,
                logp,
                FoldSpec(
                    self.x[part], self.weight, self.dims, row_scale=self.row_scale[:, part],
                    col_scale=self.col_scale, soft=logp.exp(), compute_dtype=self.compute_dtype,
                ),
            )  # fmt: skip


class Student(NamedTuple):
    """Statistics of the forward, and the loss's derivative with respect to the KL: ``[G, B]``."""

    row_max: Tensor
    row_log: Tensor
    d_kl: Tensor


@custom_op("mrl_fast::distill", mutates_args=(), schema=schema_of(DistillSpec, returns=3))
def _distill(*arguments):
    """KL of every row and prefix, and the student's two statistics, ``[G, B]`` each."""
    *fields, impl = arguments
    spec = DistillSpec(*fields)
    kl, row_max, row_log = (torch.empty_like(spec.row_scale) for _ in range(3))
    for part, logp, fold_spec in spec.chunks():
        f = Fold(*module_of(impl, "training").fold_forward(fold_spec))
        row_max[:, part], row_log[:, part] = f.row_max, f.row_log
        p = logp.exp()
        entropy = torch.where(p > 0, p * logp, 0.0).double().sum(1)  # −H, [b]
        kl[:, part] = (entropy - f.soft_sum).float()  # a small difference of larger numbers
    return kl, row_max, row_log


@_distill.register_fake
def _(*arguments):
    *fields, _ = arguments
    return tuple(torch.empty_like(DistillSpec(*fields).row_scale) for _ in range(3))


@custom_op(
    "mrl_fast::distill_backward", mutates_args=(), schema=schema_of(DistillSpec, Student, returns=4)
)
def _distill_backward(*arguments):
    *fields, impl = arguments
    size = len(DistillSpec._fields)
    spec, student = DistillSpec(*fields[:size]), Student(*fields[size:])
    dx, dw, d_rows, d_cols = (
        torch.zeros_like(t, memory_format=torch.contiguous_format)
        for t in (spec.x, spec.weight, spec.row_scale, spec.col_scale)
    )
    for part, _, fold_spec in spec.chunks():
        row_max, row_log, d_kl = (t[:, part] for t in student)
        upstream = Upstream(row_max, row_log, None, None, torch.zeros_like(d_kl), None, -d_kl, None)
        found = module_of(impl, "training").fold_backward(fold_spec, upstream)
        dx[part], more, _, d_rows[:, part], more_cols = found
        dw += more
        d_cols += more_cols
    return dx, dw, d_rows, d_cols


@_distill_backward.register_fake
def _(*arguments):
    spec = DistillSpec(*arguments[: len(DistillSpec._fields)])
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (spec.x, spec.weight, spec.row_scale, spec.col_scale)
    )


def _save(ctx, inputs, output) -> None:
    *fields, ctx.impl = inputs
    _, *statistics = output
    save_spec(ctx, DistillSpec(*fields), *statistics)


def _gradients(ctx, d_kl, *_):
    spec, statistics = saved_spec(ctx)
    dx, dw, d_row_scale, d_col_scale = _distill_backward_once(*spec, *statistics, d_kl, ctx.impl)
    found = dict(x=dx, weight=dw, row_scale=d_row_scale, col_scale=d_col_scale)
    return *map(found.get, spec._fields), None


_distill_backward_once = differentiated(_distill_backward)
_distill_once = differentiable(_distill, _save, _gradients)
