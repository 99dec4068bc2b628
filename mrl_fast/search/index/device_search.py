"""Search of an index's rows on a device, by Triton kernels, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.kernels.search import certified, funnel
from mrl_fast.kernels.search.keys import empty, scores_of
from mrl_fast.kernels.search.metrics import SAFE_NORM, SumTerms
from mrl_fast.kernels.search.pair_scores import Pairs
from mrl_fast.kernels.search.plan import KnownRows, fitting
from mrl_fast.kernels.search.topk import topk
from mrl_fast.kernels.shared.device import on_its_device
from mrl_fast.kernels.shared.tiling import operand
from mrl_fast.search.index.device_rows import DeviceRows
from mrl_fast.search.index.rotation import Rotation
from mrl_fast.search.index.snapshot import Snapshot

Result = tuple[Tensor, Tensor]
UNIT = 2.0**-100  # of a query's codes, at least


def restricted(now: Snapshot, allowed: Tensor | None) -> tuple[DeviceRows, Any]:
    """The rows of a snapshot that are alive and allowed, as of ``Snapshot.flags``, and what must be
    kept meanwhile."""
    rows: DeviceRows = now.device_rows
    if allowed is None:
        return rows, now
    if not (allowed.dtype == torch.bool and now.alive is None):
        allowed = now.flags(allowed.cpu())
    return rows.only(allowed), now


@on_its_device
def rotated(queries: Tensor, rotation: Rotation) -> Tensor:
    """``queries @ axes.T``; a row's bits do not depend on the others."""
    axes = rotation.on(queries.device)
    columns = torch.arange(len(axes), device=axes.device)
    parts = queries.split(fitting(16 * len(axes)))
    return torch.cat(
        [scores_of(Pairs(q, axes, "ip").keys(columns.expand(len(q), -1))) for q in parts]
    )


@on_its_device
def search_rows(
    q: Tensor, rows: DeviceRows, stages: Sequence[tuple[int, int]], metric: str
) -> Result:
    """Runs the stages. Where there are codes, a first stage of their width that is not the last
    ranks by them, and the next begins at the first column."""
    (dim, keep), *later = stages
    _in_use(rows)
    found = empty(q, keep)
    if later and rows.codes is not None and dim == rows.dims[0]:
        codes, known = _by_codes(q, rows, metric)
        topk(codes, operand(rows.codes), keep, "ip", found, known)
        scored = 0
    else:
        x, scored = operand(rows.vectors[:, :dim]), dim
        known = _known(rows, dim, metric, ids=None if later else rows.ids)
        topk(q[:, :dim], x, keep, metric, found, known)
    return funnel.rerank_stages(q, rows.vectors, found, later, metric, scored=scored, ids=rows.ids)


@on_its_device
def exact_search(
    q: Tensor, rows: DeviceRows, dim: int, k: int, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best by fp64 scores rounded to fp32; and how many rows of each query were read beyond
    their prefix."""
    _in_use(rows)
    result, x = empty(q, k), operand(rows.vectors)
    whole = _known(rows, dim, metric, ids=rows.ids)
    touched = certified.exact_topk(q, x, k, metric, result, whole, _prefix(rows, dim, metric))
    return *result, touched


@on_its_device
def range_search(
    q: Tensor, rows: DeviceRows, dim: int, threshold: float, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Limits, scores and ids of every row that reaches the threshold, as exact search scores it.
    Waits for the device."""
    _in_use(rows)
    whole = _known(rows, dim, metric, ids=rows.ids)
    return certified.range_search(q, operand(rows.vectors), threshold, metric, whole)


def _known(rows: DeviceRows, dim: int, metric: str, *, ids: Tensor | None = None) -> KnownRows:
    """For a search by the first ``dim`` columns."""
    g = rows.dims.index(dim)
    largest, scale, term = rows.largest[g : g + 1], None, rows.out
    if metric == "cosine":
        scale = rows.factors[g]
        one = torch.ones_like(largest)
        largest = torch.where(rows.smallest[g : g + 1] > SAFE_NORM, one, torch.inf)
    if metric == "l2":
        term = rows.factors[g] if rows.out is None else rows.factors[g] + rows.out
    return KnownRows(SumTerms(scale=scale, term=term), largest, rows.allowed, ids)


def _prefix(rows: DeviceRows, dim: int, metric: str) -> certified.Prefix | None:
    first = rows.dims[0]
    if first == dim:
        return None
    whole = _known(rows, dim, metric)
    assert whole.terms is not None
    bounds = whole._replace(terms=whole.terms._replace(outer=rows.tails))
    return certified.Prefix(first, _known(rows, first, metric), bounds)


def _by_codes(q: Tensor, rows: DeviceRows, metric: str) -> tuple[Tensor, KnownRows]:
    """Queries as codes, and what makes scores of sums of products of codes. Their scale is of one
    query; the order of rows is what counts."""
    head = q[:, : rows.dims[0]].float()
    unit = head.abs().amax(dim=1, keepdim=True) / 127
    unit = torch.where(unit > UNIT, unit, 1.0)  # of zeros, or of as good as nothing
    codes = (head / unit).round().to(torch.int8)
    # The margin is of shortlists: no sum times its scale is larger than 127 · 127 · dim · this.
    terms, largest = SumTerms(scale=rows.units, term=rows.out), rows.largest[:1] * 2
    if metric == "cosine":
        largest = torch.ones_like(largest) * 2
    if metric == "l2":  # ⟨q, x⟩ − ‖x‖²/2, in the query's unit
        terms = terms._replace(outer=rows.factors[0], factor=unit[:, 0].reciprocal())
        largest = largest + largest * largest
    return codes, KnownRows(terms, largest, rows.allowed, linear=True)


def _in_use(rows: DeviceRows) -> None:
    """Keeps memory that a later state frees from being given away before this stream is done."""
    if rows.vectors.is_cuda and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(rows.vectors.device)
        arrays: list[Any] = [x for x in rows if isinstance(x, Tensor)]
        for x in arrays:
            x.record_stream(stream)
