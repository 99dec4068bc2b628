"""Distillation of similarity rows: every student prefix against a teacher's softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from mrl_fast.shared.checks import check_choice, check_matrix, check_number, check_same_device
from mrl_fast.shared.dispatch import choose
from mrl_fast.shared.types import NestedLoss
from mrl_fast.training import reference
from mrl_fast.training.differentiation import (
    differentiable,
    differentiated,
    save_spec,
    saved_spec,
)
from mrl_fast.training.distillation import (
    DistillSpec,
    Student,
    divergence,
    empty_divergence,
    empty_gradients,
    student_gradients,
)
from mrl_fast.training.losses.embeddings import Side, check_pairs
from mrl_fast.training.losses.reductions import check_dim_weights, nested_loss
from mrl_fast.training.ring.distill import ring_distill
from mrl_fast.training.ring.fold import around
from mrl_fast.training.ring.ranks import check_ranks, gather_rows
from mrl_fast.training.spec import schema_of

Pair = Tensor | tuple[Tensor, Tensor]


def matryoshka_distill(
    student: Pair,
    teacher: Pair,
    dims: Sequence[int],
    *,
    dim_weights: Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    teacher_kind: str | None = None,
    group: Any = None,
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
        group: A ``torch.distributed`` process group: queries are compared with the documents (a
            single student's rows) of all ranks, which travel from rank to rank with the teacher's
            vectors; a teacher's scores are ``[B, C]`` with the C of all ranks, rank by rank. The
            same holds of gradients, of ranks' numbers of rows and of the call and its backward as
            in ``matryoshka_info_nce``.
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
    impl = choose(impl, queries, documents)
    ranks, columns = None, len(documents)
    if group is not None:
        options = dims, temperature, isinstance(teacher, Tensor), teacher_kind, impl == "reference"
        ranks = check_ranks(group, queries, [documents], *options)
        columns = sum(ranks.documents)
    rows, cols = _check_teacher(teacher, teacher_kind, queries, documents, (single, columns))
    rows, cols = rows.detach(), None if cols is None else cols.detach()
    count = len(queries) if ranks is None else ranks.mean_queries
    if impl == "reference":
        if ranks is not None:
            documents = gather_rows(documents, ranks.documents, ranks)
            cols = None if cols is None else gather_rows(cols, ranks.documents, ranks)
        kl = reference.distill_rows(queries, documents, dims, rows, cols, temperature)
    else:
        q = Side.from_embeddings(queries, dims)
        d = q if single else Side.from_embeddings(documents, dims)
        if cols is not None:
            rows, cols = F.normalize(rows.float()), F.normalize(cols.float())
        spec = DistillSpec(
            q.x, d.x, list(dims), q.scaled(1 / temperature), d.inverse, rows, cols, temperature,
            q.compute_dtype,
        )  # fmt: skip
        if ranks is None:
            kl = _distill_once(*spec, impl)[0]
        else:
            kl = ring_distill(spec, around(ranks, ranks.documents), impl)
    return nested_loss(kl * temperature**2, dim_weights, "mean", count)


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
    teacher: Pair,
    kind: str | None,
    queries: Tensor,
    documents: Tensor,
    student: tuple[bool, int],
) -> tuple[Tensor, Tensor | None]:
    """The teacher's two sides, or its scores and None. ``student``: whether it is a single tensor,
    and the documents that it is compared with, on all ranks."""
    single, columns = student
    shape = [len(queries), columns]
    if kind is not None:
        check_choice(kind, "teacher_kind", ("vectors", "scores"))
    rows, cols = _check_sides(teacher, "teacher")
    if not isinstance(teacher, Tensor):
        if kind == "scores":
            raise ValueError("teacher: expected one tensor of scores, got a pair")
        for name, side, count in (
            ("teacher[0]", rows, shape[0]),
            ("teacher[1]", cols, len(documents)),
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


@custom_op("mrl_fast::distill", mutates_args=(), schema=schema_of(DistillSpec, returns=4))
def _distill(*arguments):
    """KL of every row and prefix, and the student's two statistics, ``[G, B]`` each; the teacher's
    log-sums, ``[B]`` fp64."""
    *fields, impl = arguments
    found = divergence(DistillSpec(*fields), impl)
    return found.kl.float(), found.row_max, found.row_log.float(), found.log_sum


@_distill.register_fake
def _(*arguments):
    *fields, _ = arguments
    return empty_divergence(DistillSpec(*fields))


@custom_op(
    "mrl_fast::distill_backward", mutates_args=(), schema=schema_of(DistillSpec, Student, returns=4)
)
def _distill_backward(*arguments):
    *fields, impl = arguments
    size = len(DistillSpec._fields)
    return student_gradients(DistillSpec(*fields[:size]), Student(*fields[size:]), impl)


@_distill_backward.register_fake
def _(*arguments):
    return empty_gradients(DistillSpec(*arguments[: len(DistillSpec._fields)]))


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
