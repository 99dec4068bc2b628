"""Exact search where very many rows score alike, or very many are wanted, against a plain scan.

    python -m benchmarks.cpu.worst_cases [--metric ip l2 cosine] [--rows N]

100,000 x 256 rows on one thread: ms of prefix_topk, and exact search's as a multiple, with an index
of one dim, of two, and with codes. The aim is 1.5 on any data.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import alternate, machine
from mrl_fast import MatryoshkaIndex, prefix_topk

WIDTH, REPETITIONS = 256, 3
CASES = [
    ("random", 256, 10), ("equal", 256, 10), ("10 distinct", 256, 10), ("100 distinct", 256, 10),
    ("near-duplicates of 1", 256, 10), ("near-duplicates of 10", 256, 10),
    ("near-duplicates of 100", 256, 10), ("near-duplicates of 1000", 256, 10),
    ("equal", 16, 10), ("near-duplicates of 1", 16, 10), ("near-duplicates of 10", 16, 10),
    ("equal", 1, 10), ("near-duplicates of 1", 1, 10), ("near-duplicates of 10", 1, 10),
    ("random", 16, 1000), ("random", 16, 10_000),
    ("random", 16, 100_000), ("near-duplicates of 1", 16, 1000),
]  # fmt: skip


def rows_of(kind: str, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=generator)
    some = torch.randint(rows, (rows,), generator=generator)
    if kind == "equal":
        return x[:1].repeat(rows, 1)
    if kind.endswith("distinct"):
        return x[some % int(kind.split()[0])]
    if kind.startswith("near-duplicates"):
        return x[some % int(kind.split()[-1])] + 1e-6 * x
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--metric", nargs="+", default=["ip", "l2", "cosine"])
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    queries = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(1))
    print(machine())
    for metric in options.metric:
        for kind, count, k in CASES:
            x, q = rows_of(kind, options.rows), queries[:count]
            indices = {
                "1 dim": MatryoshkaIndex((WIDTH,), metric=metric),
                "2 dims": MatryoshkaIndex((WIDTH // 4, WIDTH), metric=metric),
                "codes": MatryoshkaIndex((WIDTH,), metric=metric, codes="bits"),
            }
            calls = {"scan": partial(prefix_topk, q, x, k, metric=metric)}
            for name, index in indices.items():
                index.add(x)
                calls[name] = partial(index.search, q, k, exact=True)
            times = {name: min(its) for name, its in alternate(calls, REPETITIONS).items()}
            scan = times.pop("scan")
            ratios = ", ".join(f"{name} {its / scan:.2f}" for name, its in times.items())
            print(f"{metric}, {kind}, {count} queries, k {k}: {1e3 * scan:.1f} ms; {ratios}")


if __name__ == "__main__":
    main()
