"""Where the device's time goes: µs a kernel of one query, of 1024, and of a loss step.

python -m benchmarks.gpu.profile --json FILE [--tiny] [--calls-only]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import cache, interpreter, search, training
from benchmarks.gpu.measure import DEVICE, OURS, release, synchronize
from benchmarks.rivals import NOMIC, Case

CALLS = 5


def cases(*, tiny: bool) -> dict[str, Callable[[], Any]]:
    """Each makes its inputs when it is called, so that no two hold memory at the same time."""

    def of_search(queries: int) -> Callable[[], Any]:
        spec = search.Scan(queries)
        spec = spec.tiny() if tiny else spec
        x = search.database(spec.rows, spec.width, spec.dtype)
        q = search.vectors(spec.queries, spec.dim, spec.dtype, seed=1)
        return lambda: search.prefix_topk(q, x, spec.k, impl="triton")

    def of_loss() -> Callable[[], Any]:
        spec = training.Training(Case("info_nce", 8192, 8192, NOMIC))
        spec = spec.tiny() if tiny else spec
        leaves = training.leaves_of(spec.case, torch.bfloat16)
        return training.steps_of(spec.case, leaves)[OURS]

    found = {"topk, 1 query": lambda: of_search(1), "info_nce, a step": of_loss}
    if not tiny:
        found["topk, 1024 queries"] = lambda: of_search(1024)
    return found


def of(call: Callable[[], Any], calls: int) -> list[dict[str, Any]]:
    """Kernels by the time they take, µs and launches a call."""
    call()
    synchronize()
    on_device = DEVICE == "cuda"
    kinds = [ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]
    with profile(activities=kinds) as seen:
        for _ in range(calls):
            call()
        synchronize()
    rows = []
    for event in seen.key_averages():
        taken = event.device_time_total if on_device else event.self_cpu_time_total
        if taken:
            rows.append({"kernel": event.key, "us": taken / calls, "launches": event.count / calls})
    return sorted(rows, key=lambda row: -row["us"])[:40]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels by the time they take.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--calls-only", action="store_true")
    given = parser.parse_args()
    cache.pin()
    if DEVICE == "cpu":
        interpreter.install()
    found = {}
    for name, make in cases(tiny=given.tiny).items():
        call = make()
        if given.calls_only:
            call()
            continue
        found[name] = of(call, 1 if given.tiny else CALLS)
        given.json.write_text(json.dumps(found, indent=1))
        print(name, json.dumps(found[name][:5]), flush=True)
        del call
        release()


if __name__ == "__main__":
    main()
