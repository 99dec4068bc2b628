"""A web service's view: threads of one process that each search for one query after the other.

    python -m benchmarks.cpu.service --out FILE.json [--rows 300000] [--width 384]

Milliseconds a search, half of them below p50 and 99 in 100 below p99, and searches a second of all
threads together, at 1, 4 and 16 Python threads: ours by tuned stages and exact, on one thread a
call and on all, beside FAISS's inverted file and flat scan on one thread a call. Settings are the
least that reach the recall on held-out queries.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import mrl_fast
from benchmarks.measure import machine
from benchmarks.report import table
from benchmarks.search_data import Case, K, Search, load
from benchmarks.search_rivals import EFFORTS, at_effort, faiss, inverted_file, searching
from mrl_fast import MatryoshkaIndex

CALLERS, SECONDS = (1, 4, 16), 3.0


def searches_of(case: Case, recall: float) -> dict[str, tuple[int | None, Search]]:
    """By name: our threads a call (None: all), and the search."""
    width = case.x.shape[1]
    index = MatryoshkaIndex((width // 4, width // 2, width), metric="ip", codes="bits")
    index.add(case.x)
    half = len(case.exact.ids)
    report = index.tune(case.q[half:], K, recall, batch=1, progress=False)
    print(report, flush=True)
    found: dict[str, tuple[int | None, Search]] = {}
    for name, threads in (("one thread", 1), ("all threads", None)):
        found[f"ours, tuned, {name}"] = threads, lambda q, k: index.search(q, k).ids
        found[f"ours, exact, {name}"] = threads, lambda q, k: index.search(q, k, exact=True).ids
    faiss().omp_set_num_threads(1)
    flat = faiss().IndexFlatIP(width)
    flat.add(case.x.numpy())
    found["faiss_flat"] = 1, searching(flat)
    at = at_effort("faiss_ivf", inverted_file(case))
    good = (effort for effort in EFFORTS if case.recall(at(effort), held_out=True) >= recall)
    found["faiss_ivf"] = 1, at(next(good, EFFORTS[-1]))
    return found


def served(search: Search, q: Tensor, callers: int) -> dict[str, float]:
    """What so many threads that search all the while see."""
    end = time.perf_counter() + SECONDS

    def call(first: int) -> list[float]:
        taken, i, now = [], first, time.perf_counter()
        while now < end:
            search(q[i % len(q)][None], K)
            before, now, i = now, time.perf_counter(), i + callers
            taken.append(now - before)
        return taken

    with ThreadPoolExecutor(callers) as pool:
        taken = np.concatenate(list(pool.map(call, range(callers))))
    half, most = np.percentile(1e3 * taken, [50, 99])
    return {"p50_ms": half, "p99_ms": most, "a_second": len(taken) / SECONDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--recall", type=float, default=0.978)
    options = parser.parse_args()
    case, rows = load("clustered", options.rows, options.width), []
    for name, (threads, search) in searches_of(case, options.recall).items():
        mrl_fast.set_num_threads(threads)
        row: dict[str, Any] = {"search": name, "recall": case.recall(search)}
        for callers in CALLERS:
            row[str(callers)] = served(search, case.q, callers)
        rows.append(row)
        print(row, flush=True)
    where = machine() | {"set": str(case)}
    options.out.write_text(json.dumps({"machine": where, "rows": rows}, indent=1))
    lines = table(
        ("search", "recall", *(f"{n} callers: p50, p99 ms; a second" for n in CALLERS)),
        [
            (row["search"], f"{row['recall']:.4f}", *(shown(row[str(n)]) for n in CALLERS))
            for row in rows
        ],
    )
    options.out.with_suffix(".md").write_text("\n".join([str(where), "", *lines]) + "\n")


def shown(seen: dict[str, float]) -> str:
    return f"{seen['p50_ms']:.2f}, {seen['p99_ms']:.2f}; {seen['a_second']:.0f}"


if __name__ == "__main__":
    main()
