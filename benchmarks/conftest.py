"""How every row is measured: rivals and we take turns in one run, on whatever device is here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import pytest

from benchmarks.measure import DEVICE, alternate, copy_gbps, machine, multiply_gflops
from mrl_fast.shared import native


def pytest_addoption(parser):
    parser.addoption("--isa", default="", help="instruction set of our kernels, e.g. avx2")
    parser.addoption("--rows", type=int, default=500_000, help="database rows of a search")
    parser.addoption(
        "--graph-rows", type=int, default=100_000,
        help="database rows beside HNSW and IVF, which take minutes to build",
    )  # fmt: skip
    parser.addoption("--folder", help="where saving is measured; default: the temporary folder")
    parser.addoption(
        "--data", type=Path, default=os.environ.get("MRL_FAST_DATA"),
        help="folder of real vectors: fashion_mnist.npz, vectors.npy; default: $MRL_FAST_DATA",
    )  # fmt: skip


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
        shuffle: bool = False,
    ) -> None:
        seconds = alternate({"mrl_fast": ours} | rivals, repetitions, shuffle=shuffle)
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
            info |= {"multiply_gflops": round(multiply_gflops(), 1)}  # of one matrix product
        if read_bytes:
            info |= {"read_gbps": round(read_bytes / median(mine) / 1e9, 1)}
            info |= {"copy_gbps": round(copy_gbps(), 1)}
        info |= (notes or {}) | machine()
        benchmark.extra_info.update(info)
        benchmark.pedantic(ours, rounds=1, iterations=1)
        print("\n" + "  ".join(f"{key}={value}" for key, value in info.items()))

    return run
