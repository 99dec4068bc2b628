"""Exact and adaptive search against FAISS (flat and HNSW) and torch, in one run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
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
GRAPH_ROWS = 100_000  # with more rows HNSW, which would take minutes to build, is left out
FLAT = ("FAISS flat", "torch")
TUNED_S = 8.0  # of a run of 90
JUDGED = 1024  # queries that recall is measured on, at most
EFFORTS = (16, 32, 48, 64, 80, 96, 128, 192, 256)
KEEPS = (20, 50, 100, 200, 400)
Search = Callable[[Tensor], Tensor]  # queries [B, D] → ids [B, K]
Stages = list[tuple[int, ...]]  # (dim, keep), or (dim, bits, keep)


class Entrant(NamedTuple):
    """A search to be compared, and its names in the table or the plot."""

    name: str
    setting: str
    search: Search
    build_s: float  # seconds to index all rows


class Row(NamedTuple):
    name: str
    setting: str
    recall: float
    time_ms: dict[int, float]  # by batch
    speedup: dict[int, float]  # over the best flat rival, by batch
    build_s: float


class Searched(NamedTuple):
    """The index to keep, the rows of the table, and those that only the plot shows."""

    kept: MatryoshkaIndex
    rows: list[Row]
    points: list[Row]


class Queries(NamedTuple):
    """Settings are chosen by the held-out part; recall and time are reported on the other."""

    reported: Tensor  # [B, D]
    held_out: Tensor  # [B', D]


def compare(
    database: Tensor,
    queries: Queries,
    dims: Sequence[int],
    repetitions: dict[int, int],
    on_step: Callable[[str], object],
) -> Searched:
    """Indexes the rows, chooses settings, and lets all searches take turns on the same queries.

    Args:
        repetitions: How often each is timed, by the number of queries a call.
    """
    unit = F.normalize(database)
    judged = Queries(*(q[:JUDGED] for q in queries))
    exact = {q: prefix_topk(q, database, K, metric="cosine") for q in judged}

    def recall(search: Search, q: Tensor) -> float:
        found = torch.cat([search(part) for part in q.split(BATCH)])
        return recall_at_k(found, exact[q], q, database, metric="cosine")

    on_step("index")
    index, ours, curve = our_entrants(database, queries.held_out, dims, on_step)
    entrants = [*flat_entrants(unit), *ours]
    if len(database) <= GRAPH_ROWS:
        on_step("build HNSW")
        graphs = graph_entrants(unit)
        good = (e for e in graphs if recall(e.search, judged.held_out) >= RECALL)
        entrants.insert(len(FLAT), next(good, graphs[-1]))
        curve += graphs
    everything = entrants + curve
    times = {
        batch: measure(everything, queries.reported, batch, count, on_step)
        for batch, count in repetitions.items()
    }
    rows = [
        Row(
            e.name, e.setting, recall(e.search, judged.reported),
            {b: 1e3 * median(times[b][i]) for b in times},
            {b: speedup(times[b], i) for b in times}, e.build_s,
        )
        for i, e in enumerate(everything)
    ]  # fmt: skip
    return Searched(index, rows[: len(entrants)], rows[len(entrants) :])


def our_entrants(
    database: Tensor, held_out: Tensor, dims: Sequence[int], on_step: Callable[[str], object]
) -> tuple[MatryoshkaIndex, list[Entrant], list[Entrant]]:
    """An index, searched exactly and by the stages that ``tune`` chose, and by stages that rank by
    the signs of half of the columns and of all."""
    begin = time.perf_counter()
    index = MatryoshkaIndex(dims, metric="cosine", codes="bits")
    index.add(database)
    build_s = time.perf_counter() - begin
    on_step("tune")
    report = index.tune(held_out, K, RECALL, batch=BATCH, seconds=TUNED_S, progress=False)
    stages = report.stages
    entrants = [
        Entrant("mrl_fast exact", f"{dims[-1]}", adaptive(index, None), build_s),
        Entrant("mrl_fast adaptive", written(stages), adaptive(index, stages), build_s),
    ]
    curve = []
    for dim in dims[-2:]:
        for keep in KEEPS:
            tried = [(dim, 1, keep), (dims[-1], K)]
            name = f"mrl_fast, signs of {dim} columns"
            curve.append(Entrant(name, written(tried), adaptive(index, tried), build_s))
    return index, entrants, curve


def adaptive(index: MatryoshkaIndex, stages: Stages | None) -> Search:
    """A search by these stages; None is exact search."""
    return lambda q: index.search(q, K, stages=stages, exact=stages is None).ids


def flat_entrants(unit: Tensor) -> list[Entrant]:
    width = unit.shape[1]
    begin = time.perf_counter()
    flat = faiss.IndexFlatIP(width)
    flat.add(unit.numpy())
    build_s = time.perf_counter() - begin

    def by_faiss(q: Tensor) -> Tensor:
        with blas_from(4):
            return torch.from_numpy(flat.search(F.normalize(q).numpy(), K)[1])

    def by_torch(q: Tensor) -> Tensor:
        return (F.normalize(q) @ unit.T).topk(K).indices

    searches = zip(FLAT, (by_faiss, by_torch), (build_s, 0.0), strict=True)
    return [Entrant(name, f"{width}", search, s) for name, search, s in searches]


def graph_entrants(unit: Tensor) -> list[Entrant]:
    """One HNSW32 graph, searched with rising effort."""
    begin = time.perf_counter()
    graph = faiss.IndexHNSWFlat(unit.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 200  # 40 by default, which needs an efSearch three times as large
    graph.add(unit.numpy())
    build_s = time.perf_counter() - begin

    def search_at(effort: int) -> Search:
        def search(q: Tensor) -> Tensor:
            graph.hnsw.efSearch = effort
            return torch.from_numpy(graph.search(F.normalize(q).numpy(), K)[1])

        return search

    return [
        Entrant("FAISS HNSW32", f"efSearch {effort}", search_at(effort), build_s)
        for effort in EFFORTS
    ]


def measure(
    entrants: Sequence[Entrant],
    queries: Tensor,
    batch: int,
    repetitions: int,
    on_step: Callable[[str], object],
) -> list[list[float]]:
    """Seconds of each entrant's calls; all take turns on the same queries, each time in a new
    order."""
    times: list[list[float]] = [[] for _ in entrants]
    order = list(range(len(entrants)))
    for repetition in range(-1, repetitions):  # the first is not counted
        first = (repetition + 1) * batch % max(1, len(queries) - batch)
        q = queries[first : first + batch].contiguous()
        random.Random(repetition).shuffle(order)
        for i in order:
            begin = time.perf_counter()
            entrants[i].search(q)
            if repetition >= 0:
                times[i].append(time.perf_counter() - begin)
        on_step(f"{batch} {'query' if batch == 1 else 'queries'} a call")
    return times


def speedup(times: Sequence[list[float]], entrant: int) -> float:
    """The median, over repetitions, of the best flat rival's time over this one's."""
    best = min(times[: len(FLAT)], key=median)
    return median(b / t for b, t in zip(best, times[entrant], strict=True))


def written(stages: Stages | None) -> str:
    return " → ".join(":".join(map(str, stage)) for stage in stages) if stages else "exact"


@contextmanager
def blas_from(queries: int):
    """Has FAISS use BLAS from so many queries: by default it does from 128,000 / d, though BLAS is
    faster much sooner."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = queries
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
