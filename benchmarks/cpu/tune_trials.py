"""How often what ``tune`` chooses keeps its promise: seeded trials, judged on other queries.

    python -m benchmarks.cpu.tune_trials [SET ...] [--trials 100] [--rows 50000] [--recall 0.95]
        [--seconds 20] [--out FILE]

Each trial tunes on 512 queries of its own and is judged by the recall of its stages on as many
others as there are, at most 5,000, which no trial has seen. The promise is a confidence of 95 %: at
least 95 of 100 must reach the target. The sets are search_data's, with codes of all columns; and
clustered and centreless, generated, by int8 prefixes.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import machine
from benchmarks.search_data import load, standard
from mrl_fast import MatryoshkaIndex, prefix_topk
from mrl_fast.evaluate import recall_at_k

K = 10
SAMPLE, JUDGED = 512, 5000
WIDTH, DIMS = 256, (32, 64, 128, 256)
GENERATED = {"clustered": 3000, "centreless": 0}  # centres


def case_of(name: str, rows: int) -> tuple[MatryoshkaIndex, Tensor, Tensor]:
    """An index of a set, its vectors and queries that it does not hold."""
    if name in GENERATED:
        # Rows and queries are drawn together: the last rows serve as queries.
        x, _ = standard(rows + JUDGED + 64 * SAMPLE, WIDTH, centres=GENERATED[name])
        index = MatryoshkaIndex(DIMS, metric="ip", prefix_dtype="int8")
        x, q = x[:rows], x[rows:]
    else:
        case = load(name, rows)
        x, width = case.x, case.x.shape[1]
        q = case.q[torch.randperm(len(case.q), generator=torch.Generator().manual_seed(-1))]
        index = MatryoshkaIndex((width // 4, width // 2, width), metric="ip", codes="bits")
    index.add(x)
    return index, x, q


def trials(name: str, target: float, count: int, rows: int, seconds: float) -> dict[str, object]:
    """``count`` trials on a set."""
    index, x, q = case_of(name, rows)
    held_out = min(JUDGED, len(q) // 2)
    judged, pool = q[:held_out], q[held_out:]
    exact = prefix_topk(judged, x, K)
    recalls: dict[str, float] = {"None": 1.0}
    chosen: collections.Counter[str] = collections.Counter()
    kept = 0
    for seed in range(count):
        draw = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:SAMPLE]
        report = index.tune(pool[draw], K, target, batch=64, progress=False, seconds=seconds)
        stages = report.stages
        if str(stages) not in recalls:
            ids = index.search(judged, K, stages=stages).ids
            recalls[str(stages)] = recall_at_k(ids, exact, judged, x)
        chosen[str(stages)] += 1
        kept += recalls[str(stages)] >= target
    return {
        "data": name,
        "rows": len(x),
        "judged": held_out,
        "target": target,
        "trials": count,
        "kept": kept,
        "chosen": {s: [times, round(recalls[s], 4)] for s, times in chosen.most_common()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=["docs", *GENERATED])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--recall", type=float, nargs="+", default=[0.95])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for name in args.sets:
        for target in args.recall:
            results.append(trials(name, target, args.trials, args.rows, args.seconds))
            print(json.dumps(results[-1]))
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
