"""How often what ``tune`` chooses keeps its promise: seeded trials, judged on other queries.

    python -m benchmarks.cpu.tune_trials [--trials 100] [--rows 50000] [--recall 0.95] [--out FILE]

Each trial tunes on 512 queries of its own and is judged by the recall of its stages on 5,000 that
no trial has seen. The promise is a confidence of 95 %: at least 95 of 100 must reach the target.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path

import torch

from benchmarks.measure import machine
from benchmarks.search_data import standard
from mrl_fast import MatryoshkaIndex, prefix_topk
from mrl_fast.evaluate import recall_at_k

K = 10
SAMPLE, JUDGED = 512, 5000
WIDTH, DIMS = 256, (32, 64, 128, 256)


def trials(centres: int, target: float, count: int, rows: int) -> dict[str, object]:
    """``count`` trials on the standard set, with or without its centres."""
    # Rows and queries are drawn together: the last rows serve as queries, unseen by the index.
    x, _ = standard(rows + JUDGED + 64 * SAMPLE, WIDTH, centres=centres)
    index = MatryoshkaIndex(DIMS, metric="ip", prefix_dtype="int8")
    index.add(x[:rows])
    judged, pool = x[rows : rows + JUDGED], x[rows + JUDGED :]
    exact = prefix_topk(judged, x[:rows], K)
    recalls: dict[str, float] = {"None": 1.0}
    chosen: collections.Counter[str] = collections.Counter()
    kept = 0
    for seed in range(count):
        draw = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:SAMPLE]
        stages = index.tune(pool[draw], K, target, batch=64, progress=False).stages
        if str(stages) not in recalls:
            ids = index.search(judged, K, stages=stages).ids
            recalls[str(stages)] = recall_at_k(ids, exact, judged, x[:rows])
        chosen[str(stages)] += 1
        kept += recalls[str(stages)] >= target
    return {
        "data": "clustered" if centres else "centreless",
        "rows": rows,
        "target": target,
        "trials": count,
        "kept": kept,
        "chosen": {s: [times, round(recalls[s], 4)] for s, times in chosen.most_common()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--recall", type=float, nargs="+", default=[0.95])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for centres in (3000, 0):
        for target in args.recall:
            results.append(trials(centres, target, args.trials, args.rows))
            print(json.dumps(results[-1]))
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
