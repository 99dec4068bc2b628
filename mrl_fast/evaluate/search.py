"""What a search finds: by labels, by grades, and against the exact answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast.evaluate.common import arange, checked_labels, checked_vectors, numbered
from mrl_fast.search.ops import prefix_topk, rerank
from mrl_fast.shared.arrays import HIGHEST, as_integers, as_vectors
from mrl_fast.shared.checks import check_choice, check_int
from mrl_fast.shared.recall import count_found
from mrl_fast.shared.types import SearchResult

DIVISORS = ("k", "relevant")
GAINS = ("linear", "exponential")


class Retrieval(NamedTuple):
    """Means over the queries, each in ``[0, 1]``; a query that nothing is relevant to counts as 0.

    Attributes:
        map: mAP@k, Σ_i precision@i · hit_i over k, or over the number of relevant rows.
        precision: precision@k, hits among k places: places that are empty count.
        ndcg: nDCG@k, Σ_i gain_i / log2(i + 1) over the same of the best possible k.
        top1: Share of queries whose first row is relevant.
        mrr: MRR@k, 1 over the place of the first hit, 0 where there is none among k.
        recall: recall@k, the share of the relevant rows that are among the k.
    """

    map: float
    precision: float
    ndcg: float
    top1: float
    mrr: float
    recall: float


class Qrels(NamedTuple):
    """Graded judgements of (query, row) pairs, in any order; pairs that are not there have grade 0.

    Attributes:
        queries: ``[J]`` integers, places in ``[0, B)``.
        ids: ``[J]`` integers, ids of rows, not negative.
        grades: ``[J]`` integers, not negative; above 0 is relevant.
    """

    queries: Any
    ids: Any
    grades: Any

    @classmethod
    def of(cls, judgements: Mapping[int, Mapping[int, int] | Collection[int]]) -> Qrels:
        """From ``{query: {id: grade}}``, or ``{query: {id, …}}``, all of grade 1; on the CPU.

        Queries and ids are integers. Of data sets that name them by strings (TREC, BEIR) each is
        replaced by its place: ``Qrels.of({place[q]: {row[d]: g for d, g in of_q.items()} for q,
        of_q in theirs.items()})``, with ``place = {q: i for i, q in enumerate(query_ids)}``.

        Raises:
            ValueError, TypeError: No dict of dicts or of sets, or no integers in it.
        """
        if not isinstance(judgements, Mapping):
            raise TypeError(f"judgements: expected a dict, got {type(judgements).__name__}")
        rows = [
            (_number(query, "query"), _number(name, "id"), grade)
            for query, graded in judgements.items()
            for name, grade in _graded(query, graded)
        ]
        triples = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 3)
        return cls(*triples.unbind(1))


def _graded(query: Any, graded: Any) -> Iterator[tuple[Any, int]]:
    if not isinstance(graded, Mapping):
        if isinstance(graded, (str, bytes)) or not isinstance(graded, Collection):
            got = type(graded).__name__
            raise TypeError(f"judgements[{query!r}]: expected a dict or a set of ids, got {got}")
        graded = dict.fromkeys(graded, 1)
    for name, grade in graded.items():
        yield name, check_int(grade, f"judgements[{query!r}][{name!r}]", 0, HIGHEST)


def _number(x: Any, kind: str) -> int:
    if isinstance(x, (str, bytes)):
        raise TypeError(
            f"judgements: expected integers, got the {kind} {x!r}: replace each query by its "
            "place among the queries, and each id by that of its row, as Qrels.of describes"
        )
    return check_int(x, f"judgements: {kind}", 0, HIGHEST)


def retrieval(
    queries: Any,
    query_labels: Any,
    database: Any,
    database_labels: Any,
    dims: Sequence[int],
    *,
    k: int = 10,
    exclude_self: bool = False,
    metric: str = "cosine",
    divisor: str = "k",
) -> list[Retrieval]:
    """How many of the k nearest rows by a prefix have the query's label, and how early.

    Args:
        queries: ``[B, D]``, or one ``[D]``; query_labels: ``[B]``.
        database: ``[N, D]``, or wider, of which the first D columns are read; database_labels:
            ``[N]``.
        dims: Prefix widths, each in ``[1, D]``, in any order.
        k: Neighbours a query, at least 1.
        exclude_self: As in ``retrieval_of``.
        metric: As in ``prefix_topk``.
        divisor: Of mAP: ``"k"`` (the paper), by which a query with one relevant row reaches 1 / k
            at most; or ``"relevant"``, the number of relevant rows, with which pairs (query i
            belongs to row i: labels ``range(B)`` and ``range(N)``) reach 1, and map is mrr.

    Returns:
        One Retrieval a dim, in their order.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; no rows.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 4.3.
    """
    queries, database, dims = checked_vectors(queries, database, dims, searched=True)
    mine, theirs = numbered({"query_labels": query_labels, "database_labels": database_labels})
    query_labels = checked_labels(mine, "query_labels", len(queries), queries)
    database_labels = checked_labels(theirs, "database_labels", len(database), database)
    k = check_int(k, "k", 1) + bool(exclude_self)
    found = (prefix_topk(queries, database, k, dim=dim, metric=metric).ids for dim in dims)
    return [
        retrieval_of(ids, query_labels, database_labels, exclude_self=exclude_self, divisor=divisor)
        for ids in found
    ]


def retrieval_of(
    ids: Any,
    query_labels: Any,
    database_labels: Any,
    *,
    exclude_self: bool = False,
    divisor: str = "k",
) -> Retrieval:
    """What any search found, judged by labels: rows of the query's label are relevant.

    Args:
        ids: Rows found, best first: ``[B, k]`` integers, −1 where none.
        query_labels: ``[B]``. database_labels: ``[N]``.
        exclude_self: Query i is row i of the database: that row is taken out of its ids (where it
            is not among them, the last), so that k is one less than ids are wide, and it does not
            count as relevant to query i.
        divisor: mAP divides by ``"k"`` (the paper), or by the number of ``"relevant"`` rows, found
            or not (trec_eval's map_cut). By k a query with fewer relevant rows than k cannot reach
            1; by the relevant rows one with more than k cannot.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; a row that is
            found twice; no queries.
    """
    ids = _checked_ids(ids)
    mine, theirs = numbered({"query_labels": query_labels, "database_labels": database_labels})
    query_labels = checked_labels(mine, "query_labels", len(ids), ids)
    database_labels = checked_labels(theirs, "database_labels", None, ids)
    rows = len(database_labels)
    if (largest := int(ids.max())) >= rows:
        raise ValueError(f"ids: expected rows in [0, {rows}) or -1, got {largest}")
    values, counts = database_labels.unique(return_counts=True)
    place = torch.searchsorted(values, query_labels).clamp_max(len(values) - 1)
    relevant = counts[place].where(values[place] == query_labels, 0)  # [B]
    if exclude_self:
        if ids.shape[1] < 2 or len(ids) != rows:
            raise ValueError(
                "ids: with exclude_self, expected at least 2 columns and a query a row of the "
                f"database, got {list(ids.shape)} and {rows} rows"
            )
        itself = ids == arange(0, rows, ids)[:, None]
        ids = ids.gather(1, itself.byte().argsort(dim=1, stable=True))[:, :-1]
        relevant = relevant - (database_labels == query_labels).long()
    hits = (database_labels[ids.clamp_min(0)] == query_labels[:, None]) & (ids >= 0)
    k = ids.shape[1]
    ideal = F.pad(_discounts(k, ids).cumsum(0), (1, 0))[relevant.clamp_max(k)]
    return _averages(hits.double(), ideal, relevant, divisor)


def judged(
    ids: Any, qrels: Qrels | Mapping, *, gain: str = "linear", divisor: str = "k"
) -> Retrieval:
    """What any search found, judged by grades.

    Args:
        ids: Ids found, best first: ``[B, k]`` integers, −1 where none.
        qrels: The judgements, on the same device; or a dict of them, as ``Qrels.of`` takes.
        gain: nDCG's gain of a row: its grade, ``"linear"`` (trec_eval, scikit-learn), or 2^grade −
            1, ``"exponential"``.
        divisor: As in ``retrieval_of``.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; an id that is
            found twice, a pair that is judged twice; no queries or no judgements.
    """
    ids = _checked_ids(ids)
    size, k = ids.shape
    if isinstance(qrels, Mapping):
        qrels = Qrels(*(x.to(ids.device) for x in Qrels.of(qrels)))
    if not isinstance(qrels, Qrels):
        got = type(qrels).__name__
        raise TypeError(f"qrels: expected Qrels or a dict {{query: {{id: grade}}}}, got {got}")
    asked = checked_labels(qrels.queries, "qrels.queries", None, ids)
    count = len(asked)
    named = checked_labels(qrels.ids, "qrels.ids", count, ids)
    qrels = Qrels(asked, named, checked_labels(qrels.grades, "qrels.grades", count, ids))
    if (largest := int(qrels.queries.max())) >= size:
        raise ValueError(f"qrels.queries: expected places in [0, {size}), got {largest}")
    check_choice(gain, "gain", GAINS)
    names, column = qrels.ids.unique(return_inverse=True)
    keys, order = (qrels.queries * len(names) + column).sort()
    if (twice := keys[1:] == keys[:-1]).any():
        query, name = divmod(int(keys[1:][twice][0]), len(names))
        raise ValueError(
            f"qrels: expected a pair judged once, got two of query {query}, id {int(names[name])}"
        )
    column = torch.searchsorted(names, ids).clamp_max(len(names) - 1)
    wanted = arange(0, size, ids)[:, None] * len(names) + column
    place = torch.searchsorted(keys, wanted).clamp_max(count - 1)
    known = (names[column] == ids) & (keys[place] == wanted)
    grades = qrels.grades[order][place].where(known, 0)  # [B, k]

    def gains(grades: Tensor) -> Tensor:
        return grades.double() if gain == "linear" else grades.double().exp2() - 1

    best = qrels.grades.argsort(descending=True)
    best = best[qrels.queries[best].argsort(stable=True)]  # each query's, best first
    judgements = qrels.queries.bincount(minlength=size)
    first = judgements.cumsum(0) - judgements
    query = qrels.queries[best]
    rank = arange(0, count, ids) - first[query]
    kept = rank < k
    ideal = torch.zeros(size, dtype=torch.float64, device=ids.device)
    share = gains(qrels.grades[best][kept]) * _discounts(k, ids)[rank[kept]]
    ideal.index_add_(0, query[kept], share)
    relevant = qrels.queries[qrels.grades > 0].bincount(minlength=size)
    return _averages(gains(grades), ideal, relevant, divisor)


def recall_at_k(
    ids: Any, exact: SearchResult, queries: Any, database: Any, *, metric: str = "ip"
) -> float:
    """Share of the k best that a search found; a row that ties with the k-th counts as one of them.

    Args:
        ids: Rows found, ``[B, k]`` integers, −1 where none.
        exact: The k best at full width, by ``prefix_topk`` with this metric.
        queries: ``[B, D]``. database: ``[N, D]``, of at least k rows.
        metric: As in ``prefix_topk``.

    Returns:
        A number in ``[0, 1]``.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; a row that is
            found twice; no queries.
    """
    ids, queries = _checked_ids(ids), as_vectors(queries, "queries", one=True)
    database = as_vectors(database, "database")
    if not hasattr(exact, "scores") or not hasattr(exact, "ids"):
        raise TypeError(
            "exact: expected a SearchResult (scores, ids), as prefix_topk returns, "
            f"got {type(exact).__name__}"
        )
    scores = as_vectors(exact.scores, "exact.scores")
    exact = SearchResult(scores, as_integers(exact.ids, "exact.ids"))
    k = check_int(ids.shape[1], "ids width", 1, len(database))
    if exact.scores.shape != ids.shape:
        raise ValueError(
            f"exact: expected scores of shape {list(ids.shape)} as ids, "
            f"got {list(exact.scores.shape)}"
        )
    found = rerank(queries, database, ids, k, metric=metric)  # scores bit for bit as exact's
    return count_found(found, exact).double().mean().item() / k


def recall_by_dim(
    queries: Any,
    database: Any,
    dims: Sequence[int],
    *,
    k: int = 10,
    metric: str = "cosine",
) -> list[float]:
    """Share of the k best at full width that are among the k best by each prefix, as
    ``recall_at_k`` counts ties.

    Args:
        queries: ``[B, D]``, or one ``[D]``: D is the full width.
        database: ``[N, D]``, or wider, of which the first D columns are read.
        dims: Prefix widths, each in ``[1, D]``, in any order.
        k: Neighbours, in ``[1, N]``.
        metric: As in ``prefix_topk``.

    Returns:
        One recall in ``[0, 1]`` a dim, in their order.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; no rows.
    """
    queries, database, dims = checked_vectors(queries, database, dims, searched=True)
    k = check_int(k, "k", 1, len(database))
    exact = prefix_topk(queries, database, k, metric=metric)
    found = (prefix_topk(queries, database, k, dim=dim, metric=metric).ids for dim in dims)
    return [recall_at_k(ids, exact, queries, database, metric=metric) for ids in found]


def _averages(gains: Tensor, ideal: Tensor, relevant: Tensor, divisor: str) -> Retrieval:
    """From the gains of what was found ``[B, k]``, and of each query ``[B]`` the best possible
    discounted sum and the number of relevant rows."""
    check_choice(divisor, "divisor", DIVISORS)
    hits, k = (gains > 0).double(), gains.shape[1]
    precision = hits.cumsum(1) / arange(1, k + 1, gains)
    sums = (precision * hits).sum(1)
    gained = gains @ _discounts(k, gains)
    per_query = (
        sums / (k if divisor == "k" else relevant.clamp_min(1)),
        precision[:, -1],
        (gained / ideal).where(ideal > 0, 0.0),
        hits[:, 0],
        (hits / arange(1, k + 1, gains)).amax(1),
        hits.sum(1) / relevant.clamp_min(1),
    )
    return Retrieval(*(values.mean().item() for values in per_query))


def _discounts(k: int, like: Tensor) -> Tensor:
    """1 / log2(i + 1) of places i = 1, …, k."""
    return 1 / torch.arange(2, k + 2, dtype=torch.float64, device=like.device).log2()


def _checked_ids(x: Any) -> Tensor:
    ids = as_integers(x, "ids")
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"ids: expected shape [B, k], neither of them 0, got {list(ids.shape)}")
    if (least := int(ids.min())) < -1:
        raise ValueError(f"ids: expected ids from 0 on or -1, got {least}")
    order = ids.sort(dim=1).values
    if (twice := (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any():
        query, place = twice.nonzero()[0].tolist()
        raise ValueError(
            f"ids: expected an id once a query, got {order[query, place]} twice in row {query}"
        )
    return ids
