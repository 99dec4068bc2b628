"""A batch over shards in one process against one index of the same rows, with the same threads.

    python -m benchmarks.cpu.shards [--rows 800000] [--width 256] [--shards 2]

Milliseconds of 256 queries, medians; the ratio of throughputs; merging's share; recall@10 of both.
Both take turns of a few calls, of which the first does not count: OpenMP's threads spin for a while
after the other's. Exact answers are compared to the bit first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mrl_fast import MatryoshkaIndex, ShardedIndex
from mrl_fast.search.sharded import merge
from mrl_fast.shared.recall import count_found

QUERIES, K, PART = 256, 10, 100_000
TURNS, CALLS = 4, 4


def clustered(rows: int, width: int, spread: float, seed: int) -> Tensor:
    """``[rows, width]`` around 3,000 centres, the first columns the largest."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 / (1 + torch.arange(width) / 16).sqrt()
    centres = torch.randn(3000, width, generator=torch.Generator().manual_seed(0)) * scale
    noise = torch.randn(rows, width, generator=generator) * scale
    return centres[torch.randint(3000, (rows,), generator=generator)] + spread * noise


def timed(call: Callable[[], Any], to: list[float]) -> Any:
    begun = time.perf_counter()
    result = call()
    to.append(time.perf_counter() - begun)
    return result


def compare(one: Any, many: Any, q: Tensor, stages: Any, fewer: Any) -> str:
    """A row: what was asked, both times, the ratio, merging's share and both recalls."""
    best = one.search(q, K, exact=True)
    asked = [{"stages": each} if each else {"exact": True} for each in (stages, fewer)]
    found = one.search(q, K, **asked[0]), many.search(q, K, **asked[1])
    if not stages:
        assert torch.equal(found[0].ids, found[1].ids)
        assert torch.equal(found[0].scores, found[1].scores)
    recalls = [float(count_found(each, best).double().mean()) / K for each in found]
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    merging = merge.nearest
    merge.nearest = lambda *given: timed(lambda: merging(*given), times[2])
    try:
        for _ in range(TURNS):
            for index, its, to in zip((one, many), asked, times[:2], strict=True):
                index.search(q, K, **its)
                for _ in range(CALLS):
                    timed(lambda index=index, its=its: index.search(q, K, **its), to)
    finally:
        merge.nearest = merging
    ms = [1e3 * median(each) for each in times]
    return (
        f"{stages or 'exact'} | {fewer or 'exact'} | "
        f"{ms[0]:.1f} | {ms[1]:.1f} | {ms[0] / ms[1]:.2f} | "
        f"{ms[2] / ms[1]:.1%} | {recalls[0]:.4f} | {recalls[1]:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=800_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--shards", type=int, default=2)
    given = parser.parse_args()
    width = given.width
    dims = width // 4, width // 2, width
    one, many = MatryoshkaIndex(dims), ShardedIndex(dims, shards=given.shards)
    for i, begin in enumerate(range(0, given.rows, PART)):
        x = clustered(min(PART, given.rows - begin), width, 0.6, i + 1)
        one.add(x)
        many.add(x)
    q = clustered(QUERIES, width, 0.7, 1000)
    print(f"{given.rows:,} × {width}, {given.shards} shards, {torch.get_num_threads()} threads")
    print("one | shards | one ms | shards ms | throughput | merging | recall of one, of shards")
    half = width // 2
    whole = [(half, 1, 200), (width, K)]
    for fewer in ([], whole, [(half, 1, 120), (width, K)]):
        print(compare(one, many, q, whole if fewer else [], fewer), flush=True)


if __name__ == "__main__":
    main()
