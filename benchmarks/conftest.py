"""How every row is measured: rivals and we take turns in one run, on whatever device is here."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import pytest
import torch

from mrl_fast import _C
from mrl_fast.cpu import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption("--isa", default="", help="instruction set of our kernels, e.g. avx2")


@pytest.fixture(autouse=True)
def instruction_set(request, monkeypatch):
    monkeypatch.setattr(native, "ISA", request.config.getoption("isa"))


def pytest_collection_modifyitems(items):
    for item in items:  # rivals and compilers may warn as they like
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def compare(benchmark):
    """``compare(ours, rivals, repetitions=, **counts)`` times all in turn and keeps, beside our own
    time, each rival's and the median of its pairwise ratios to ours; counts are FLOPs and bytes."""

    def run(
        ours: Callable[[], object],
        rivals: dict[str, Callable[[], object]],
        *,
        repetitions: int,
        flops: float = 0.0,
        read_bytes: float = 0.0,
        notes: dict[str, object] | None = None,
    ) -> None:
        calls = {"mrl_fast": ours} | rivals
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for repetition in range(repetitions + 1):
            for name, call in calls.items():
                elapsed = seconds_of(call)
                if repetition:  # the first warms up
                    seconds[name].append(elapsed)
        mine = seconds["mrl_fast"]
        best = min(rivals, key=lambda name: median(seconds[name]))
        info: dict[str, object] = {
            f"{name}_ms": round(1e3 * median(times), 3) for name, times in seconds.items()
        }
        info |= {
            f"{name}_ratio": round(median(t / m for t, m in zip(times, mine, strict=True)), 2)
            for name, times in seconds.items()
            if name != "mrl_fast"
        }
        p20, *_, p80 = quantiles(mine, n=5)
        info |= {"p20_ms": round(1e3 * p20, 3), "p80_ms": round(1e3 * p80, 3), "best_rival": best}
        if flops:
            info |= {"gflops": round(flops / median(mine) / 1e9, 1)}
            info |= {
                "multiply_gflops": round(multiply_gflops(), 1)
            }  # what one matrix product makes
        if read_bytes:
            info |= {"read_gbps": round(read_bytes / median(mine) / 1e9, 1)}
            info |= {"copy_gbps": round(copy_gbps(), 1)}
        info |= (notes or {}) | machine()
        benchmark.extra_info.update(info)
        benchmark.pedantic(ours, rounds=1, iterations=1)
        print("\n" + "  ".join(f"{key}={value}" for key, value in info.items()))

    return run


def machine() -> dict[str, object]:
    """What a row was measured on and from."""
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


def multiply_gflops() -> float:
    size = 8192 if DEVICE == "cuda" else 1536
    x = torch.randn(size, size, device=DEVICE)
    return 2 * size**3 / median(seconds_of(lambda: x @ x) for _ in range(5)) / 1e9


def copy_gbps() -> float:
    source = torch.ones((1 << 30 if DEVICE == "cuda" else 1 << 28) // 4, device=DEVICE)
    target = torch.empty_like(source)
    times = [seconds_of(lambda: target.copy_(source)) for _ in range(5)]
    return 2 * 4 * source.numel() / median(times) / 1e9
