"""Filling, changing, saving and opening an index of 10^6 x 768, against copying and rebuilding.

    pytest benchmarks/cpu/test_store.py -s [--rows N] [--folder DIR]

add      All rows in one call, beside a copy of them into new memory, the least that adding can
         cost, and a copy into memory that was written to before.
change   1,000 rows more, removed, replaced, beside adding all of them anew.
save     All rows to DIR, then 1,000 more, opening it, and reading every checksum, beside writing
         the same bytes to one file with an fsync.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks.measure import DEVICE, alternate, machine, seconds_of
from mrl_fast import MatryoshkaIndex

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the index lives on the CPU")
each_prefix = pytest.mark.parametrize("prefix_dtype", ["float32", "int8"])
WIDTH, SOME = 768, 1000


@pytest.fixture(scope="module")
def x(request) -> torch.Tensor:
    return torch.randn(2 * request.config.getoption("rows"), WIDTH)


def new(x: torch.Tensor, prefix_dtype: str) -> MatryoshkaIndex:
    index = MatryoshkaIndex((64, 256, WIDTH), prefix_dtype=prefix_dtype)
    index.add(x)
    return index


def report(benchmark, info: dict[str, object]) -> None:
    benchmark.extra_info.update(info | machine())
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    print("\n" + "  ".join(f"{key}={value}" for key, value in info.items()))


@each_prefix
def test_add(benchmark, x, prefix_dtype):
    warm = torch.empty_like(x)

    def fresh() -> None:
        torch.empty_like(x).copy_(x)

    calls = {
        "add": lambda: new(x, prefix_dtype),
        "copy_to_new": fresh,
        "copy": lambda: warm.copy_(x),
    }
    seconds = alternate(calls, 7)
    info: dict[str, object] = {"store": "add", "rows": len(x), "prefix": prefix_dtype}
    for name, times in seconds.items():
        info |= {f"{name}_ms": round(1e3 * median(times), 1)}
        info |= {f"{name}_gbps": round(2 * x.nbytes / median(times) / 1e9, 1)}
    for name in ("copy_to_new", "copy"):
        pairs = zip(seconds[name], seconds["add"], strict=True)
        info |= {f"of_{name}": round(median(theirs / ours for theirs, ours in pairs), 2)}
    report(benchmark, info)


@each_prefix
def test_change(benchmark, x, prefix_dtype):
    some = torch.randn(SOME, WIDTH)
    rebuild = median(seconds_of(lambda: new(x, prefix_dtype)) for _ in range(3))
    index = new(x, prefix_dtype)
    times: dict[str, list[float]] = {"add": [], "add_ids": [], "remove": [], "update": []}
    for i in range(15):
        ids = torch.randperm(SOME) * 2 + len(x) * (3 + i)
        there = torch.arange(i * SOME, (i + 1) * SOME)
        times["add"].append(seconds_of(lambda: index.add(some)))
        times["add_ids"].append(seconds_of(lambda ids=ids: index.add(some, ids)))
        times["update"].append(seconds_of(lambda ids=there: index.update(ids, some)))
        times["remove"].append(seconds_of(lambda ids=there: index.remove(ids)))
    info: dict[str, object] = {"store": "change", "rows": len(x), "prefix": prefix_dtype}
    info |= {"rebuild_ms": round(1e3 * rebuild, 1)}
    for name, seconds in times.items():
        info |= {f"{name}_ms": round(1e3 * median(seconds), 2)}
        info |= {f"{name}_share": round(median(seconds) / rebuild, 5)}
    info |= {"compact_ms": round(1e3 * seconds_of(index.compact), 1)}
    report(benchmark, info)


@each_prefix
def test_save(request, benchmark, x, prefix_dtype):
    folder = Path(tempfile.mkdtemp(dir=request.config.getoption("folder")))
    try:
        index = new(x, prefix_dtype)
        save = seconds_of(lambda: index.save(folder / "index"))
        size = sum(path.stat().st_size for path in (folder / "index").iterdir())
        index.add(x[:SOME])
        more = seconds_of(lambda: index.save(folder / "index"))

        def plain() -> None:
            with open(folder / "plain", "wb") as file:
                file.write(x.numpy().data)
                os.fsync(file.fileno())

        write = seconds_of(plain)
        opens = [seconds_of(lambda: MatryoshkaIndex.load(folder / "index")) for _ in range(15)]
        verify = seconds_of(lambda: MatryoshkaIndex.load(folder / "index", verify=True))
    finally:
        shutil.rmtree(folder)
    info = {
        "store": "save",
        "rows": len(x),
        "prefix": prefix_dtype,
        "file_mib": size >> 20,
        "save_ms": round(1e3 * save),
        "plain_write_ms": round(1e3 * write),
        "of_plain": round(write * size / x.nbytes / save, 2),
        "save_more_ms": round(1e3 * more, 1),
        "open_ms": round(1e3 * median(opens), 2),
        "verify_ms": round(1e3 * verify),
    }
    report(benchmark, info)
