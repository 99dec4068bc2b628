"""Recall against time of every search, over its settings, as a plot and as numbers.

    python -m benchmarks.cpu.pareto --out FILE.png [--set NAME] [--rows N] [--data DIR]
        [--graphs NAME ...]

The sets are search_data's. One query a call on one thread, and 256 on all: all settings of all
searches take turns on the same queries; recall is measured on 256, and settings beyond one that
finds (nearly) all are left out. FILE.json holds the numbers,
with build times (on all threads) and bytes a row. With --graphs only our graph and these take part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import matplotlib
import torch

from benchmarks.graph_rivals import EFFORTS, GRAPHS, Built, built
from benchmarks.measure import alternate, machine
from benchmarks.search_data import NAMES, Case, K, Search, load
from benchmarks.search_rivals import (
    FACTORS,
    faiss,
    flat,
    four_bit_index,
    over_threads,
    panorama,
    refining,
)
from mrl_fast import MatryoshkaIndex
from mrl_fast.experiments.demo.report import save
from mrl_fast.shared.types import Stage

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: E402

BATCHES = {1: 1, 256: torch.get_num_threads()}  # queries a call: threads
QUERIES = 16  # of a repetition, at least
LEAST_RECALL = 0.8  # shown; the numbers hold all
ENOUGH_RECALL = 0.999  # of a setting that is a search's last
KEEPS = (10, 15, 20, 30, 50, 70, 100, 150, 200, 400, 800, 1600)


class Point(NamedTuple):
    """One setting of one search."""

    search: Search
    name: str
    setting: str
    build_s: float
    row_bytes: float


def ours(case: Case) -> list[Point]:
    """Exact search, shortlists by the signs of a quarter, half and all of the columns, and by a
    graph."""
    width = case.x.shape[1]
    begin = time.perf_counter()
    index = MatryoshkaIndex((width // 4, width // 2, width), metric="ip", codes="bits")
    index.add(case.x)
    cost = time.perf_counter() - begin, index.nbytes / len(index)

    def by_stages(stages: list[Stage]) -> Search:
        return lambda q, k: index.search(q, k, stages=stages).ids

    index.build_graph(progress=False)
    walked = time.perf_counter() - begin, index.nbytes / len(index)
    exact = Point(lambda q, k: index.search(q, k, exact=True).ids, "mrl_fast exact", "", *cost)
    few = 2 * K  # that four bits leave to the vectors
    graph = [
        Point(
            by_stages([("graph", max(beam, few), few), (width, K)]),
            "mrl_fast, graph", f"{beam}", *walked,
        )
        for beam in EFFORTS if beam >= few
    ]  # fmt: skip
    return [exact, *graph] + [
        Point(
            by_stages([(dim, 1, keep), (width, K)]),
            f"mrl_fast, signs of {dim} columns", f"{keep}", *cost,
        )
        for dim in index.dims
        for keep in KEEPS
    ]  # fmt: skip


def scans(case: Case, batch: int) -> list[Point]:
    """FAISS and torch where they look at every row: exactly, or by 2 bits a column."""
    width = case.x.shape[1]
    rivals = flat(case.x, batch)
    names = {"faiss": "FAISS flat", "faiss_blas": "FAISS flat, BLAS", "torch": "torch"}
    found = [
        Point(rivals[key].search, name, "", 0.0, 4.0 * width)
        for key, name in names.items()
        if key in rivals
    ]
    found.append(Point(panorama(case, batch).search, "FAISS Panorama", "", 0.0, 4.0 * width))
    begin = time.perf_counter()
    base = over_threads(case.x, batch, lambda: four_bit_index(width, width // 2))
    refine = faiss().IndexRefineFlat(base, faiss().swig_ptr(case.x.numpy()))
    build_s, search_at = time.perf_counter() - begin, refining(refine, base)
    for factor in (1, 2, *FACTORS[:8]):
        name, setting = "FAISS PQ fast-scan, refined", f"k_factor {factor}"
        found.append(Point(search_at(factor), name, setting, build_s, 4.25 * width))
    return found


def graphs(all_of_them: Sequence[Built]) -> list[Point]:
    return [
        Point(graph.search_at(effort), graph.name, f"{effort}", graph.build_s, graph.row_bytes)
        for graph in all_of_them
        for effort in EFFORTS
    ]


def measure(case: Case, batch: int, points: Sequence[Point], repetitions: int) -> list[dict]:
    recalls: list[float] = []
    points, swept = [], points
    for point in swept:  # a search's settings by rising effort
        before = points[-1] if points else None
        if before and before.name == point.name and recalls[-1] >= ENOUGH_RECALL:
            continue
        points.append(point)
        recalls.append(recall(case, point.search))
    parts = case.q[: max(batch, QUERIES)].split(batch)
    calls: dict[int, Callable[[], object]] = {
        i: lambda p=point: [p.search(q, K) for q in parts] for i, point in enumerate(points)
    }
    # Shuffled: else a search's last setting would leave the caches filled for its next.
    times = alternate(calls, repetitions, shuffle=True)
    rows = []
    for i, point in enumerate(points):
        times_ms = [1e3 * seconds / len(parts) for seconds in times[i]]  # of a call
        p20, *_, p80 = quantiles(times_ms, n=5)
        rows.append(
            {
                "search": point.name, "setting": point.setting, "batch": batch,
                "threads": BATCHES[batch], "recall": recalls[i],
                "time_ms": median(times_ms), "p20_ms": p20, "p80_ms": p80,
                "build_s": point.build_s, "row_bytes": point.row_bytes,
            }
        )  # fmt: skip
    return rows


def recall(case: Case, search: Search) -> float:
    """Recall, with −1 for repeated ids: ScaNN repeats some where it finds fewer than k."""

    def distinct(q: torch.Tensor, k: int) -> torch.Tensor:
        ids = search(q, k).sort(dim=1).values
        ids[:, 1:][ids.diff(dim=1) == 0] = -1
        return ids

    return case.recall(distinct)


def front(points: Sequence[dict]) -> list[dict]:
    """The points whose recall no faster one reaches, by rising time."""
    found: list[dict] = []
    for point in sorted(points, key=lambda row: row["time_ms"]):
        if not found or point["recall"] > found[-1]["recall"]:
            found.append(point)
    return found


def plot(path: Path, case: Case, rows: Sequence[dict]) -> None:
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(13, 5), sharey=True)
    names = list(dict.fromkeys(row["search"] for row in rows))
    shades = plt.get_cmap("tab20")
    for axis, (batch, threads) in zip(axes, BATCHES.items(), strict=True):
        for i, name in enumerate(names):
            mine = front([r for r in rows if r["search"] == name and r["batch"] == batch])
            mine = [r for r in mine if r["recall"] >= LEAST_RECALL]
            axis.plot(
                [1e3 * r["time_ms"] / batch for r in mine], [r["recall"] for r in mine],
                marker="os^vD<>XPd"[i % 10], ms=8 if len(mine) == 1 else 4, color=shades(i),
                lw=2.4 if "mrl_fast" in name else 1.0, label=name,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("µs a query")
        queries = "1 query" if batch == 1 else f"{batch} queries"
        on = "1 thread" if threads == 1 else f"{threads} threads"
        axis.set_title(f"{case}, {queries} a call, {on}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"recall@{K} of exact full-width search")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8)
    save(figure, path, right=0.8)


def table(rows: Sequence[dict]) -> str:
    """The fastest setting of each search at recall 0.95 and at 0.99, as Markdown."""
    head = ["search", "build s", "bytes a row"]
    head += [f"µs a query, {batch} a call, at {r}" for batch in BATCHES for r in (0.95, 0.99)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(row["search"] for row in rows):
        mine = [row for row in rows if row["search"] == name]
        cells = [name, f"{mine[0]['build_s']:.1f}", f"{mine[0]['row_bytes']:,.0f}"]
        for batch in BATCHES:
            for least in (0.95, 0.99):
                good = [r for r in mine if r["batch"] == batch and r["recall"] >= least]
                best = min(good, key=lambda row: row["time_ms"], default=None)
                cells.append("–" if best is None else f"{1e3 * best['time_ms'] / batch:.0f} "
                             f"({best['recall']:.3f})")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall against time of every search.")
    parser.add_argument("--out", type=Path, required=True, help="FILE.png; .json and .md beside it")
    parser.add_argument("--set", choices=NAMES, default="docs")
    parser.add_argument("--rows", type=int, help="at most; of a generated set 100,000")
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, default=[])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--data", type=Path, default=os.environ.get("MRL_FAST_DATA"))
    options = parser.parse_args()
    if options.out.suffix != ".png":
        parser.error(f"--out: expected a FILE.png, got {options.out}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    generated = options.set in ("clustered", "centreless")
    rows = options.rows or (100_000 if generated else sys.maxsize)
    case = load(options.set, rows, folder=options.data)
    mine, others = ours(case), list(built(case, options.graphs))
    if options.graphs:
        mine = [point for point in mine if point.name.endswith("graph")]
    found = []
    for batch, threads in BATCHES.items():
        torch.set_num_threads(threads)
        looking = [] if options.graphs else scans(case, batch)
        points = [*mine, *looking, *graphs(others)]
        found += measure(case, batch, points, options.repetitions)
    plot(options.out, case, found)
    numbers = {"data": str(case), "k": K} | machine() | {"points": found}
    options.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(f"# {case}\n\n{table(found)}\n")
    print(table(found))


if __name__ == "__main__":
    main()
