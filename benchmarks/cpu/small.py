"""Search of small collections, where a call's fixed cost counts, beside torch and FAISS flat.

    python -m benchmarks.cpu.small --out FILE.json [--set docs]

The first 100, 1,000 and 10,000 rows of a set at 64 and at 256 columns. One query on one thread; 16
and 256 on all. FAISS as it comes, and with BLAS from four queries on. Calls take turns in bursts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import alternate, machine, seconds_of
from benchmarks.report import table
from benchmarks.search_data import K, load
from benchmarks.search_rivals import flat
from mrl_fast import MatryoshkaIndex, prefix_topk

ROWS, WIDTHS = (100, 1_000, 10_000), (64, 256)
BATCHES = {1: 1, 16: torch.get_num_threads(), 256: torch.get_num_threads()}  # queries: threads
OURS = "exact", "stages", "prefix_topk"
BURST, REPETITIONS = 0.01, 9  # seconds of one call after the other


def calls_of(x: Tensor, q: Tensor) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """The calls to time, and the names of the rivals' among them; exact search is checked first."""
    width = x.shape[1]
    index = MatryoshkaIndex((width // 4, width), metric="ip")
    index.add(x)
    right = (q.double() @ x.double().T).topk(K).values
    found = index.search(q, K, exact=True)
    torch.testing.assert_close(found.scores.double(), right, rtol=2e-7, atol=1e-9)
    stages = [(width // 4, min(10 * K, len(x))), (width, K)]
    rivals: dict[str, Callable[[], object]] = {
        name: partial(rival.search, q, K) for name, rival in flat(x, len(q)).items()
    }
    rivals["torch"] = lambda: (q @ x.T).topk(K)
    calls: dict[str, Callable[[], object]] = {
        "exact": partial(index.search, q, K, exact=True),
        "stages": partial(index.search, q, K, stages=stages),
        "prefix_topk": partial(prefix_topk, q, x, K),
    }
    return calls | rivals, [*rivals]


def row_of(x: Tensor, q: Tensor) -> dict[str, Any]:
    calls, rivals = calls_of(x, q)

    def burst(call: Callable[[], object]) -> tuple[Callable[[], object], int]:
        call()
        count = max(1, int(BURST / min(seconds_of(call) for _ in range(3))))
        return lambda: [call() for _ in range(count)], count

    bursts = {name: burst(call) for name, call in calls.items()}
    times = alternate({name: call for name, (call, _) in bursts.items()}, REPETITIONS)
    us = {name: 1e6 * median(its) / bursts[name][1] for name, its in times.items()}
    best = min(rivals, key=lambda name: us[name])
    return {"rows": len(x), "columns": x.shape[1], "queries": len(q), "best": best, "us": us}


def shown(row: dict[str, Any]) -> list[object]:
    us, best = row["us"], row["best"]
    ours = [f"{us[name]:.0f} ({us[best] / us[name]:.2f})" for name in OURS]
    names = "rows", "columns", "queries", "threads"
    return [*(row[name] for name in names), f"{best} {us[best]:.0f}", *ours]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", default="docs")
    options = parser.parse_args()
    case, rows = load(options.set, max(ROWS)), []
    for count in ROWS:
        for width in WIDTHS:
            x, q = (F.normalize(t[:, :width]).contiguous() for t in (case.x[:count], case.q))
            for batch, threads in BATCHES.items():
                torch.set_num_threads(threads)
                row = {"threads": threads, **row_of(x, q[:batch])}
                rows.append(row)
                print(row, flush=True)
    where = machine()
    options.out.write_text(json.dumps({"machine": where, "rows": rows}, indent=1))
    header = (
        "rows",
        "columns",
        "queries",
        "threads",
        "best rival, µs",
        *(f"{o}, µs (×)" for o in OURS),
    )
    lines = table(header, [[*map(str, shown(row))] for row in rows])
    options.out.with_suffix(".md").write_text("\n".join([str(where), "", *lines]) + "\n")


if __name__ == "__main__":
    main()
