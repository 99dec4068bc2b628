"""Clocks and probes: calls that take turns, and what the machine itself can do."""

from __future__ import annotations

import datetime
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from mrl_fast import _C
from mrl_fast.shared import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parent.parent
Name = TypeVar("Name", bound=Hashable)


def seconds_of(call: Callable[[], object]) -> float:
    if DEVICE == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def alternate(
    calls: Mapping[Name, Callable[[], object]], repetitions: int, *, shuffle: bool = False
) -> dict[Name, list[float]]:
    """Seconds of each call, ``repetitions`` times, all in turn; the first round only warms up.

    Args:
        shuffle: Another order in every round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for repetition in range(repetitions + 1):
        if shuffle:
            random.Random(repetition).shuffle(order)
        for name in order:
            elapsed = seconds_of(calls[name])
            if repetition:
                seconds[name].append(elapsed)
    return seconds


def machine() -> dict[str, object]:
    """The machine, the versions and the commit that a row was measured with."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    if sys.platform != "linux":
        return platform.processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {native.ISA or _C.available()[0]}"


def multiply_gflops() -> float:
    size = 8192 if DEVICE == "cuda" else 1536
    x = torch.randn(size, size, device=DEVICE)
    return 2 * size**3 / median(seconds_of(lambda: x @ x) for _ in range(5)) / 1e9


def copy_gbps() -> float:
    source = torch.ones((1 << 30 if DEVICE == "cuda" else 1 << 28) // 4, device=DEVICE)
    target = torch.empty_like(source)
    times = [seconds_of(lambda: target.copy_(source)) for _ in range(5)]
    return 2 * 4 * source.numel() / median(times) / 1e9
