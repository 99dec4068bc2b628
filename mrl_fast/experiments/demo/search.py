"""Full-width, adaptive and funnel search against FAISS flat and torch, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast.evaluate import recall_at_k
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.ops import prefix_topk

K = 10
BATCH = 256
RECALL = 0.99
Search = Callable[[Tensor], Tensor]  # queries [B, D] → ids [B, K]
Stages = list[tuple[int, int]]


class Row(NamedTuple):
    name: str
    stages: str
    recall: float
    time_ms: dict[int, float]  # by batch
    speedup: dict[int, float]  # over FAISS flat at its better setting, by batch


def adaptive_stages(dims: tuple[int, ...], rows: int) -> list[Stages]:
    """Shortlists to try, cheapest first by multiply-adds a query."""
    width = dims[-1]
    found = [
        [(dim, keep), (width, K)]
        for dim in dims[1:-1]
        for keep in (20, 50, 100, 200, 400, 800, 1600)
        if keep < rows
    ]
    return sorted(found, key=lambda stages: rows * stages[0][0] + stages[0][1] * width)


def funnel_stages(stages: Stages, dims: tuple[int, ...]) -> Stages:
    """The same shortlist, halved at every prefix in between."""
    (dim, keep), last = stages
    middle = [d for d in dims if dim < d < last[0]]
    keeps = [max(2 * K, keep // 2 ** (i + 1)) for i in range(len(middle))]
    return [(dim, keep), *zip(middle, keeps, strict=True), last]


def compare(
    database: Tensor,
    queries: Tensor,
    dims: tuple[int, ...],
    repetitions: int,
    on_step: Callable[[], object],
) -> tuple[list[Row], list[Row]]:
    """The table's rows, and the adaptive settings of the plot.

    The shortlist is chosen on one half of the queries, as the cheapest whose recall holds there,
    and everything is reported on the other half.
    """
    held_out, reported = queries[::2], queries[1::2]
    indexes = {}
    for i, dim in enumerate(dims[1:-1], start=1):
        indexes[dim] = MatryoshkaIndex(dims[i:], metric="cosine")
        indexes[dim].add(database)
        on_step()

    def ours(stages: Stages) -> Search:
        return lambda q: indexes[stages[0][0]].search(q, K, stages=stages).ids

    def recall(search: Search, q: Tensor) -> float:
        exact = prefix_topk(q, database, K, metric="cosine")
        return recall_at_k(search(q), exact, q, database, metric="cosine")

    candidates = adaptive_stages(dims, len(database))
    chosen = next((s for s in candidates if recall(ours(s), held_out) >= RECALL), candidates[-1])
    funnel = funnel_stages(chosen, dims)
    curve = {}
    for stages in candidates:  # for each prefix: the keeps around the chosen one
        if stages[0][1] in (20, 100, 400, 1600):
            curve[str(stages)] = (stages, ours(stages))

    unit = F.normalize(database)
    flat = faiss.IndexFlatIP(dims[-1])
    flat.add(unit.numpy())

    def faiss_flat(q: Tensor) -> Tensor:
        return torch.from_numpy(flat.search(F.normalize(q).numpy(), K)[1])

    def faiss_blas(q: Tensor) -> Tensor:
        with blas_from(4):
            return faiss_flat(q)

    wide = f"{dims[-1]}"
    full = indexes[dims[1]]
    searches = {
        "FAISS flat": (wide, faiss_flat),
        "FAISS flat, BLAS from 4": (wide, faiss_blas),
        "torch.topk(q @ x.T)": (wide, lambda q: (F.normalize(q) @ unit.T).topk(K).indices),
        "mrl_fast exact": (wide, lambda q: full.search(q, K).ids),
        "mrl_fast adaptive": (written(chosen), ours(chosen)),
        "mrl_fast funnel": (written(funnel), ours(funnel)),
    }
    points = {name: (written(stages), search) for name, (stages, search) in curve.items()}
    everything = searches | points
    times = {b: measure(everything, reported, b, repetitions, on_step) for b in (1, BATCH)}
    rows = {}
    for name, (stages, search) in everything.items():
        found = recall(search, reported)
        ms = {b: 1e3 * median(times[b][name]) for b in times}
        speedup = {b: ratio(times[b], name) for b in times}
        rows[name] = Row(name, stages, found, ms, speedup)
    return [rows[name] for name in searches], [rows[name] for name in points]


def measure(
    searches: dict[str, tuple[str, Search]],
    queries: Tensor,
    batch: int,
    repetitions: int,
    on_step: Callable[[], object],
) -> dict[str, list[float]]:
    """Seconds a call, the searches taking turns on the same queries."""
    times: dict[str, list[float]] = {name: [] for name in searches}
    for repetition in range(-1, repetitions):  # the first is not counted
        first = (repetition + 1) * batch % max(1, len(queries) - batch)
        q = queries[first : first + batch].contiguous()
        for name, (_, search) in searches.items():
            begin = time.perf_counter()
            search(q)
            if repetition >= 0:
                times[name].append(time.perf_counter() - begin)
        on_step()
    return times


def ratio(times: dict[str, list[float]], name: str) -> float:
    """The median, over repetitions, of FAISS flat's time at its better setting over this one's."""
    best = min((times[n] for n in times if n.startswith("FAISS")), key=median)
    return median(b / t for b, t in zip(best, times[name], strict=True))


def written(stages: Stages) -> str:
    return " → ".join(f"{dim}:{keep}" for dim, keep in stages)


@contextmanager
def blas_from(queries: int):
    """FAISS uses BLAS from 128,000 / d queries by default; it pays much sooner."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = queries
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
