"""How a graph's search and its building grow with the rows: one query on one thread.

    python -m benchmarks.cpu.graph_growth --set sentences --rows 50000 100000 200000 400000 \\
        --out FILE.json

Writes FILE.json and a table FILE.md beside it: of each number of rows the time to build, bytes a
row beside vectors and codes, and the time of a query at recall@10 0.95 and 0.99, by the first beam
that reaches it and the one before, between which time is taken to grow evenly with recall.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.cpu.pareto import measure, ours
from benchmarks.measure import machine
from benchmarks.search_data import NAMES, load

RECALLS = 0.95, 0.99


def at_recall(points: list[dict], recall: float) -> float:
    """µs a query; NaN where no beam reaches it."""
    times = [1e3 * point["time_ms"] for point in points]
    reached = np.maximum.accumulate([point["recall"] for point in points])
    if reached[-1] < recall:
        return float("nan")
    return float(np.interp(recall, reached, times))


def grown(name: str, count: int, repetitions: int) -> dict:
    begin = time.perf_counter()
    case = load(name, count, folder=None)
    mine = [point for point in ours(case) if point.name.endswith("graph")]
    torch.set_num_threads(1)
    found = measure(case, 1, mine, repetitions)
    row = {"rows": len(case.x), "width": case.x.shape[1], "build_s": mine[0].build_s}
    row |= {f"us_at_{recall}": at_recall(found, recall) for recall in RECALLS}
    print(row, f"{time.perf_counter() - begin:.0f} s", flush=True)
    return row | {"points": found}


def table(rows: list[dict]) -> str:
    head = ["rows", "build s", *(f"µs at {recall}" for recall in RECALLS), "rows to the power of"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    first = rows[0]
    for row in rows:
        times = [row[f"us_at_{recall}"] for recall in RECALLS]
        growth = np.log(times[-1] / first[f"us_at_{RECALLS[-1]}"])
        ratio = np.log(row["rows"] / first["rows"])
        power = f"{growth / ratio:.2f}" if ratio > 0 else "–"
        cells = [f"{row['rows']:,}", f"{row['build_s']:.1f}", *(f"{t:.0f}" for t in times), power]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and building of a graph, by rows.")
    parser.add_argument("--out", type=Path, required=True, help="FILE.json; .md beside it")
    parser.add_argument("--set", choices=NAMES, default="sentences")
    parser.add_argument("--rows", type=int, nargs="+", default=[sys.maxsize])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    threads, rows = torch.get_num_threads(), []
    for count in options.rows:
        torch.set_num_threads(threads)
        rows.append(grown(options.set, count, options.repetitions))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    numbers = {"set": options.set} | machine() | {"rows": rows}
    options.out.write_text(json.dumps(numbers, indent=1) + "\n")
    text = f"# {options.set}, one query on one thread\n\n{table(rows)}\n"
    options.out.with_suffix(".md").write_text(text)
    print(table(rows))


if __name__ == "__main__":
    main()
