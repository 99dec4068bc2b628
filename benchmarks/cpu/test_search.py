"""The index against everyone who can give the same answer; recall stands beside each time.

    pytest benchmarks/cpu/test_search.py -s -k NAME [--rows N] [--graph-rows N] [--data DIR]

adaptive  A prefix of all rows, then the best of them at full width, 500,000 x 768: 1 query is
          bandwidth, 16 a server's batch, 256 and 4,096 are matrix products. The fp32 prefix against
          full scans; the int8 prefix against every other way too.
graphs    The same on 100,000 rows against HNSW and an inverted file, which take minutes to build.
exact     The certified answer against all that are exact, on sets where bounds exclude rows and one
          where they do not; own_scan is our full scan, which it must not fall behind.
growth    No rivals: that time is linear in rows, and in columns where it depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np
import pytest
import torch

from benchmarks import search_data
from benchmarks.measure import DEVICE, alternate, machine
from benchmarks.search_data import RECALL, SHORTLISTS, Case, K, Search, same_up_to_ties, standard
from benchmarks.search_rivals import EFFORTS, Rival, at_effort, flat, graphs, others, panorama
from mrl_fast import MatryoshkaIndex

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the index lives on the CPU")
each_prefix = pytest.mark.parametrize("prefix_dtype", ["float32", "int8"])
REPETITIONS = {1: 15, 16: 9, 128: 5, 256: 5, 4096: 2}
BYTES = {"float32": 4, "int8": 1}
GROWTH = {768: (100_000, 200_000, 400_000, 800_000), 256: (100_000, 400_000, 1_600_000)}
WIDTHS = (96, 192, 384, 768, 1536)


def load(name: str, request, option: str) -> Case:
    try:
        options = request.config.getoption
        return search_data.load(name, options(option), folder=options("data"))
    except ValueError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module", params=search_data.NAMES)
def case(request) -> Case:
    return load(request.param, request, "rows")


@pytest.fixture(scope="module", params=["clustered", "fashion_mnist"])
def graph_case(request) -> tuple[Case, dict[str, Rival]]:
    case = load(request.param, request, "graph_rows")
    rivals = {}
    for name, index in graphs(case).items():
        search_at = at_effort(name, index)
        effort = case.least(search_at, EFFORTS)
        rivals[name] = Rival(search_at(effort), f"effort {effort}")
    return case, rivals


def index_of(x: torch.Tensor, prefix: int, prefix_dtype: str) -> MatryoshkaIndex:
    index = MatryoshkaIndex((prefix, x.shape[1]), metric="ip", prefix_dtype=prefix_dtype)
    index.add(x)
    return index


def row(
    compare: Callable, case: Case, batch: int, what: str, ours: Search, rivals: dict[str, Rival],
    notes: dict[str, object], **counts: float,
) -> None:  # fmt: skip
    """Measures the recall of all, then their times on the same queries."""
    q, recall = case.q[:batch], case.recall(ours)
    assert recall >= RECALL, recall
    notes |= {"case": what, "data": str(case), "batch": len(q), "recall": recall}
    for name, rival in rivals.items():
        notes |= {f"{name}_recall": case.recall(rival.search), f"{name}_setting": rival.setting}
    calls = {name: lambda r=rival: r.search(q, K) for name, rival in rivals.items()}
    compare(lambda: ours(q, K), calls, repetitions=REPETITIONS[batch], notes=notes, **counts)


def adaptive_row(
    compare: Callable, case: Case, batch: int, prefix_dtype: str, rivals: dict[str, Rival]
) -> None:
    rows, width = case.x.shape
    index = index_of(case.x, case.prefix, prefix_dtype)

    def search_at(keep: int) -> Search:
        return lambda q, k: index.search(q, k, stages=[(case.prefix, keep), (width, k)]).ids

    keep = case.least(search_at, SHORTLISTS)
    # Partial scores in fp32 are carried on; an int8 prefix is read again in fp32.
    reranked = width - case.prefix if prefix_dtype == "float32" else width
    row(
        compare, case, batch, f"{prefix_dtype} {case.prefix}:{keep} → {width}:{K}",
        search_at(keep), rivals, {"index_mib": round(index.nbytes / 2**20)},
        flops=2.0 * batch * (rows * case.prefix + keep * reranked),
        read_bytes=1.0 * BYTES[prefix_dtype] * rows * case.prefix + 4.0 * batch * keep * reranked,
    )  # fmt: skip


@each_prefix
@pytest.mark.parametrize("batch", [1, 16, 256, 4096])
def test_adaptive(case, compare, batch, prefix_dtype):
    if batch == 4096 and case.name != "clustered":
        pytest.skip("4,096 queries: on the standard set only")
    rivals = flat(case.x, batch)
    if prefix_dtype == "int8":
        rivals |= others(case, batch)
    adaptive_row(compare, case, batch, prefix_dtype, rivals)


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_graphs(graph_case, compare, batch):
    case, rivals = graph_case
    adaptive_row(compare, case, batch, "int8", flat(case.x, batch) | rivals)


@each_prefix
@pytest.mark.parametrize("batch", [1, 16, 128])
def test_exact(case, compare, batch, prefix_dtype):
    (rows, width), q = case.x.shape, case.q[:batch]
    prefix = min(64, width // 2)
    index = index_of(case.x, prefix, prefix_dtype)
    found = index.search(q, K, exact=True)
    assert same_up_to_ties(found.ids, case, q)
    touched = found.rows_touched.sum().item()  # pyright: ignore[reportAttributeAccessIssue]
    row(
        compare, case, batch, f"{prefix_dtype} {prefix}, exact",
        lambda q, k: index.search(q, k, exact=True).ids,
        flat(case.x, batch)
        | {
            "faiss_panorama": panorama(case, batch),
            "own_scan": Rival(lambda q, k: index.search(q, k, stages=[(width, k)]).ids),
        },
        {"rows_touched_share": touched / (len(q) * rows)},
        flops=2.0 * (len(q) * rows * prefix + touched * width),
        read_bytes=1.0 * BYTES[prefix_dtype] * rows * prefix + 4.0 * min(touched, rows) * width,
    )  # fmt: skip


@each_prefix
@pytest.mark.parametrize("width", GROWTH)
def test_growth_rows(request, benchmark, width, prefix_dtype):
    most = request.config.getoption("rows") / 500_000  # of the usual size
    sizes = [int(rows * most) for rows in GROWTH[width]]
    x, q = standard(max(sizes), width)
    grow(benchmark, {rows: (x[:rows], q) for rows in sizes}, prefix_dtype, f"rows × {width}")


@each_prefix
def test_growth_width(request, benchmark, prefix_dtype):
    rows = request.config.getoption("rows") // 5
    sets = {width: standard(rows, width) for width in WIDTHS}
    grow(benchmark, sets, prefix_dtype, f"{rows:,} rows × columns")


def grow(
    benchmark, sets: dict[int, tuple[torch.Tensor, torch.Tensor]], prefix_dtype: str, what: str
) -> None:
    """Times add, 64:200 → all:10 and the exact answer, over sizes that take turns."""
    indexes: dict[int, MatryoshkaIndex] = {}

    def add(size: int) -> None:
        indexes.pop(size, None)
        indexes[size] = index_of(sets[size][0], 64, prefix_dtype)

    def adaptive(size: int, batch: int):
        x, q = sets[size]
        return indexes[size].search(q[:batch], K, stages=[(64, 200), (x.shape[1], K)])

    def exact(size: int, batch: int):
        return indexes[size].search(sets[size][1][:batch], K, exact=True)

    times = alternate({("add", size): lambda s=size: add(s) for size in sets}, 3)
    times |= alternate(
        {
            (f"{search.__name__}_{batch}", size): lambda f=search, s=size, b=batch: f(s, b)
            for search in (adaptive, exact)
            for batch in (1, 16)
            for size in sets
        },
        5,
    )
    names = list(dict.fromkeys(name for name, _ in times))
    table = []
    for size, (x, _) in sets.items():
        entry: dict[str, float] = {"rows": x.shape[0], "width": x.shape[1]}
        for name in names:
            seconds = median(times[name, size])
            entry[f"{name}_ms"] = round(1e3 * seconds, 4)
            entry[f"{name}_ns_per_row"] = round(1e9 * seconds / len(x), 3)
            entry[f"{name}_ns_per_number"] = round(1e9 * seconds / x.numel(), 5)
        answer, best = adaptive(size, 64).ids, exact(size, 64)
        entry["recall"] = (answer[:, :, None] == best.ids[:, None]).any(2).double().mean().item()
        share = best.rows_touched.double().mean() / len(x)  # pyright: ignore
        entry["rows_touched_share"] = share.item()
        table.append(entry)
    exponents = {}  # time ~ size ** exponent
    for name in names:
        time_ms = [entry[f"{name}_ms"] for entry in table]
        exponents[name] = round(float(np.polyfit(np.log(list(sets)), np.log(time_ms), 1)[0]), 3)
    info = {"growth": f"{what}, {prefix_dtype} prefix", "exponents": exponents, "table": table}
    benchmark.extra_info.update(info | machine())
    benchmark.pedantic(lambda: adaptive(max(sets), 1), rounds=1, iterations=1)
    print(f"\n{info['growth']}: time ~ size^{exponents}")
