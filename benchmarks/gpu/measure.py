"""Clocks, ceilings and rows of the GPU programme.

    python -m benchmarks.gpu.measure --json FILE [--tiny]     # the ceilings

A row times ours and the rivals in turn, in another order every repetition, the L2 cache flushed
before each call. Time is the device's, between two events; where it is short, ``latency_ms`` is
what a caller waits on an idle device. Each provider's result is judged before it is timed. The
ideal time of a row is the larger of its bytes at the measured copy bandwidth and its FLOPs at the
measured rate of matrix products, its fraction is that over the time taken.

Needs PyTorch only, for it also describes a machine where mrl_fast is yet to be installed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES = {**FLOATS, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
OURS = "mrl_fast"  # and every provider whose name begins so
COMPILED = "compiled"  # a rival whose compiling takes longer than its row
FLUSH_BYTES = 1 << 30  # 16 L2 caches; read before a timed call, so that nothing waits to be written
REPETITIONS = 15
RIVAL_RECALL = 0.99
LATENCY_MS = 20.0  # up to here the latency is measured too

Call = Callable[[], Any]


class Work(NamedTuple):
    """What a row times, and how it is judged."""

    calls: dict[str, Call]  # ours first
    judge: Callable[[str], float]  # a provider's recall or error
    quality: str  # "recall", at least ``limit``, or "error", at most; rivals' as is_good says
    limit: float
    read_bytes: float  # written ones included
    flops: dict[str, float]  # by the ceiling that they run at
    formula: str
    notes: dict[str, Any] = {}


class Row(NamedTuple):
    name: str
    shape: str
    dtype: str
    make: Callable[[], Work]
    precision: str = "highest"  # of fp32 products
    headline: bool = False  # shown in the README


def distinct(specs: Iterable[Any], *, tiny: bool) -> list[tuple[Any, Any]]:
    """Each spec and what is made of it; of those that are the same when tiny, the first."""
    made: dict[Any, Any] = {}
    for spec in specs:
        one = spec.tiny() if tiny else spec
        key = one._replace(precision="highest") if tiny else one  # a CPU has one way only
        made.setdefault(key, (spec, one))
    return [*made.values()]


def lazily(build: Callable[[], Call]) -> Call:
    """A provider that is set up at its first call, so that what fails then is a note in its row."""
    made: list[Call] = []

    def call() -> Any:
        if not made:
            made.append(build())
        return made[0]()

    return call


def captured(call: Call) -> Call:
    """The call as one launch of a CUDA graph."""

    def build() -> Call:
        if DEVICE != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        call()  # compiled before it is captured
        synchronize()
        # A capture that fails leaves the allocator in disorder, so a call that waits for the device
        # is refused before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    return lazily(build)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


_flushed: list[torch.Tensor] = []


def flush() -> None:
    if DEVICE == "cuda":
        if not _flushed:
            _flushed.append(torch.zeros(FLUSH_BYTES // 4, device=DEVICE))
        _flushed[0].amax()


def device_seconds(call: Call) -> float:
    if DEVICE != "cuda":
        return wall_seconds(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def wall_seconds(call: Call) -> float:
    flush()
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def alternate(
    calls: Mapping[str, Call], clock: Callable[[Call], float], seconds: float, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of every call, in turn and in random order. A call that has used up its share of the
    budget is not repeated; numbers at the same place of two lists are of the same round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions):
        order = [name for name in calls if sum(found[name]) < seconds / len(calls)]
        random.Random(repetition).shuffle(order)
        for name in order:
            found[name].append(clock(calls[name]))
    return found


def peak_mib(call: Call) -> float:
    """The most that PyTorch allocates beyond what was allocated before, the result included."""
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip()[:400]


def measure(
    row: Row, ceilings: Mapping[str, float], seconds: float, repetitions: int, provider: str = ""
) -> dict:
    """The finished row; one that fails says why, and is a row all the same.

    Args:
        provider: The only rival to be measured; empty: all but those that are compiled.
    """
    begin = time.time()
    found: dict[str, Any] = {key: getattr(row, key) for key in ("name", "shape", "dtype")}
    found |= {"precision": row.precision, "headline": row.headline, "providers": {}, "absent": {}}
    torch.set_float32_matmul_precision(row.precision)
    try:
        work = row.make()
        rivals = {provider} if provider else work.calls.keys() - {COMPILED}
        calls = {n: c for n, c in work.calls.items() if n.startswith(OURS) or n in rivals}
        _measure(work._replace(calls=calls), found, ceilings, seconds, repetitions)
        found["status"] = "ok"
    except Exception as error:
        found |= {"status": "failed", "why": message(error)}
    finally:
        torch.set_float32_matmul_precision("highest")
    return found | {"seconds": round(time.time() - begin, 1)}


def release() -> None:
    """Gives the memory of a row back.

    Raises:
        RuntimeError: A kernel has faulted: nothing runs on the device any more.
    """
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _measure(work: Work, found: dict, ceilings, seconds: float, repetitions: int) -> None:
    calls, providers = dict(work.calls), found["providers"]
    found |= {
        "quality": work.quality, "limit": work.limit, "bytes": work.read_bytes,
        "flops": work.flops, "formula": work.formula, **work.notes,
    }  # fmt: skip
    for name in [*calls]:
        try:
            quality = work.judge(name)
            providers[name] = {work.quality: quality, "good": is_good(work, name, quality)}
            if repetitions > 1:
                calls[name]()  # compiled at the timed shape, caches warm
            if DEVICE == "cuda":
                providers[name]["peak_mib"] = round(peak_mib(calls[name]), 1)
        except Exception as error:
            if name == OURS:
                raise
            found["absent"][name] = message(error)
            providers.pop(name, None)
            del calls[name]
            synchronize()
            continue
        if name.startswith(OURS):
            assert providers[name]["good"], f"{name}: {work.quality} {quality}, not {work.limit}"
    times = alternate(calls, device_seconds, seconds, repetitions)
    for name, taken in times.items():
        providers[name] |= spread(taken) | {
            "ratio": median(t / ours for t, ours in zip(taken, times[OURS], strict=False)),
            "fraction": ideal_seconds(work, ceilings) / median(taken),
        }
    short = {n: c for n, c in calls.items() if providers[n]["p50_ms"] < LATENCY_MS}
    if DEVICE == "cuda":
        for name, taken in alternate(short, wall_seconds, seconds / 4, 10).items():
            providers[name]["latency_ms"] = 1e3 * median(taken)
    rivals = [n for n in providers if not n.startswith(OURS) and providers[n]["good"]]
    best = min(rivals, key=lambda name: providers[name]["p50_ms"], default=None)
    mine = providers[OURS]
    taken_s = mine["p50_ms"] / 1e3
    found |= {
        "time_ms": mine["p50_ms"], "fraction": mine["fraction"],
        "best_rival": best, "ratio": providers[best]["ratio"] if best else None,
        "read_gbps": work.read_bytes / taken_s / 1e9,
        "tflops": sum(work.flops.values()) / taken_s / 1e12,
    }  # fmt: skip


def is_good(work: Work, name: str, quality: float) -> bool:
    """Ours within the limit; a rival that misses it by little is compared with all the same."""
    rival = not name.startswith(OURS)
    if work.quality == "recall":
        return quality >= (min(work.limit, RIVAL_RECALL) if rival else work.limit)
    return quality <= (2 * work.limit if rival else work.limit)


def spread(seconds: list[float]) -> dict[str, float]:
    p20, *_, p80 = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 2
    found = {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * median(seconds), "p80_ms": 1e3 * p80}
    return found | {"repetitions": len(seconds)}


def ideal_seconds(work: Work, ceilings: Mapping[str, float]) -> float:
    """The least time by the ceilings. One that could not be measured (int8, fp8) is taken to be
    bf16's."""
    products = sum(
        count / ceilings.get(f"{rate}_tflops", ceilings["bf16_tflops"]) / 1e12
        for rate, count in work.flops.items()
    )
    return max(products, work.read_bytes / ceilings["copy_gbps"] / 1e9)


def generator(seed: int) -> torch.Generator:
    """A generator of its own: a failed graph capture leaves the default one unusable."""
    return torch.Generator(DEVICE).manual_seed(seed)


def measure_ceilings(*, tiny: bool) -> dict[str, float]:
    """What a copy and matrix products of random numbers reach here, GB/s and TFLOP/s (TOP/s)."""
    numbers, size = (1 << 14, 64) if tiny else (1 << 30, 8192)  # 4 GiB are read and as many written
    found = {"copy_gbps": 2 * 4 * numbers / copy_seconds(numbers) / 1e9}
    a, b = (torch.randn(size, size, generator=generator(i), device=DEVICE) for i in range(2))
    for name, dtype in FLOATS.items():
        x, y = a.to(dtype), b.to(dtype)
        found[name] = typical_seconds(lambda x=x, y=y: x @ y)
    torch.set_float32_matmul_precision("high")
    found["tf32"] = typical_seconds(lambda: a @ b)
    torch.set_float32_matmul_precision("highest")
    codes, others = (t.mul(30).clamp(-127, 127).to(torch.int8) for t in (a, b))
    eighths, more = (t.to(torch.float8_e4m3fn) for t in (a, b))
    one = torch.ones((), device=DEVICE)
    hidden: Any = torch  # these two have no public name
    narrow: dict[str, Call] = {
        "int8": lambda: hidden._int_mm(codes, others.T),
        "fp8": lambda: hidden._scaled_mm(
            eighths, more.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    }
    for name, call in narrow.items():
        try:
            found[name] = typical_seconds(call)
        except RuntimeError:  # no such product on this device
            continue
    rates = {f"{n}_tflops": 2 * size**3 / s / 1e12 for n, s in found.items() if "_" not in n}
    return {"copy_gbps": found["copy_gbps"]} | rates


def copy_seconds(numbers: int) -> float:
    source = torch.ones(numbers, device=DEVICE)
    target = torch.empty_like(source)
    return typical_seconds(lambda: target.copy_(source))


def typical_seconds(call: Call) -> float:
    call()
    return median(device_seconds(call) for _ in range(10 if DEVICE == "cuda" else 2))


def environment() -> dict[str, Any]:
    """What a result was measured on and from. Where there is no repository, the commit is what
    MRL_FAST_COMMIT says."""
    commit = output_of("git", "describe", "--always", "--dirty", "--exclude", "*")
    cuda = DEVICE == "cuda"
    return {
        "commit": commit or os.environ.get("MRL_FAST_COMMIT", "unknown"),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {platform.machine()}",
        "torch": torch.__version__,
        "triton": version_of("triton") or version_of("pytorch-triton"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else None,
    }


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="What this device reaches at most.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    given.json.write_text(json.dumps(measure_ceilings(tiny=given.tiny or DEVICE == "cpu")))


if __name__ == "__main__":
    main()
