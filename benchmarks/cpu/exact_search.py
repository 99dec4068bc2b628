"""Exact search by codes on real vectors, beside torch and FAISS flat; all take turns.

    python -m benchmarks.cpu.exact_search --out FILE.json [SET...]

One query on one thread; 16 and 256 on all. Every call asks the next queries of the set. The answers
are compared before anything is timed. The sets are search_data's; FILE.md has the rows as a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import alternate, machine
from benchmarks.report import table
from benchmarks.search_data import Case, K, Search, load
from benchmarks.search_rivals import flat, torch_scan
from mrl_fast import MatryoshkaIndex
from mrl_fast.shared.types import ExactResult

SETS = "docs", "glosses256", "glosses", "sentences"
BATCHES = {1: 1, 16: torch.get_num_threads(), 256: torch.get_num_threads()}  # queries: threads
REPETITIONS = {1: 65, 16: 17, 256: 9}


def ask(search: Search, queries: Iterator[torch.Tensor]) -> torch.Tensor:
    return search(next(queries), K)


def rows_of(case: Case) -> Iterator[dict[str, object]]:
    width = case.x.shape[1]
    index = MatryoshkaIndex((width // 4, width // 2, width), metric="ip", codes="bits")
    index.add(case.x)
    found = index.search(case.q[:256], K, exact=True)
    assert isinstance(found, ExactResult)
    # Rows whose fp64 scores are equal in fp32 may change places.
    right = (case.x.double() @ case.q[:256].double().T).T.topk(K).values
    torch.testing.assert_close(found.scores.double(), right, rtol=2e-7, atol=1e-9)
    for batch, threads in BATCHES.items():
        torch.set_num_threads(threads)
        searches: dict[str, Search] = {"ours": lambda q, k: index.search(q, k, exact=True).ids}
        searches |= {name: rival.search for name, rival in flat(case.x, batch).items()}
        searches["torch"] = torch_scan(case.x)
        queries = case.q[:256].split(batch)
        calls = {name: partial(ask, search, cycle(queries)) for name, search in searches.items()}
        times = alternate(calls, REPETITIONS[batch])
        mine = times.pop("ours")
        ratios = {
            name: median(a / b for a, b in zip(theirs, mine, strict=True))
            for name, theirs in times.items()
        }
        yield {
            "set": str(case), "batch": batch, "threads": threads, "ms": 1e3 * median(mine),
            "rows_touched": float(found.rows_touched.double().mean()),
            "bytes_a_row": index.nbytes / len(index),
            "rivals_ms": {name: 1e3 * median(t) for name, t in times.items()}, "ratios": ratios,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", nargs="*", default=SETS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    where, rows = machine(), []
    for name in options.sets:
        torch.set_num_threads(BATCHES[256])
        for row in rows_of(load(name, 1 << 30)):
            rows.append(row)
            print(row, flush=True)
            options.out.write_text(json.dumps({"machine": where, "rows": rows}, indent=1))
    lines = table(
        ("set", "queries", "threads", "ms", "× rivals", "vectors read"),
        [
            (
                row["set"], row["batch"], row["threads"], f"{row['ms']:.2f}",
                ", ".join(f"{name} {ratio:.1f}" for name, ratio in row["ratios"].items()),
                f"{row['rows_touched']:.0f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    options.out.with_suffix(".md").write_text("\n".join([str(where), "", *lines]) + "\n")


if __name__ == "__main__":
    main()
