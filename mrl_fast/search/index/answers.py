"""The rows of an index that answer a checked question: what every kind of index searches by."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.graph import LEAST_SHARE, walks
from mrl_fast.search.index.rows import IndexRows
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.shared.types import Stage


class Asked(NamedTuple):
    """A search, checked against the options of an index.

    Attributes:
        queries: ``[B, d]`` floating point.
        dim: To search by, where there are no stages.
        stages: The last keeps k; None is an exact search.
    """

    queries: Tensor
    k: int
    dim: int
    stages: list[Stage] | None


class Found(NamedTuple):
    """What a search found.

    Attributes:
        scores, ids: As of a SearchResult.
        touched: ``[B]`` int64, as of an ExactResult; None of a search by stages.
        ranks: ``[B, k]``, what rows are ranked by, where it was asked for: of an exact search on
            the CPU the fp64 scores, which tell rows apart that are equal in fp32.
    """

    scores: Tensor
    ids: Tensor
    touched: Tensor | None
    ranks: Tensor | None = None


class FoundRange(NamedTuple):
    """What a range search found: as of a RangeResult, and ``ranks`` as of Found."""

    lims: Tensor
    scores: Tensor
    ids: Tensor
    ranks: Tensor


def nearest(
    rows: IndexRows, now: Snapshot, asked: Asked, allowed: Any, *, ranked: bool = False
) -> Found:
    """The k best of each query among the rows of a state of the index.

    Args:
        allowed: As ``search`` takes it.
        ranked: Rows are named by their numbers instead of their ids, and come with their ranks.
    """
    (_, k, dim, stages), metric = asked, rows.config.metric
    searched, q, _keepalive = _searched(rows, now, asked.queries, allowed)
    walk = {}
    if stages is not None and walks(stages):
        if now.graph is None:
            raise ValueError("stages[0]: expected a graph: build_graph() first, got none")
        if searched.eligible >= LEAST_SHARE * now.count:
            walk = {"graph": now.graph.native}
        else:  # a walk would pass through many rows for each that may be found
            dim, stages = stages[-1][0], None
    if ranked:
        searched = rows.backend.numbered(searched)
    if stages is not None:
        scores, ids = rows.backend.search_rows(q, searched, stages, metric, **walk)
        return Found(scores, ids, None, scores if ranked else None)
    if ranked:
        return Found(*rows.backend.ranked_exact_search(q, searched, dim, k, metric))
    return Found(*rows.backend.exact_search(q, searched, dim, k, metric))


def within(
    rows: IndexRows, now: Snapshot, asked: Asked, threshold: float, allowed: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Limits, scores and ids of the rows that reach a threshold."""
    searched, q, _keepalive = _searched(rows, now, asked.queries, allowed)
    return rows.backend.range_search(q, searched, asked.dim, threshold, rows.config.metric)


def ranked_within(
    rows: IndexRows, now: Snapshot, asked: Asked, threshold: float, allowed: Any
) -> FoundRange:
    """As ``within``, of rows by their numbers, with their ranks."""
    searched, q, _keepalive = _searched(rows, now, asked.queries, allowed)
    searched, metric = rows.backend.numbered(searched), rows.config.metric
    return FoundRange(*rows.backend.ranked_range_search(q, searched, asked.dim, threshold, metric))


def _searched(rows: IndexRows, now: Snapshot, q: Tensor, allowed: Any) -> tuple[Any, Tensor, Any]:
    """The rows to search, the queries in their space, and a keepalive for both."""
    q = rows.backend.queries(q, rows.config)
    searched, keepalive = rows.backend.restricted(now, inputs.allowed(allowed, now.size))
    if rows.rotation is not None and now.count:
        q = rows.backend.rotated(q, rows.rotation)
    return searched, q, keepalive
