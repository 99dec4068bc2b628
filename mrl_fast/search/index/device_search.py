"""The backend on a device, by Triton kernels, without waiting for it; ``host_search`` offers the
same functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.kernels.search import certified, funnel
from mrl_fast.kernels.search.keys import empty, scores_of
from mrl_fast.kernels.search.pair_scores import Pairs
from mrl_fast.kernels.search.plan import KnownRows, fitting
from mrl_fast.kernels.search.topk import topk
from mrl_fast.kernels.shared.device import captures, on_its_device
from mrl_fast.kernels.shared.tiling import columns, operand
from mrl_fast.search.index.blocks import Layout
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.device_metrics import DEVICE_METRICS
from mrl_fast.search.index.device_rows import DeviceCopy, DeviceRows
from mrl_fast.search.index.rotation import Rotation
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.search.index.store import RowStore
from mrl_fast.shared.checks import check_finite
from mrl_fast.shared.types import Stage

Result = tuple[Tensor, Tensor]
LEAST_SCALE = 2.0**-100  # of a query's codes


def new_store(layout: Layout, config: IndexConfig) -> RowStore:
    return RowStore(layout, DeviceCopy(config.dims, config.metric, layout, config.place))


def queries(q: Tensor, config: IndexConfig) -> Tensor:
    """``[B, D]`` on the device, fp32 or as the vectors are stored; finite, as far as the host can
    see without waiting."""
    if q.device.type == "cpu":
        check_finite(q, "queries")
    return q.to(config.place, q.dtype if q.dtype == config.stored_dtype else torch.float32)


def restricted(now: Snapshot, allowed: Tensor | None) -> tuple[DeviceRows, Any]:
    """The rows of a snapshot that are live and allowed, as of ``Snapshot.flags``, and a keepalive
    for what they point to."""
    rows: DeviceRows = now.device_rows
    if allowed is None:
        return rows, now
    if not (allowed.dtype == torch.bool and now.live is None):
        allowed = now.flags(allowed.cpu())
    return rows.only(allowed), now


@on_its_device
def rotated(queries: Tensor, rotation: Rotation) -> Tensor:
    """``queries @ axes.T``; a row's bits do not depend on the others."""
    axes = rotation.on(queries.device)
    columns = torch.arange(len(axes), dtype=torch.int64, device=axes.device)
    parts = queries.split(fitting(16 * len(axes)))
    return torch.cat(
        [scores_of(Pairs(q, axes, "ip").keys(columns.expand(len(q), -1))) for q in parts]
    )


@on_its_device
def search_rows(q: Tensor, rows: DeviceRows, stages: Sequence[Stage], metric: str) -> Result:
    """Runs the stages. Where there are codes, a first stage of their width ranks by them unless it
    is the last, and the next stage begins at the first column."""
    (dim, *_, keep), *later = stages
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
    result, q, x = empty(q, k), columns(q, dim), columns(rows.vectors, dim)
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
    whole, x = _known(rows, dim, metric, ids=rows.ids), columns(rows.vectors, dim)
    return certified.range_search(columns(q, dim), x, threshold, metric, whole)


def _known(rows: DeviceRows, dim: int, metric: str, *, ids: Tensor | None = None) -> KnownRows:
    """For a search by the first ``dim`` columns."""
    g, terms = rows.dims.index(dim), DEVICE_METRICS[metric]
    here = slice(g, g + 1)
    largest = terms.largest(rows.largest[here], rows.smallest[here])
    sum_terms = terms.sum_terms(_factors(rows, g, metric), rows.out)
    return KnownRows(sum_terms, largest, rows.allowed, ids)


def _factors(rows: DeviceRows, g: int, metric: str) -> Tensor | None:
    return None if DEVICE_METRICS[metric].factor is None else rows.factors[g]


def _prefix(rows: DeviceRows, dim: int, metric: str) -> certified.Prefix | None:
    first = rows.dims[0]
    if first == dim:
        return None
    whole = _known(rows, dim, metric)
    assert whole.terms is not None
    bounds = whole._replace(terms=whole.terms._replace(outer=rows.suffixes))
    return certified.Prefix(first, _known(rows, first, metric), bounds)


def _by_codes(q: Tensor, rows: DeviceRows, metric: str) -> tuple[Tensor, KnownRows]:
    """Queries in int8, and the terms that turn sums of products of codes into scores. A query's
    scale is left out of its scores, as only their order counts."""
    head, terms = q[:, : rows.dims[0]].float(), DEVICE_METRICS[metric]
    scale = head.abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale > LEAST_SCALE, scale, 1.0)  # of zeros, or of as good as nothing
    codes = (head / scale).round().to(torch.int8)
    sum_terms = terms.code_sum_terms(rows.scales, rows.out, _factors(rows, 0, metric), scale[:, 0])
    # The margin is a shortlist's: no sum times its scale is larger than 127 · 127 · dim · largest.
    return codes, KnownRows(
        sum_terms, terms.code_largest(rows.largest[:1]), rows.allowed, linear=True
    )


def _in_use(rows: DeviceRows) -> None:
    """Keeps the rows' memory, once a later state frees it, from being reused before this stream has
    read it; in a captured graph, as long as the index lives."""
    arrays: list[Any] = [x for x in rows if isinstance(x, Tensor)]
    if captures(rows.vectors):
        rows.captured.update((x.untyped_storage().data_ptr(), x) for x in arrays)
    elif rows.vectors.is_cuda:
        stream = torch.cuda.current_stream(rows.vectors.device)
        for x in arrays:
            x.record_stream(stream)
