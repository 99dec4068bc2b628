"""Picks the stages of adaptive search by measurement: the fastest that is shown to be good enough.

Candidates come in chains, each from the safest list (many rows kept) to the cheapest, and a chain
is left at its first failure: repeated tests along it cost no confidence, only further chains do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from statistics import NormalDist, median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mrl_fast.search.index.cost import explain
from mrl_fast.search.index.tune_report import Stages, TuneReport, TuneRow, shown
from mrl_fast.shared.arrays import as_tensor
from mrl_fast.shared.checks import check_int, check_matrix
from mrl_fast.shared.recall import count_found
from mrl_fast.shared.types import SearchResult

MIN_QUERIES = 256
SLOWER = 2.0  # times the fastest good list: no more is timed
UNSEEN = 0.5  # assumed loss of a query unlike any sampled, as a share of its neighbours
TIE = 4 * torch.finfo(torch.float32).eps  # of the score: stages score in fp32, exact in fp64


class Sample(NamedTuple):
    """Queries to search an index for, in calls of a batch each."""

    index: Any
    queries: Tensor  # [n, D]
    k: int
    batch: int

    def search(self, part: Tensor, stages: Stages | None) -> SearchResult:
        if stages is None:
            return self.index.search(part, self.k, exact=True)
        return self.index.search(part, self.k, stages=stages)

    def search_all(self, stages: Stages | None) -> SearchResult:
        results = [self.search(part, stages) for part in self.queries.split(self.batch)]
        return SearchResult(*map(torch.cat, zip(*results, strict=True)))

    @property
    def calls(self) -> Sequence[Tensor]:
        """The queries of each call of a whole batch."""
        return self.queries.split(self.batch)[: len(self.queries) // self.batch]


class Candidate(NamedTuple):
    """A stage list, its mean recall over the sample, and what the true mean is shown to reach."""

    stages: Stages | None  # None is exact search
    recall: float
    bound: float


def tune(
    index: Any,
    queries: Any,
    k: int = 10,
    recall: float = 0.99,
    *,
    batch: int | None = None,
    confidence: float = 0.95,
    progress: bool = True,
) -> TuneReport:
    """The fastest stages whose mean recall reaches a target, by measurement on this machine.

    Recall is that of the exact answer at full width; a row that ties with the k-th counts as found.
    With the given confidence the chosen list reaches the target on further queries of the sample's
    kind. A few hundred queries prove little (at 0.99 only lists that lose next to nothing pass),
    thousands let cheaper lists pass. A query unlike any in the sample is assumed to lose no more
    than half of its neighbours, or than the worst query loses at the next cheaper list.

    Args:
        index: A MatryoshkaIndex that holds vectors.
        queries: ``[n, D]`` floating point, at least 256, drawn as those that will be searched, not
            the index's own rows; tensor, numpy array or DLPack object.
        k: Neighbours a query, at least 1.
        recall: The target, in ``(0, 1]``.
        batch: Queries a call when timing, in ``[1, n]``; None is all of them.
        confidence: In ``[0.5, 1)``.
        progress: Show a bar.

    Returns:
        TuneReport: its ``stages`` are None where exact search is the fastest, or nothing else is
            shown to reach the target.

    Raises:
        ValueError, TypeError: Too few queries, an empty index, an argument of the wrong shape,
            dtype or range.
    """
    sample = _checked(index, queries, k, recall, batch, confidence)
    chains, count = _chains(index, k), min(k, len(index))
    level, unseen = (1 - confidence) / max(1, len(chains)), max(UNSEEN, 1 / count)
    rounds = min(max(5, len(sample.calls)), 50)
    with tqdm(total=sum(map(len, chains)) + rounds, desc="tune", disable=not progress) as bar:
        candidates = [Candidate(None, 1.0, 1.0)]
        exact = sample.search_all(None)
        for chain in chains:
            losses = (_losses(sample.search_all(stages), exact, count) for stages in chain)
            for found, stages in zip(_walk(losses, recall, level, unseen), chain, strict=False):
                candidates.append(Candidate(stages, *found))
                bar.update()
        times = _timed(sample, candidates, recall, rounds, bar.update)

    rows = _rows(sample, candidates, times, recall)
    best = next(row for row in rows if row.accepted)
    size = len(sample.queries)
    note = f"For recall@{k} of {recall:g}, shown by {size:,} queries: {shown(best.stages)}"
    if not any(row.accepted for row in rows if row.stages):
        note += ", as no stage list is shown to reach it"
        needed = -math.log(level) * unseen / (1 - recall) if recall < 1 else math.inf
        if chains and size < needed < math.inf:
            note += f" (which takes at least {math.ceil(needed):,} queries)"
    found = best.stages, best.recall, best.recall_bound, best.time_ms
    return TuneReport(*found, sample.k, recall, sample.batch, note, rows)


def _checked(
    index: Any, queries: Any, k: int, recall: float, batch: int | None, confidence: float
) -> Sample:
    q = check_matrix(as_tensor(queries, "queries"), "queries", given=queries)
    if len(q) < MIN_QUERIES:
        raise ValueError(f"queries: expected at least {MIN_QUERIES} sample queries, got {len(q)}")
    k = check_int(k, "k", 1)
    if not isinstance(recall, Real) or not 0 < recall <= 1:
        raise ValueError(f"recall: expected a number in (0, 1], got {recall!r}")
    batch = len(q) if batch is None else check_int(batch, "batch", 1, len(q))
    if not isinstance(confidence, Real) or not 0.5 <= confidence < 1:
        raise ValueError(f"confidence: expected a number in [0.5, 1), got {confidence!r}")
    if not len(index):
        raise ValueError("index: expected vectors to search, got none")
    return Sample(index, q, k, batch)


def _timed(
    sample: Sample,
    candidates: Sequence[Candidate],
    recall: float,
    rounds: int,
    tick: Callable[[], object],
) -> list[float]:
    """The median time of a call with each candidate, ms; those that cannot be the fastest are timed
    once."""
    calls = sample.calls
    lists = [candidate.stages for candidate in candidates]
    times = [[time_ms] for time_ms in _calls_ms(sample.search, calls[0], lists)]
    tick()
    good = [c.bound >= recall for c in candidates]
    best_ms = min(mine[0] for mine, reaches in zip(times, good, strict=True) if reaches)
    few = [i for i, mine in enumerate(times) if mine[0] <= SLOWER * best_ms]
    for i in range(1, rounds):
        again = _calls_ms(sample.search, calls[i % len(calls)], [lists[j] for j in few])
        for j, time_ms in zip(few, again, strict=True):
            times[j].append(time_ms)
        tick()
    return [median(mine) for mine in times]


def _rows(
    sample: Sample, candidates: Sequence[Candidate], times: Sequence[float], recall: float
) -> tuple[TuneRow, ...]:
    """A row for each candidate, the fastest first."""
    rows: list[TuneRow] = []
    by_time = sorted(zip(times, candidates, strict=True), key=lambda timed: timed[0])
    for time_ms, (stages, mean, bound) in by_time:
        cost = explain(sample.index, stages or [(sample.index.dims[-1], sample.k)], sample.batch)
        pareto = all(mean > row.recall for row in rows)
        work = cost.macs, cost.read_bytes
        rows.append(TuneRow(stages, mean, bound, time_ms, *work, bound >= recall, pareto))
    return tuple(rows)


def _chains(index: Any, k: int) -> list[list[Stages]]:
    """Each dim below the width and then the width; the first, the middle one and the width. With
    codes the signs of each dim, and then the width."""
    keeps = [max(k, min(max(64 * k, 4096), len(index)))]
    while keeps[-1] > k:
        keeps.append(max(k, keeps[-1] // 2))
    *shorter, width = index.dims
    if index.config.code.whole and index.device == "cpu":
        return [[[(dim, 1, keep), (width, k)] for keep in keeps] for dim in index.dims]
    paths: list[tuple[int, ...]] = [(dim,) for dim in shorter]
    if shorter[1:]:
        middle = min(shorter[1:], key=lambda d: abs(math.log(d * d / shorter[0] / width)))
        paths.append((shorter[0], middle))
    return [
        [[(d, max(k, keep // 4**i)) for i, d in enumerate(path)] + [(width, k)] for keep in keeps]
        for path in paths
    ]


def _walk(
    losses: Iterator[Tensor], target: float, level: float, unseen: float
) -> Iterator[tuple[float, float]]:
    """(recall, lower bound) of a chain's lists, given what each loses, to the first that fails."""
    ahead = next(losses)
    while ahead is not None:
        loss, ahead = ahead, next(losses, None)
        worst = max(unseen, *(float(x.max()) for x in (loss, ahead) if x is not None))
        bound = _lower_bound(loss, worst, level)
        yield 1 - float(loss.mean()), bound
        if bound < target:
            return


def _losses(found: SearchResult, exact: SearchResult, count: int) -> Tensor:
    """Share of the ``count`` best that each query's search missed, ``[B]`` fp64."""
    best = SearchResult(exact.scores[:, :count], exact.ids[:, :count])
    return (count - count_found(found, best, tolerance=TIE)).double() / count


def _lower_bound(losses: Tensor, worst: float, level: float) -> float:
    """Below 1 − the true mean loss but for a probability of ``level``: Stringer's bound.

    Each loss counts as much as one more event adds to the upper limit of a Poisson mean, the
    largest first, and ``worst`` as much as the limit after no event. A Student bound would claim
    anything of a sample that shows no variance; this one, no more than its size can prove.

    Source: Bickel, Inference and Auditing: the Stringer Bound, Int. Statistical Review 60, 1992.
    """
    z = losses[losses > 0].sort(descending=True).values
    m = torch.arange(1, len(z) + 2, dtype=torch.float64, device=z.device)
    # after 0, 1, … events, as Wilson and Hilferty approximate it
    limits = m * (1 - 1 / (9 * m) + NormalDist().inv_cdf(1 - level) / (3 * m.sqrt())) ** 3
    return max(0.0, 1 - float(limits[0] * worst + (limits.diff() * z).sum()) / len(losses))


def _calls_ms(search: Callable[[Tensor, Any], object], part: Tensor, lists: Any) -> list[float]:
    """Time of one call of each list, one after the other: a slow spell of the machine meets all."""
    times = [time.perf_counter()]
    for stages in lists:
        search(part, stages)
        times.append(time.perf_counter())
    return [1e3 * (end - begin) for begin, end in zip(times, times[1:], strict=False)]
