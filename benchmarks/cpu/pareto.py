"""Recall against time, everyone's settings swept, as a plot and as numbers.

    python -m benchmarks.cpu.pareto --out FILE.png [--set NAME] [--rows N] [--data DIR]

The sets are search_data's; 100,000 rows, as HNSW takes minutes to build. All settings of all
searches take turns on the same queries; recall is measured on 256. FILE.json holds the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

import matplotlib

from benchmarks.measure import alternate, machine
from benchmarks.search_data import NAMES, SHORTLISTS, Case, K, Search, load
from benchmarks.search_rivals import (
    EFFORTS,
    FACTORS,
    Rival,
    at_effort,
    faiss,
    flat,
    graphs,
    panorama,
    prefix_index,
    refining,
    searching,
    sq8_index,
)
from mrl_fast import MatryoshkaIndex
from mrl_fast.experiments.demo.report import save

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: E402

BATCHES = (1, 16)
LEAST_RECALL = 0.8  # shown; the numbers hold all
OURS = {"mrl_fast, fp32 prefix": "float32", "mrl_fast, int8 prefix": "int8"}


def swept(search_at: Callable[[int], Search], settings: Sequence[int]) -> list[Rival]:
    return [Rival(search_at(setting), str(setting)) for setting in settings]


def adaptive(case: Case, prefix_dtype: str) -> Callable[[int], Search]:
    width = case.x.shape[1]
    index = MatryoshkaIndex((case.prefix, width), metric="ip", prefix_dtype=prefix_dtype)
    index.add(case.x)

    def search_at(keep: int) -> Search:
        return lambda q, k: index.search(q, k, stages=[(case.prefix, keep), (width, k)]).ids

    return search_at


def curves(case: Case, batch: int, built: dict) -> dict[str, list[Rival]]:
    """Each search's points, by rising effort."""
    keeps = [keep for keep in SHORTLISTS[::2] if keep <= len(case.x) // 20]
    factors = [factor for factor in FACTORS if factor * K in keeps]
    found = {name: swept(adaptive(case, dtype), [10, 20, *keeps]) for name, dtype in OURS.items()}
    scans = flat(case.x, batch)
    best = scans.get("faiss_blas") or scans.get("faiss_shards") or scans["faiss"]
    found |= {"FAISS flat": [best], "FAISS SQ8": [Rival(searching(sq8_index(case, batch)))]}
    bases = {"fp32 prefix": 0, "4-bit prefix": 1, "4-bit double prefix": 2}
    filled = [prefix_index(case, batch, four_bits=bits) for bits in bases.values()]
    refine = faiss().IndexRefineFlat(filled[0], faiss().swig_ptr(case.x.numpy()))
    for name, base in zip(bases, filled, strict=True):
        found[f"FAISS RefineFlat over {name}"] = swept(refining(refine, base), [1, 2, *factors])
    found["FAISS Panorama"] = [panorama(case, batch)]
    for name, label in (("faiss_hnsw", "FAISS HNSW32"), ("faiss_ivf", "FAISS IVF")):
        found[label] = swept(at_effort(name, built[name]), EFFORTS[::2])
    return found


def measure(case: Case, batch: int, built: dict, repetitions: int) -> list[dict]:
    points = {
        (name, rival.setting): rival
        for name, rivals in curves(case, batch, built).items()
        for rival in rivals
    }
    q = case.q[:batch]
    calls = {key: lambda r=rival: r.search(q, K) for key, rival in points.items()}
    # a search's own last setting would leave the caches filled for the next
    times = alternate(calls, repetitions, shuffle=True)
    rows = []
    for name, setting in points:
        seconds = times[name, setting]
        p20, *_, p80 = quantiles(seconds, n=5)
        rows.append(
            {
                "search": name, "setting": setting, "batch": batch,
                "recall": case.recall(points[name, setting].search),
                "time_ms": 1e3 * median(seconds), "p20_ms": 1e3 * p20, "p80_ms": 1e3 * p80,
            }
        )  # fmt: skip
    return rows


def plot(path: Path, case: Case, rows: Sequence[dict]) -> None:
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(12, 4.6), sharey=True)
    shades = plt.get_cmap("tab10")
    for axis, batch in zip(axes, BATCHES, strict=True):
        names = list(dict.fromkeys(row["search"] for row in rows))
        for i, (name, marker) in enumerate(zip(names, "os^vD<>XPd", strict=True)):
            points = [r for r in rows if r["search"] == name and r["batch"] == batch]
            points = [r for r in points if r["recall"] >= LEAST_RECALL]
            axis.plot(
                [r["time_ms"] / batch for r in points], [r["recall"] for r in points],
                marker=marker, ms=8 if len(points) == 1 else 4, color=shades(i),
                lw=2.2 if name in OURS else 1.0, label=name,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("ms a query")
        axis.set_title(f"{case}, {batch} {'query' if batch == 1 else 'queries'} a call")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"recall@{K} of exact full-width search")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8)
    save(figure, path, right=0.75)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall against time of every search.")
    parser.add_argument("--out", type=Path, required=True, help="FILE.png; FILE.json beside it")
    parser.add_argument("--set", choices=NAMES, default="clustered")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--data", type=Path, default=os.environ.get("MRL_FAST_DATA"))
    options = parser.parse_args()
    case = load(options.set, options.rows, folder=options.data)
    built = graphs(case)
    rows = []
    for batch in BATCHES:
        rows += measure(case, batch, built, options.repetitions)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot(options.out, case, rows)
    numbers = {"data": str(case), "k": K} | machine() | {"points": rows}
    options.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
