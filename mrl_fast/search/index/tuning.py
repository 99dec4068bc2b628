"""Picks the stages of adaptive search by measurement: the fastest that is shown to be good enough.

Candidates come in chains, each from the safest list (many rows kept) to the cheapest, and a chain
is left at its first failure: repeated tests along it cost no confidence, only further chains do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from statistics import NormalDist, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mrl_fast.search.index import timing
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.cost import Explanation
from mrl_fast.search.index.graph import walks
from mrl_fast.search.index.timing import Budget
from mrl_fast.search.index.tune_report import (
    CHEAPER,
    PASSED,
    SLOW,
    Stages,
    TuneReport,
    TuneRow,
    Untried,
)
from mrl_fast.shared.checks import check_int
from mrl_fast.shared.recall import count_found
from mrl_fast.shared.types import SearchResult, shown

MIN_QUERIES = 256  # as many are searched at once where time does not count
ENOUGH = 512  # queries: no more are left out so that all lists may be tried
PROBE = 64  # queries that say what more will take
RUNG = 4  # one in so many of what signs keep is left by eight bits, but 2 · k at least
THINNEST = 8  # of the lists of a chain one in so many is tried at least
EXACT, RECALLS = 0.4, 0.8  # of the budget: when exact answers, and recalls, are to be known
PLANNED = 0.5  # of the budget: for what lists are likely to take
UNSEEN = 0.5  # assumed loss of a query unlike any sampled, as a share of its neighbours
BEAMS = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16)  # of a graph
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
        """The results of all queries, which are the same in calls of any size: of large ones."""
        parts = self.queries.split(MIN_QUERIES)
        return joined([self.search(part, stages) for part in parts])

    @property
    def calls(self) -> Sequence[Tensor]:
        """The queries of each call of a whole batch."""
        return self.queries.split(self.batch)[: len(self.queries) // self.batch]

    def call(self, stages: Stages | None) -> timing.Call:
        parts = self.calls
        return lambda number: self.search(parts[number % len(parts)], stages)

    def look(self, stages: Stages | None, best_ms: float = math.inf) -> list[float]:
        """Times of a few calls, ms; of a large batch as of a part of it."""
        part = min(self.batch, PROBE)
        scale = self.batch / part
        times = timing.first_look(self._replace(batch=part).call(stages), best_ms / scale)
        return [scale * ms for ms in times]


def joined(results: Sequence[SearchResult]) -> SearchResult:
    return SearchResult(*map(torch.cat, zip(*results, strict=True)))


class Candidate(NamedTuple):
    """A stage list, its mean recall over the sample, and what the true mean is shown to reach."""

    stages: Stages | None  # None is exact search
    recall: float
    bound: float
    times: list[float]  # of a few calls, ms


class Aim(NamedTuple):
    """What lists have to reach, and how sure it has to be."""

    recall: float
    level: float  # of the bound of one chain
    unseen: float  # assumed loss of a query unlike any sampled


def tune(
    index: Any,
    queries: Any,
    k: int = 10,
    recall: float = 0.99,
    *,
    batch: int | None = None,
    confidence: float = 0.95,
    seconds: float = 20.0,
    progress: bool = True,
) -> TuneReport:
    """The fastest stages whose mean recall reaches a target, by measurement on this machine.

    Recall is that of the exact answer at full width; a row that ties with the k-th counts as found.
    With the given confidence the chosen list reaches the target on further queries of the sample's
    kind. A few hundred queries prove little (at 0.99 only lists that lose next to nothing pass),
    thousands let cheaper lists pass. A query unlike any in the sample is assumed to lose no more
    than half of its neighbours, or than the worst query loses at the next cheaper list.

    Chains whose cheapest list is far slower than the best so far are left out; so is what the time
    does not allow, and a part of a sample that is too large for it.

    Args:
        index: A MatryoshkaIndex that holds vectors.
        queries: ``[n, D]`` floating point, at least 256, drawn as those that will be searched, not
            the index's own rows; tensor, numpy array or DLPack object.
        k: Neighbours a query, at least 1.
        recall: The target, in ``(0, 1]``.
        batch: Queries a call when timing, in ``[1, n]``; None is all of them.
        confidence: In ``[0.5, 1)``.
        seconds: About how long it may take, above 0; ``math.inf`` leaves nothing out for it.
        progress: Show a bar.

    Returns:
        TuneReport: its ``stages`` are None where exact search is the fastest, or nothing else is
            shown to reach the target.

    Raises:
        ValueError, TypeError: Too few queries, an empty index, an argument of the wrong shape,
            dtype or range.
    """
    sample = _checked(index, queries, k, recall, batch, confidence)
    recall = float(recall)  # of any kind of number; it is saved with what is chosen
    if not isinstance(seconds, Real) or not seconds > 0:
        raise ValueError(f"seconds: expected a number above 0, got {seconds!r}")
    budget, given, chains = Budget(float(seconds)), len(sample.queries), _chains(index, k)
    unseen = max(UNSEEN, 1 / min(k, len(index)))
    aim = Aim(recall, (1 - confidence) / max(1, len(chains)), unseen)
    rounds = min(max(5, len(sample.calls)), 50)
    with tqdm(total=sum(map(len, chains)) + rounds, desc="tune", disable=not progress) as bar:
        sample, exact, walked = _affordable(sample, chains, budget)
        candidates, untried = _tried(sample, exact, walked, aim, budget, bar.update)
        times, chosen = _timed(sample, candidates, aim.recall, rounds, budget, bar.update)
    if passed := sum(map(len, chains)) - sum(map(len, walked)):
        untried = (*untried, Untried(passed, PASSED))
    rows = _rows(sample, candidates, times, aim.recall)
    best, n = next(r for r in rows if r.stages == candidates[chosen].stages), len(sample.queries)
    size = f"{n:,}" if n == given else f"{n:,} of {given:,}"
    note = f"For recall@{k} of {recall:g}, shown by {size} queries: {shown(best.stages)}"
    if not any(row.accepted for row in rows if row.stages):
        late = any(left.late for left in untried)
        note += f", as no stage list is shown to reach it{' in the time' if late else ''}"
        needed = -math.log(aim.level) * unseen / (1 - recall) if recall < 1 else math.inf
        if chains and n < needed < math.inf:
            note += f" (which takes at least {math.ceil(needed):,} queries)"
    found = best.stages, best.recall, best.recall_bound, best.time_ms
    return TuneReport(*found, k, recall, sample.batch, note, rows, untried, budget.taken)


def _checked(
    index: Any, queries: Any, k: int, recall: float, batch: int | None, confidence: float
) -> Sample:
    q = inputs.matrix(queries, "queries", index.width)
    if len(q) < MIN_QUERIES:
        raise ValueError(f"queries: expected at least {MIN_QUERIES} sample queries, got {len(q)}")
    k = check_int(k, "k", 1)
    if isinstance(recall, bool) or not isinstance(recall, Real) or not 0 < recall <= 1:
        raise ValueError(f"recall: expected a number in (0, 1], got {recall!r}")
    batch = len(q) if batch is None else check_int(batch, "batch", 1, len(q))
    if not isinstance(confidence, Real) or not 0.5 <= confidence < 1:
        raise ValueError(f"confidence: expected a number in [0.5, 1), got {confidence!r}")
    if not len(index):
        raise ValueError("index: expected vectors to search, got none")
    # In any order, as the first of them may have to stand for all.
    mixed = torch.from_numpy(np.random.default_rng(0).permutation(len(q)))
    return Sample(index, q[mixed], k, batch)


def _affordable(
    sample: Sample, chains: Sequence[Sequence[Stages]], budget: Budget
) -> tuple[Sample, SearchResult, list[Sequence[Stages]]]:
    """So much of the sample, and of the chains, as there is likely to be time for, and the exact
    answers. Times alone decide, before any loss is known: what is claimed of recall stays true."""
    exact, exact_s = [sample.search(sample.queries[:MIN_QUERIES], None)], budget.taken
    spans = [_span_ms(sample._replace(batch=PROBE), chain) for chain in chains]
    limit = timing.SLOWER * min((cheapest for cheapest, _ in spans), default=0.0)
    lists_s = sum(
        whole for cheapest, whole in spans if cheapest <= limit
    )  # the others are left out
    lists_s *= MIN_QUERIES / PROBE / 1e3
    parts = PLANNED * budget.seconds / max(exact_s + lists_s, 1e-9)  # with every list
    n = int(min(len(sample.queries), max(ENOUGH, MIN_QUERIES * parts)))
    step, room = 1, PLANNED * budget.seconds / (n / MIN_QUERIES) - exact_s
    while step < THINNEST and lists_s / step > room:
        step *= 2
    for part in sample.queries[MIN_QUERIES:n].split(MIN_QUERIES):
        if not len(part) or budget.spent(EXACT):
            break
        exact.append(sample.search(part, None))
    answers = joined(exact)
    n = len(answers.ids)
    judged = sample._replace(queries=sample.queries[:n], batch=min(sample.batch, n))
    return judged, answers, [chain[::step] for chain in chains]


def _span_ms(sample: Sample, chain: Sequence[Stages]) -> tuple[float, float]:
    """What a call of a chain's cheapest list takes, and what one call of each list does, ms: they
    rise in a straight line with the rows that the first stage keeps."""
    keeps = [stages[0][1 if walks(stages) else -1] for stages in chain]
    widest, cheapest = (timing.call_ms(sample.call(chain[i]), 0) for i in (0, -1))
    slope = max(0.0, widest - cheapest) / max(1, keeps[0] - keeps[-1])
    return cheapest, sum(cheapest + slope * (keep - keeps[-1]) for keep in keeps)


def _tried(
    sample: Sample,
    exact: SearchResult,
    chains: Sequence[Sequence[Stages]],
    aim: Aim,
    budget: Budget,
    tick: Callable[[], object],
) -> tuple[list[Candidate], tuple[Untried, ...]]:
    """Exact search, and the lists of each chain to its first failure; and what is left out.

    The chain whose cheapest list is the fastest comes first. Where the time is up, the list that is
    being walked to is left out: it is judged by the losses of the next one, too.
    """
    count, left = min(sample.k, len(sample.index)), Counter[str]()
    floors = [min(sample.look(chain[-1])) for chain in chains]
    candidates = [Candidate(None, 1.0, 1.0, sample.look(None, min(floors, default=math.inf)))]
    best_ms = min(candidates[0].times)
    for floor, chain in sorted(zip(floors, chains, strict=True), key=lambda pair: pair[0]):
        limit = timing.SLOWER * best_ms
        if floor > limit and min(sample.look(chain[-1], best_ms)) > limit:  # in this spell, too
            left[SLOW] += len(chain)
            continue
        losses = (_losses(sample.search_all(stages), exact, count) for stages in chain)
        judged = zip(_walk(losses, aim), chain, strict=False)
        tried, refused = 0, False
        while not refused and not budget.spent(RECALLS) and (found := next(judged, None)):
            (mean, bound), stages = found
            times = sample.look(stages, best_ms)
            candidates.append(Candidate(stages, mean, bound, times))
            tried, refused = tried + 1, bound < aim.recall
            best_ms = best_ms if refused else min(best_ms, *times)
            tick()
        late = f"as the time was up (seconds={budget.seconds:g})"
        left[CHEAPER if refused else late] += len(chain) - tried
    return candidates, tuple(Untried(n, why) for why, n in left.items() if n)


def _timed(
    sample: Sample,
    candidates: Sequence[Candidate],
    recall: float,
    rounds: int,
    budget: Budget,
    tick: Callable[[], object],
) -> tuple[list[float], int]:
    """The median time of a call of each candidate, ms; and which is chosen.

    That is, of those that reach the recall and are as fast as the fastest by what their times tell,
    the one that reads least.
    """
    medians = [median(c.times) for c in candidates]
    firsts = {i: min(c.times) for i, c in enumerate(candidates) if c.bound >= recall}
    limit = timing.SLOWER * min(firsts.values())
    finalists = sorted((i for i, ms in firsts.items() if ms <= limit), key=lambda i: (firsts[i], i))
    calls = [sample.call(candidates[i].stages) for i in finalists]
    times, left = timing.in_turn(calls, rounds, budget, tick)
    for i, mine in zip(finalists, times, strict=True):
        medians[i] = median(mine or candidates[i].times)
    fast = [finalists[j] for j in timing.as_fast(times, left)]
    return medians, min(
        fast, key=lambda i: (_cost(sample, candidates[i].stages).read_bytes, medians[i], i)
    )


def _cost(sample: Sample, stages: Stages | None) -> Explanation:
    whole = [(sample.index.dims[-1], sample.k)]
    return sample.index.explain(stages or whole, batch=sample.batch)


def _rows(
    sample: Sample, candidates: Sequence[Candidate], times: Sequence[float], recall: float
) -> tuple[TuneRow, ...]:
    """A row for each candidate, the fastest first."""
    rows: list[TuneRow] = []
    by_time = sorted(zip(times, candidates, strict=True), key=lambda timed: timed[0])
    for time_ms, (stages, mean, bound, _) in by_time:
        cost = None if stages is None else _cost(sample, stages)
        pareto = all(mean > row.recall for row in rows)
        work = (None, None) if cost is None else (cost.macs, cost.read_bytes)
        rows.append(TuneRow(stages, mean, bound, time_ms, *work, bound >= recall, pareto))
    return tuple(rows)


def _chains(index: Any, k: int) -> list[list[Stages]]:
    """Chains of two stages (a dim, the width), of three (first, middle, width), and with codes (the
    signs of a dim, the width), of files also (the signs, eight bits, the width)."""
    keeps = [max(k, min(max(64 * k, 4096), len(index)))]
    while keeps[-1] > k:
        keeps.append(max(k, keeps[-1] // 2))
    *shorter, width = index.dims
    walked = []
    if index.device == "cpu" and index.has_graph:
        few = max(2 * k, 20)  # by four bits
        beams = sorted({max(few, beam) for beam in BEAMS}, reverse=True)
        walked = [[[("graph", beam, few), (width, k)] for beam in beams]]
    if index.config.code.whole and index.device == "cpu":
        # A search's time is mostly that of its shortlist, so that steps between halves show.
        fine = {max(k, 3 * keep // 4) for keep in keeps if keep <= 512}
        keeps = sorted({*keeps, *fine}, reverse=True)
        chains = [[[(dim, 1, keep), (width, k)] for keep in keeps] for dim in index.dims]
        # In memory a row's eight bits, of which the first four lie apart, cost what its columns do.
        rungs = [(keep, max(2 * k, keep // RUNG)) for keep in keeps if keep > 2 * k]
        if rungs and index.on_disk:
            chains.append([[(width, 1, keep), (width, 8, few), (width, k)] for keep, few in rungs])
        return [*walked, *chains]
    paths: list[tuple[int, ...]] = [(dim,) for dim in shorter]
    if shorter[1:]:
        middle = min(shorter[1:], key=lambda d: abs(math.log(d * d / shorter[0] / width)))
        paths.append((shorter[0], middle))
    return walked + [
        [[(d, max(k, keep // 4**i)) for i, d in enumerate(path)] + [(width, k)] for keep in keeps]
        for path in paths
    ]


def _walk(losses: Iterator[Tensor], aim: Aim) -> Iterator[tuple[float, float]]:
    """(recall, lower bound) of a chain's lists, given what each loses, to the first that fails."""
    ahead = next(losses)
    while ahead is not None:
        loss, ahead = ahead, next(losses, None)
        worst = max(aim.unseen, *(float(x.max()) for x in (loss, ahead) if x is not None))
        bound = _lower_bound(loss, worst, aim.level)
        yield 1 - float(loss.mean()), bound
        if bound < aim.recall:
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
