"""The backend on a device, by Triton kernels, without waiting for it; ``host_search`` offers the
same functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.kernels.search import certified, funnel
from mrl_fast.kernels.search.coarse import Codes, Prefix
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
    """Runs the stages. A first stage with bits ranks by codes, and so does one of a coded prefix
    unless it is the last; the next stage then begins at the first column."""
    (dim, *bits, keep), *later = stages
    _in_use(rows)
    found, prefix = empty(q, keep), rows.outers is None and dim == rows.dims[0]
    codes = _codes(rows, metric) if bits or (later and prefix) else None
    if codes:
        coded, ranks, known = codes.ranking(q[:, :dim], metric)
        topk(coded, codes.x, keep, ranks, found, known)
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
    form = _codes_of(rows, dim, metric) or _prefix(rows, dim, metric)
    touched = certified.exact_topk(q, x, k, metric, result, whole, form)
    return *result, touched


@on_its_device
def range_search(
    q: Tensor, rows: DeviceRows, dim: int, threshold: float, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Limits, scores and ids of every row that reaches the threshold, as exact search scores it.
    Waits for the device."""
    _in_use(rows)
    whole, x = _known(rows, dim, metric, ids=rows.ids), columns(rows.vectors, dim)
    form = _codes_of(rows, dim, metric) or Prefix(x, whole, whole)
    return certified.range_search(columns(q, dim), x, threshold, metric, whole, form)


def numbered(rows: DeviceRows) -> DeviceRows:
    """The same rows, named in results by their numbers."""
    place = rows.ids.device
    return rows._replace(ids=torch.arange(len(rows.ids), dtype=torch.int64, device=place))


def name(now: Snapshot, numbers: Tensor) -> Tensor:
    """The ids of rows by their numbers, −1 of −1; of any shape, int64."""
    if not now.count:
        return numbers
    ids = now.device_rows.ids[numbers.clamp_min(0)]
    return ids.masked_fill_(numbers < 0, -1)


def ranked_exact_search(
    q: Tensor, rows: DeviceRows, dim: int, k: int, metric: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``exact_search``; and the scores once more, as rows are ranked by these."""
    found = exact_search(q, rows, dim, k, metric)
    return *found, found[0]


def ranked_range_search(
    q: Tensor, rows: DeviceRows, dim: int, threshold: float, metric: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``range_search``; and the scores once more, as rows are ranked by these."""
    found = range_search(q, rows, dim, threshold, metric)
    return *found, found[1]


def _known(rows: DeviceRows, dim: int, metric: str, *, ids: Tensor | None = None) -> KnownRows:
    """For a search by the first ``dim`` columns."""
    g, terms = rows.dims.index(dim), DEVICE_METRICS[metric]
    sum_terms = terms.sum_terms(_factors(rows, g, metric), rows.out)
    return KnownRows(sum_terms, rows.norms[g : g + 1], rows.allowed, ids)


def _factors(rows: DeviceRows, g: int, metric: str) -> Tensor | None:
    return None if DEVICE_METRICS[metric].factor is None else rows.factors[g]


def _prefix(rows: DeviceRows, dim: int, metric: str) -> Prefix | None:
    first = rows.dims[0]
    if first == dim:
        return None
    whole = _known(rows, dim, metric)
    assert whole.terms is not None
    bounds = whole._replace(terms=whole.terms._replace(outer=rows.suffixes))
    return Prefix(operand(rows.vectors[:, :first]), _known(rows, first, metric), bounds)


def _codes_of(rows: DeviceRows, dim: int, metric: str) -> Codes | None:
    """Codes of all of ``dim`` columns, by which scores are bounded."""
    return None if rows.outers is None or dim < rows.dims[-1] else _codes(rows, metric)


def _codes(rows: DeviceRows, metric: str) -> Codes | None:
    """Of all columns or of the first prefix; None: there are none."""
    if rows.codes is None or rows.scales is None:
        return None
    g = 0 if rows.outers is None else len(rows.dims) - 1
    norm, term, allowed = rows.norms[g : g + 1], rows.out, rows.allowed
    linear = None if DEVICE_METRICS[metric].added is None else rows.factors[g]
    return Codes(operand(rows.codes), rows.scales, norm, linear, rows.outers, term, allowed)


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
