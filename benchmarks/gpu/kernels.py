"""Every kernel on ragged shapes against fp64: errors as one JSON, a case at a time.

    python -m benchmarks.gpu.kernels [FAMILY ...] [--size SIZE] [--json FILE] [--only CASE ...]

A family is a dtype, or "low": queries of fp32 on rows of half precision and fp32 by three products
of TF32, two matrix products in one kernel each, which compilers have got wrong. Cases go on after
one that errs; a fault of the device ends the process, and those that are left are "lost".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mrl_fast.kernels.search import certified, plan
from mrl_fast.kernels.search.certified import exact_topk
from mrl_fast.kernels.search.coarse import Codes, Prefix
from mrl_fast.kernels.search.keys import empty
from mrl_fast.kernels.search.metrics import row_terms
from mrl_fast.kernels.search.pair_scores import RESCANNED
from mrl_fast.kernels.search.plan import KnownRows
from mrl_fast.kernels.search.topk import prefix_topk as triton_topk
from torch import Tensor

from benchmarks.gpu import cache, interpreter, losses
from benchmarks.gpu.margin import scan_error
from benchmarks.gpu.measure import DEVICE, DTYPES, generator, message
from benchmarks.gpu.sizes import SIZES, Sizes, randn, worst
from mrl_fast import funnel_search, prefix_topk, rerank
from mrl_fast.search import reference

Case = tuple[str, float, Callable[[], float]]  # name, the largest error allowed, the error


FAMILIES = ("low", *DTYPES)
ERRORS = {"fp32": 1e-4, "bf16": 1e-1, "fp16": 3e-2}  # of the largest value; tests are stricter


def searches(name: str, size: Sizes) -> Iterator[Case]:
    """The public calls, and a top-k so large that rows are scored without a scan."""
    D, dtype = size.dims[-1], DTYPES[name]
    q, x = (randn(n, D, seed=i, dtype=dtype) for i, n in enumerate((size.queries[0], size.rows)))
    rows = torch.randint(-1, size.rows, (len(q), 45), generator=generator(2), device=DEVICE)
    stages = [(size.dims[0], 40), (size.dims[1], 15), (D, size.k)]

    def error(search: Callable[..., Any]) -> float:
        return worst([search("triton").scores], [search("reference").scores])

    for metric in size.metrics:
        options: dict[str, Any] = {"metric": metric}
        for what, search in {
            "topk": partial(prefix_topk, q, x, size.k, dim=size.dims[1], **options),
            "rerank": partial(rerank, q, x, rows, size.k, **options),
            "funnel": partial(funnel_search, q, x, stages, **options),
        }.items():
            yield f"{what} {metric} {name}", 1e-4, partial(
                error, lambda impl, search=search: search(impl=impl)
            )  # fmt: skip
    many = min(size.rows, RESCANNED + 1)
    yield f"topk of {many} {name}", 1e-4, partial(
        error, lambda impl: prefix_topk(q[:2], x, many, dim=D, impl=impl)
    )  # fmt: skip


def phases(name: str, size: Sizes) -> Iterator[Case]:
    """Scans that are gated by a threshold, for every number of queries that has its own blocks;
    ties that are rescanned; a search certified by bounds, where these suffice and where not."""
    dtype, D = DTYPES[name], size.dims[-1]
    rows = max(size.rows, 600)
    q, x = (randn(n, D, seed=i, dtype=dtype) for i, n in enumerate((size.queries[0], rows)))
    tied = x[:1].expand(rows, D).contiguous()
    tiny = size.interpreted
    for metric in size.metrics if name == "fp32" or not tiny else size.metrics[:1]:
        for queries in size.queries:
            for dim in (D,) if tiny else size.dims[1:]:
                yield f"phases {metric} {name} {queries}q {dim}d", 1e-4, partial(
                    search_error, q[:queries], x, dim, metric, size.k
                )  # fmt: skip
        yield f"ties {metric} {name}", 1e-4, partial(
            search_error, q[:3], tied, D, metric, size.k
        )  # fmt: skip
        if dtype.itemsize > 1 and (not tiny or metric == "l2"):
            for structured in (True, False):
                yield f"exact {metric} {name} {structured}", 1e-5, partial(
                    exact_error, q[:3], x, metric, size, structured
                )  # fmt: skip
            for queries in size.queries:
                yield f"exact {metric} {name} by codes {queries}q", 1e-5, partial(
                    exact_error, q[:queries], x, metric, size, False, "codes"
                )  # fmt: skip
    yield f"margin {name}", 1.0, lambda: scan_error(q, x).item()


def low(size: Sizes) -> Iterator[Case]:
    """Queries of two parts, and fp32 by three products: their results, then their sums."""
    for rows in ("fp16",) if size.interpreted else ("bf16", "fp16", "fp32"):
        for queries, dim in size.low:
            q = randn(queries, dim, seed=1, dtype=torch.float32)
            x = randn(size.rows, dim, seed=2, dtype=DTYPES[rows])
            name = f"fp32 on {rows} {queries}q {dim}d"
            yield f"low {name}", 1e-4, partial(search_error, q, x, dim, "ip", size.k)
            yield f"margin {name}", 1.0, lambda q=q, x=x: scan_error(q, x).item()


def search_error(q: Tensor, x: Tensor, dim: int, metric: str, k: int) -> float:
    with small_buffers():
        found = triton_topk(q, x, k, dim, metric)[0]
    scores = reference.scores(q.float(), x.float(), dim, metric)
    return worst([found], [scores.sort(dim=1, descending=True).values[:, :k]])


def exact_error(
    q: Tensor, x: Tensor, metric: str, size: Sizes, structured: bool, form: str = "prefix"
) -> float:
    head, D = size.dims[1], size.dims[-1]
    x = x.clone()
    if structured:
        x[:, head:] *= 1e-3
    known, short = (KnownRows(*row_terms(x[:, :d], metric)) for d in (D, head))
    tails = torch.linalg.vector_norm(x[:, head:].float(), dim=1) * (1 + 1e-6)
    assert known.terms is not None
    if known.terms.scale is not None:
        tails *= known.terms.scale
    bounds = known._replace(terms=known.terms._replace(outer=tails))
    of = Codes.of(x, metric) if form == "codes" else Prefix(x[:, :head], short, bounds)
    result = empty(q, size.k)
    with small_buffers():
        exact_topk(q, x, size.k, metric, result, known, of)
    scores = reference.scores(q, x, D, metric).sort(dim=1, descending=True).values
    return worst([result[0]], [scores[:, : size.k]])


@contextmanager
def small_buffers() -> Iterator[None]:
    """Makes buffers so small that few rows take several phases, and survivors may be too many."""
    before = plan.BUFFER, plan.LEAST_RANK, certified.SURVIVORS
    plan.BUFFER, plan.LEAST_RANK, certified.SURVIVORS = (16, 32), 4, 40
    try:
        yield
    finally:
        plan.BUFFER, plan.LEAST_RANK, certified.SURVIVORS = before


def cases(families: list[str], size: Sizes) -> Iterator[Case]:
    tiny = size.interpreted
    for family in families:
        if family == "low":
            yield from low(size)
            continue
        if family in ERRORS and not (tiny and family != "fp32"):  # interpreted floats are fp32
            yield from searches(family, size)
            for name, error in losses.errors(size, DTYPES[family]):
                yield f"{name} {family}", ERRORS[family], error
        if not tiny or family not in ("bf16", "fp16"):
            yield from phases(family, size)


def run(families: list[str], size: Sizes, only: list[str], file: Path | None) -> list[dict]:
    found: list[dict[str, Any]] = []
    for name, limit, error in cases(families, size):
        if only and name not in only:
            continue
        row: dict[str, Any] = {"name": name, "limit": limit, "status": "lost"}
        found.append(row)
        write(file, found)  # before it may fault
        try:
            row["error"] = error()
            row["status"] = "ok" if row["error"] <= limit else "failed"  # NaN fails too
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as problem:
            row |= {"status": "failed", "why": message(problem)}
        print(json.dumps(row), flush=True)
        write(file, found)
        if DEVICE == "cuda" and row["status"] == "failed":
            torch.cuda.synchronize()  # raises where nothing runs any more
    return found


def write(file: Path | None, found: list[dict]) -> None:
    if file:
        file.write_text(json.dumps(found))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Every kernel against fp64.")
    parser.add_argument("family", nargs="*", help=" ".join(FAMILIES))
    parser.add_argument("--size", choices=SIZES, default="full" if DEVICE == "cuda" else "tiny")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE")
    given = parser.parse_args(arguments)
    families = given.family or [*FAMILIES]
    found = run(families, SIZES[given.size], given.only, given.json)
    return int(any(row["status"] != "ok" for row in found))


if __name__ == "__main__":
    cache.pin()
    if DEVICE != "cuda":
        interpreter.install()
    raise SystemExit(main())
