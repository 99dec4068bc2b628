"""The fold over the columns of all ranks: this rank's rows against every rank's columns.

The forward folds this rank's columns, and those of the others as they pass, and merges the
statistics. The backward sends the columns around once more: scores are made again, their softmax is
that of the merged statistics, and what each rank finds for a column is summed on its way home.
Rows, and all that belongs to rows, stay. A row's target and its own columns are its rank's: what
passes is scores of others.
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
from mrl_fast.training.ops import (
    Fold,
    by_field,
    empty_fold,
    empty_gradients,
    or_empty,
    rounded,
    upstream_of,
)
from mrl_fast.training.ring.ranks import Ranks
from mrl_fast.training.ring.statistics import LogSum
from mrl_fast.training.ring.travel import Piece, Route, added, circulate
from mrl_fast.training.spec import NO_PERIOD, FoldSpec, Upstream, schema_of

MASK_BYTES = 1 << 24  # of a guide's cosines at a time


class Around(NamedTuple):
    """What a fold over all ranks takes beside a ``FoldSpec``, whose weight, column scales and
    target are this rank's, whose bias is one number for all columns, and whose mask has the columns
    of all ranks: block by block, in a block rank by rank."""

    group: str  # its name
    counts: Sequence[int]  # columns of each rank; none is as many on each
    blocks: int  # of equal size, that a rank's columns consist of
    frozen: bool = False  # columns take no gradient, on any rank
    # Scores are excluded where guide_rows @ guide_cols.T > guide_limit, but never a target's.
    guide_rows: Tensor | None = None  # [B, E] fp64
    guide_cols: Tensor | None = None  # [C, E] fp64
    guide_limit: Tensor | None = None  # [B, 1] fp64


def around(ranks: Ranks, counts: Sequence[int], blocks: int = 1) -> Around:
    """The ranks of a group, of which each has ``counts`` rows in each of its blocks."""
    counts = [] if torch.compiler.is_compiling() else [count * blocks for count in counts]
    return Around(ranks.group.group_name, counts, blocks)


def ring_fold(spec: FoldSpec, around: Around, impl: str) -> Fold:
    """``ops.fold`` against the columns of all ranks; collective, and so is its backward.

    Column statistics are those of this rank's columns over the rows of all ranks.
    """
    columns = spec.weight, spec.col_scale
    frozen = not any(t is not None and t.requires_grad for t in columns)
    around = around._replace(frozen=frozen)
    result = Fold(*_ring_once(*spec._replace(dims=list(spec.dims)), *around, impl))
    return result._replace(row_max=result.row_max.detach(), col_max=result.col_max.detach())


def exceeds(rows: Tensor, columns: Tensor, limit: Tensor) -> Tensor:
    """``rows @ columns.T > limit``, ``[B, C]`` bool; its scores in chunks of rows."""
    chunk = max(1, MASK_BYTES // (8 * max(1, len(columns))))
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        return torch.cat(
            [
                part @ columns.T > bound
                for part, bound in zip(rows.split(chunk), limit.split(chunk), strict=True)
            ]
        )


class _Problem:
    """A fold against every rank's columns, as this rank's own and as pieces of others."""

    def __init__(self, spec: FoldSpec, around: Around):
        self.spec, self.around = spec, around
        weight = spec.weight[:, : spec.dims[-1]]
        half = spec.compute_dtype is not None and spec.compute_dtype.itemsize < weight.itemsize
        # in half precision, where the weight was made of that, nothing is lost on the way
        self.carried = [weight.to(spec.compute_dtype) if half else weight]
        if spec.col_scale is not None:
            self.carried.append(spec.col_scale.T)
        if around.guide_cols is not None:
            self.carried.append(around.guide_cols)

    def route(self, carried: Sequence[Tensor]) -> Route:
        around = self.around
        return Route(around.group, around.counts, len(self.spec.weight), around.blocks, carried)

    def home(self, route: Route) -> FoldSpec:
        """The fold of this rank's columns."""
        spec, mask = self.spec, None
        if spec.mask is not None:
            parts = [spec.mask[:, columns] for columns in route.own_columns()]
            mask = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        elif self.around.guide_cols is not None:
            mask = self.hidden(self.around.guide_cols)
            if spec.target is not None:
                mask.scatter_(1, spec.target[:, None], False)
        return spec._replace(mask=mask, bias=self.bias(len(spec.weight)))

    def foreign(self, piece: Piece, held: Sequence[Tensor]) -> FoldSpec:
        """The fold of a piece: no row has its target there, nor any column of its own."""
        spec, mask = self.spec, None
        weight, *others = held
        if spec.mask is not None:
            mask = spec.mask[:, piece.columns]
        elif self.around.guide_cols is not None:
            mask = self.hidden(others[-1])
        return spec._replace(
            weight=weight.to(spec.weight.dtype), bias=self.bias(len(weight)), mask=mask,
            col_scale=None if spec.col_scale is None else others[0].T,
            target=None, period=NO_PERIOD, exclude_own=False,
        )  # fmt: skip

    def hidden(self, guides: Tensor) -> Tensor:
        rows, limit = self.around.guide_rows, self.around.guide_limit
        assert rows is not None and limit is not None
        return exceeds(rows, guides, limit)

    def bias(self, size: int) -> Tensor | None:
        return None if self.spec.bias is None else self.spec.bias.expand(size)


class _Statistics:
    """Those of this rank's rows over all columns that were folded so far."""

    def __init__(self, own: Fold, softmax: bool):
        self.own = own
        self.rows = LogSum.from_fold(own.row_max, own.row_log) if softmax else None
        self.sums = own.row_log.double()

    def add(self, f: Fold) -> None:
        if self.rows is None:
            self.sums = self.sums + f.row_log
        else:
            self.rows = self.rows.merged(LogSum.from_fold(f.row_max, f.row_log))

    def fold(self) -> Fold:
        own, rows = self.own, self.rows
        if rows is None:
            return own._replace(row_log=self.sums)
        hit = own.hit
        if hit is not None:  # relative to the log-sum of all columns
            y = hit.double() + own.row_log + own.row_max  # the target's score
            y = torch.where(own.row_max == -torch.inf, -torch.inf, y)
            hit = ((y - rows.top) - rows.log).float()
        return own._replace(row_max=rows.top.float(), row_log=rows.log, hit=hit)


def _column_sums(f: Fold) -> list[Tensor]:  # [n, G] fp64 each
    return [t.T.contiguous() for t in LogSum.from_fold(f.col_max, f.col_log)]


def _merge_columns(into: Sequence[Tensor], more: Sequence[Tensor]) -> None:
    for to, merged in zip(into, LogSum(*into).merged(LogSum(*more)), strict=True):
        to.copy_(merged)


@custom_op("mrl_fast::ring_fold", mutates_args=(), schema=schema_of(FoldSpec, Around, returns=6))
def _ring(*arguments: Any) -> tuple[Tensor, ...]:
    spec, around, _, impl = _split(arguments)
    problem, forward = _Problem(spec, around), module_of(impl, "training").fold_forward
    route = problem.route(problem.carried)
    own = Fold(*forward(problem.home(route)))
    statistics = _Statistics(own, spec.link == "softmax")
    home = _column_sums(own) if spec.columns else []

    def visit(piece: Piece, held: Sequence[Tensor]) -> Sequence[Tensor]:
        f = Fold(*forward(problem.foreign(piece, held)))
        statistics.add(f)
        return _column_sums(f) if spec.columns else []

    circulate(route, problem.carried, visit, home, _merge_columns if spec.columns else None)
    result = statistics.fold()
    if spec.columns:
        columns = LogSum(*(t.T.contiguous() for t in home))
        result = result._replace(col_max=columns.top.float(), col_log=columns.log)
    return rounded(result, spec.x)


def _split(arguments: Sequence[Any]) -> tuple[FoldSpec, Around, Sequence[Any], str]:
    *fields, impl = arguments
    first, second = len(FoldSpec._fields), len(FoldSpec._fields) + len(Around._fields)
    return FoldSpec(*fields[:first]), Around(*fields[first:second]), fields[second:], impl


@_ring.register_fake
def _(*arguments):
    return empty_fold(_split(arguments)[0])


@custom_op(
    "mrl_fast::ring_fold_backward",
    mutates_args=(),
    schema=schema_of(FoldSpec, Around, Upstream, returns=5),
)
def _ring_backward(*arguments: Any) -> tuple[Tensor, ...]:
    spec, around, given, impl = _split(arguments)
    upstream = Upstream(*given)
    problem, backward = _Problem(spec, around), module_of(impl, "training").fold_backward
    carried = [*problem.carried]
    if upstream.d_col is not None:
        by_column = upstream.col_max, upstream.col_log, upstream.d_col
        carried += [t.T for t in by_column if t is not None]
    route = problem.route(carried)
    dx, dw, db, d_row_scale, d_col_scale = backward(problem.home(route), upstream)
    db = None if db is None else db.sum()[None]
    home = [] if around.frozen else [dw[:, : spec.dims[-1]]]
    if d_col_scale is not None and not around.frozen:
        home.append(d_col_scale.T)
    # the softmax of a column with no target has d_row, and what its rows' targets leave to it
    d_row = upstream.d_row
    if spec.link == "softmax" and upstream.d_hit is not None:
        d_row = d_row - upstream.d_hit
    elsewhere = upstream._replace(d_row=d_row, d_hit=None)

    def visit(piece: Piece, held: Sequence[Tensor]) -> Sequence[Tensor]:
        there = elsewhere
        if upstream.d_col is not None:
            *held, col_max, col_log, d_col = (*held[:-3], *(t.T.contiguous() for t in held[-3:]))
            there = there._replace(col_max=col_max, col_log=col_log, d_col=d_col)
        fold_spec = problem.foreign(piece, held)
        _, dw, more_b, more_scale, d_col_scale = backward(fold_spec, there, dx)
        for total, more in ((db, more_b), (d_row_scale, more_scale)):
            if total is not None and more is not None:
                total += more.sum() if total is db else more
        if around.frozen:
            return []
        return [dw] if d_col_scale is None else [dw, d_col_scale.T.contiguous()]

    circulate(route, carried, visit, home, None if around.frozen else added)
    return or_empty(spec.x, (dx, dw, db, d_row_scale, d_col_scale))


@_ring_backward.register_fake
def _(*arguments):
    return empty_gradients(_split(arguments)[0])


GUIDES = ("guide_rows", "guide_cols", "guide_limit")


def _save(ctx, inputs, output) -> None:
    spec, around, _, ctx.impl = _split(inputs)
    f = Fold(*output)
    ctx.set_materialize_grads(False)
    ctx.around = around._replace(**dict.fromkeys(GUIDES))
    guides = [getattr(around, name) for name in GUIDES]
    save_spec(ctx, spec, f.row_max, f.row_log, f.col_max, f.col_log, *guides)


def _gradients(ctx, *gradients):
    spec, (*statistics, rows, cols, limit) = saved_spec(ctx)
    around = ctx.around._replace(guide_rows=rows, guide_cols=cols, guide_limit=limit)
    upstream = upstream_of(spec, statistics, Fold(*gradients))
    found = _ring_backward_once(*spec, *around, *upstream, ctx.impl)
    return *by_field(ctx, spec, found), *[None] * len(around), None


_ring_backward_once = differentiated(_ring_backward)
_ring_once = differentiable(_ring, _save, _gradients)
