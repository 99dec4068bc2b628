"""Picks the stages of adaptive search by measurement: the fastest that is shown to be good enough.

Candidates come in chains, each from the safest list (many rows kept) to the cheapest, and a chain
is left at its first failure: repeated tests along it cost no confidence, only further chains do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from statistics import NormalDist, median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mrl_fast.shared.arrays import as_tensor
from mrl_fast.shared.checks import check_int, check_matrix, check_stages
from mrl_fast.shared.types import SearchResult

Stages = list[tuple[int, int]]  # (dim, keep)

MIN_QUERIES = 256
SLOWER = 2.0  # times the fastest good list: no more is timed
UNSEEN = 0.5  # share of its neighbours that a query unlike any in the sample is held to lose
TIE = 4 * torch.finfo(torch.float32).eps  # of the score: stages score in fp32, exact in fp64
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


class TuneRow(NamedTuple):
    """One stage list that was tried."""

    stages: Stages | None  # None is exact search
    recall: float  # mean over the sample
    recall_bound: float  # what the true mean is shown to reach
    time_ms: float  # median of a call
    macs: int  # of a query, as explain counts them
    read_bytes: int
    accepted: bool  # the bound reaches the target, as do those of all safer lists of its chain
    pareto: bool  # no faster row has as good a recall


@dataclass(frozen=True)
class TuneReport:
    """What ``tune`` chose, and from what; ``str`` is a table."""

    stages: Stages | None  # the fastest accepted list; None where that is exact search
    recall: float  # this and the next two are the chosen row's
    recall_bound: float
    time_ms: float
    k: int
    target: float
    batch: int  # queries a timed call
    note: str  # what was chosen and why
    rows: tuple[TuneRow, ...]  # the fastest first

    def __str__(self) -> str:
        head = f"  {'dim:keep':36} {'recall':6} {'at least':8} {'ms':>9} {'MMAC':>9} {'MiB':>9}"
        lines = [self.note, "", head]
        for row in self.rows:
            mark = ">" if row.stages == self.stages else "*" if row.pareto else " "
            lines.append(
                f"{mark} {_shown(row.stages):36} {row.recall:.4f} {row.recall_bound:8.4f} "
                f"{row.time_ms:9.3f} {row.macs / 1e6:9.3f} {row.read_bytes / 2**20:9.3f}"
                + ("" if row.accepted else "  refused")
            )
        return "\n".join([*lines, "> chosen, * Pareto-optimal; MMAC and MiB are of one query"])

    def plot(self, path: str | PathLike[str]) -> None:
        """Writes recall against time as a picture; needs matplotlib (ModuleNotFoundError)."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import LogLocator
        except ModuleNotFoundError:
            message = "plot: needs matplotlib: pip install 'mrl-fast[demo]'"
            raise ModuleNotFoundError(message, name="matplotlib") from None
        figure = Figure(figsize=(7.5, 4.6), layout="tight")
        axis = figure.subplots()
        for label, style, colour, rows in [  # Okabe and Ito's colours
            ("Pareto front", "-", "#009E73", [row for row in self.rows if row.pareto]),
            ("accepted", "o", "#0072B2", [row for row in self.rows if row.accepted]),
            ("refused", "x", "#D55E00", [row for row in self.rows if not row.accepted]),
        ]:
            points = [row.time_ms for row in rows], [row.recall for row in rows]
            axis.plot(*points, style, color=colour, label=label)
        label = f"chosen: {_shown(self.stages)}"
        axis.plot(self.time_ms, self.recall, "*", ms=15, mec="black", color="#F0E442", label=label)
        axis.axhline(self.target, color="black", lw=0.8, ls="--", label="target")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel(f"ms a call of {self.batch:,} {'query' if self.batch == 1 else 'queries'}")
        axis.set_ylabel(f"recall@{self.k} of exact full-width search")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
        figure.savefig(path, dpi=130)


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
    q = check_matrix(as_tensor(queries, "queries"), "queries")
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

    def search(part: Tensor, stages: Stages | None) -> SearchResult:
        if stages is None:
            return index.search(part, k, exact=True)
        return index.search(part, k, stages=stages)

    def search_all(stages: Stages | None) -> SearchResult:
        results = zip(*[search(part, stages) for part in q.split(batch)], strict=True)
        return SearchResult(*map(torch.cat, results))

    count = min(k, len(index))
    chains = _chains(index, k)
    level, unseen = (1 - confidence) / max(1, len(chains)), max(UNSEEN, 1 / count)
    lists: list[Stages | None] = [None]
    bounds = [(1.0, 1.0)]
    whole = q.split(batch)[: len(q) // batch]
    rounds = min(max(5, len(whole)), 50)
    with tqdm(total=sum(map(len, chains)) + rounds, desc="tune", disable=not progress) as bar:
        tick = bar.update
        exact = search_all(None)
        for chain in chains:
            losses = (_losses(search_all(stages), exact, count) for stages in chain)
            for found, stages in zip(_walk(losses, recall, level, unseen), chain, strict=False):
                bounds.append(found)
                lists.append(stages)
                tick()
        calls = [[time_ms] for time_ms in _calls_ms(search, whole[0], lists)]
        tick()
        # Only what may be the fastest is worth more than one look.
        best_ms = min(c[0] for c, (_, bound) in zip(calls, bounds, strict=True) if bound >= recall)
        contenders = [i for i, times in enumerate(calls) if times[0] <= SLOWER * best_ms]
        for i in range(1, rounds):
            few = [lists[j] for j in contenders]
            for j, time_ms in zip(
                contenders, _calls_ms(search, whole[i % len(whole)], few), strict=True
            ):
                calls[j].append(time_ms)
            tick()

    rows: list[TuneRow] = []
    for time_ms, (mean, bound), stages in sorted(
        zip(map(median, calls), bounds, lists, strict=True), key=lambda row: row[0]
    ):
        cost = explain(index, stages or [(index.dims[-1], k)], batch)
        work = cost.macs, cost.read_bytes
        pareto = all(mean > row.recall for row in rows)
        rows.append(TuneRow(stages, mean, bound, time_ms, *work, bound >= recall, pareto))
    best = next(row for row in rows if row.accepted)
    note = f"For recall@{k} of {recall:g}, shown by {len(q):,} queries: {_shown(best.stages)}"
    if not any(row.accepted for row in rows if row.stages):
        note += ", as no stage list is shown to reach it"
        needed = -math.log(level) * unseen / (1 - recall) if recall < 1 else math.inf
        if chains and len(q) < needed < math.inf:
            note += f" (which takes at least {math.ceil(needed):,} queries)"
    found = best.stages, best.recall, best.recall_bound, best.time_ms
    return TuneReport(*found, k, recall, batch, note, tuple(rows))


class StageCost(NamedTuple):
    """What one stage does for one query: rows scored, multiply-adds, bytes read of the vectors."""

    dim: int
    keep: int
    rows: int
    macs: int
    read_bytes: int


@dataclass(frozen=True)
class Explanation:
    """What stages do for one query; ``str`` is a table."""

    rows: tuple[StageCost, ...]
    macs: int  # in sum, as read_bytes
    read_bytes: int
    macs_share: float  # of a full-width scan's
    read_share: float

    def __str__(self) -> str:
        lines = [f"{'dim':>7} {'keep':>9} {'rows':>12} {'MACs a query':>15} {'bytes a query':>15}"]
        lines += [f"{r[0]:7,} {r[1]:9,} {r[2]:12,} {r[3]:15,} {r[4]:15,}" for r in self.rows]
        lines.append(f"{'total':>7} {self.macs:38,} {self.read_bytes:15,}")
        lines.append(f"{'of full':>7} {self.macs_share:38.2%} {self.read_share:15.2%}")
        return "\n".join(lines)


def explain(index: Any, stages: Sequence[tuple[int, int]], batch: int = 1) -> Explanation:
    """What each stage costs a query, counted and not measured.

    Args:
        index: A MatryoshkaIndex.
        stages: ``(dim, keep)`` pairs as in its ``search``.
        batch: Queries a call, at least 1; they share one read of what the first stage scans.

    Raises:
        ValueError, TypeError: Stages that do not fit the index.
    """
    checked = check_stages(stages)
    batch = check_int(batch, "batch", 1)
    for i, (dim, _) in enumerate(checked):
        if dim not in index.dims:
            raise ValueError(f"stages[{i}] dim: expected one of {index.dims}, got {dim}")
    first, width, item = index.dims[0], index.dims[-1], ITEMSIZE[index.dtype]
    fp32 = first if index.prefix_dtype == "float32" else 0  # columns held as fp32
    int8 = index.prefix_dtype == "int8" and checked[0][0] == first and len(checked) > 1

    def row_bytes(begin: int, end: int) -> int:
        return item * (end - begin) + (4 - item) * max(0, min(end, fp32) - begin)

    rows: list[StageCost] = []
    count, begin = len(index), 0
    for dim, keep in checked:
        read = count * row_bytes(begin, dim)
        if not rows:
            read = -(-(count * dim if int8 else read) // batch)
        rows.append(StageCost(dim, keep, count, count * (dim - begin), read))
        begin = 0 if int8 and len(rows) == 1 else dim  # an int8 score cannot be carried on
        count = min(count, keep)
    macs, read = sum(row.macs for row in rows), sum(row.read_bytes for row in rows)
    scan = max(1, len(index))
    macs_share, read_share = macs / (scan * width), read * batch / (scan * row_bytes(0, width))
    return Explanation((*rows,), macs, read, macs_share, read_share)


def _chains(index: Any, k: int) -> list[list[Stages]]:
    """Each dim below the width and then the width; the first, the middle one and the width."""
    keeps = [max(k, min(max(64 * k, 4096), len(index)))]
    while keeps[-1] > k:
        keeps.append(max(k, keeps[-1] // 2))
    *shorter, width = index.dims
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
    best = exact.ids[:, :count].sort(dim=1).values
    place = torch.searchsorted(best, found.ids).clamp(max=count - 1)
    kth = exact.scores[:, count - 1 : count]
    hit = (best.gather(1, place) == found.ids) | (found.scores >= kth - TIE * kth.abs())
    return (count - (hit & (found.ids >= 0)).sum(dim=1)).double() / count


def _lower_bound(losses: Tensor, worst: float, level: float) -> float:
    """Below 1 − the true mean loss but for a probability of ``level``: Stringer's bound.

    Each loss counts as much as one more event adds to the upper limit of a Poisson mean, the
    largest first, and ``worst`` as much as the limit after no event. A Student bound would claim
    anything of a sample that shows no variance; this one, no more than its size can prove.

    Source: Bickel, Inference and Auditing: the Stringer Bound, Int. Statistical Review 60, 1992.
    """
    z = losses[losses > 0].sort(descending=True).values
    m = torch.arange(1, len(z) + 2, dtype=torch.float64)
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


def _shown(stages: Stages | None) -> str:
    return " ".join(f"{dim}:{keep}" for dim, keep in stages) if stages else "exact search"
