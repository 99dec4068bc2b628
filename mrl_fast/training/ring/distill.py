"""Distillation over the columns of all ranks: student documents travel, and the teacher's with
them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from mrl_fast.training.differentiation import (
    differentiable,
    differentiated,
    save_spec,
    saved_spec,
)
from mrl_fast.training.distillation import (
    DistillSpec,
    Divergence,
    Student,
    divergence,
    empty_divergence,
    empty_gradients,
    student_gradients,
)
from mrl_fast.training.ring.fold import Around
from mrl_fast.training.ring.statistics import LogSum
from mrl_fast.training.ring.travel import Piece, Route, added, circulate
from mrl_fast.training.spec import schema_of


def ring_distill(spec: DistillSpec, around: Around, impl: str) -> Tensor:
    """``[G, B]``: the KL divergence of this rank's rows over the columns of all ranks; collective,
    and so is its backward. Scores that are given have columns for all ranks, rank by rank."""
    frozen = not (spec.weight.requires_grad or spec.col_scale.requires_grad)
    return _ring_once(*spec, around.group, around.counts, frozen, impl)[0]


class Way(NamedTuple):
    """Of ``Around``, what matters here."""

    group: str
    counts: Sequence[int]
    frozen: bool


class _Problem:
    """A distillation, as that of this rank's own columns and of pieces of others."""

    def __init__(self, spec: DistillSpec, way: Way):
        self.spec = spec
        weight, half = spec.weight[:, : spec.dims[-1]], spec.compute_dtype is not None
        self.carried = [weight.to(spec.compute_dtype) if half else weight, spec.col_scale.T]
        if spec.cols is not None:
            self.carried.append(spec.cols)
        self.route = Route(way.group, way.counts, len(weight), 1, self.carried)

    def home(self) -> DistillSpec:
        (own,) = self.route.own_columns()
        rows = self.spec.rows
        return self.spec._replace(rows=rows[:, own] if self.spec.cols is None else rows)

    def foreign(self, piece: Piece, held: Sequence[Tensor]) -> DistillSpec:
        weight, col_scale, *cols = held
        rows = self.spec.rows
        return self.spec._replace(
            weight=weight.to(self.spec.weight.dtype),
            col_scale=col_scale.T.contiguous(),
            rows=rows if cols else rows[:, piece.columns],
            cols=cols[0] if cols else None,
        )


class _Merged(NamedTuple):
    """Divergences of parts of the columns, and what they weigh."""

    kl: Tensor  # [G, B] fp64
    rows: LogSum  # of the student
    log_sum: Tensor  # [B] fp64, of the teacher

    @classmethod
    def from_part(cls, d: Divergence) -> _Merged:
        return cls(d.kl, LogSum.from_fold(d.row_max, d.row_log), d.log_sum)

    def merged(self, other: _Merged) -> _Merged:
        """With teacher's and student's weights w and v of a part, Σ w · (kl + log w − log v)."""
        rows, log_sum = self.rows.merged(other.rows), self.log_sum.logaddexp(other.log_sum)

        def share(part: _Merged) -> Tensor:
            log_w = part.log_sum - torch.where(log_sum == -torch.inf, 0.0, log_sum)
            log_v = (part.rows.top - rows.top) + (part.rows.log - rows.log)
            w = log_w.exp()
            return torch.where(w == 0, 0.0, w * (part.kl + log_w - log_v))

        return _Merged(share(self) + share(other), rows, log_sum)


@custom_op("mrl_fast::ring_distill", mutates_args=(), schema=schema_of(DistillSpec, Way, returns=4))
def _ring(*arguments: Any) -> tuple[Tensor, ...]:
    """KL, the student's statistics ``[G, B]``, and the teacher's log-sums, ``[B]`` fp64."""
    spec, way, _, impl = _split(arguments)
    problem = _Problem(spec, way)
    found = _Merged.from_part(divergence(problem.home(), impl))

    def visit(piece: Piece, held: Sequence[Tensor]) -> Sequence[Tensor]:
        nonlocal found
        found = found.merged(_Merged.from_part(divergence(problem.foreign(piece, held), impl)))
        return []

    circulate(problem.route, problem.carried, visit)
    return found.kl.float(), found.rows.top.float(), found.rows.log.float(), found.log_sum


def _split(arguments: Sequence[Any]) -> tuple[DistillSpec, Way, Sequence[Any], str]:
    *fields, impl = arguments
    first, second = len(DistillSpec._fields), len(DistillSpec._fields) + len(Way._fields)
    return DistillSpec(*fields[:first]), Way(*fields[first:second]), fields[second:], impl


@_ring.register_fake
def _(*arguments):
    return empty_divergence(_split(arguments)[0])


@custom_op(
    "mrl_fast::ring_distill_backward",
    mutates_args=(),
    schema=schema_of(DistillSpec, Way, Student, returns=4),
)
def _ring_backward(*arguments: Any) -> tuple[Tensor, ...]:
    spec, way, given, impl = _split(arguments)
    student, problem = Student(*given), _Problem(spec, way)
    dx, dw, d_row_scale, d_col_scale = student_gradients(problem.home(), student, impl)
    home = [] if way.frozen else [dw[:, : spec.dims[-1]], d_col_scale.T]

    def visit(piece: Piece, held: Sequence[Tensor]) -> Sequence[Tensor]:
        more = student_gradients(problem.foreign(piece, held), student, impl)
        dx.add_(more[0])
        d_row_scale.add_(more[2])
        return [] if way.frozen else [more[1], more[3].T.contiguous()]

    circulate(problem.route, problem.carried, visit, home, None if way.frozen else added)
    return dx, dw, d_row_scale, d_col_scale


@_ring_backward.register_fake
def _(*arguments):
    return empty_gradients(_split(arguments)[0])


def _save(ctx, inputs, output) -> None:
    spec, ctx.way, _, ctx.impl = _split(inputs)
    _, *statistics = output
    save_spec(ctx, spec, *statistics)


def _gradients(ctx, d_kl, *_):
    spec, statistics = saved_spec(ctx)
    found = _ring_backward_once(*spec, *ctx.way, *statistics, d_kl, ctx.impl)
    by_name = dict(zip(("x", "weight", "row_scale", "col_scale"), found, strict=True))
    return *map(by_name.get, spec._fields), *[None] * len(ctx.way), None


_ring_backward_once = differentiated(_ring_backward)
_ring_once = differentiable(_ring, _save, _gradients)
