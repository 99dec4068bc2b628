"""Rows of the search kernels beside the ceilings of this device, the most important first.

Random numbers, which have no clusters that a threshold could profit from. Bytes are those that have
to move once: the prefix of every row or candidate, the queries, 12 bytes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import exact
from benchmarks.gpu.measure import (
    DEVICE,
    DTYPES,
    OURS,
    Call,
    Row,
    Work,
    captured,
    distinct,
    generator,
)
from benchmarks.gpu.rivals import torch_funnel, torch_rerank, torch_topk
from mrl_fast import funnel_search, prefix_topk, rerank

FEW = 32  # queries up to which launches may cost more than the scan: a graph is timed beside it
MANY = 1024
TINY_ROWS = 200
GENERATED = 1 << 20  # rows at a time


class Scan(NamedTuple):
    queries: int
    k: int = 100
    dtype: str = "bf16"
    dim: int = 64
    width: int = 64  # of the rows in memory
    metric: str = "ip"
    rows: int = 10_000_000
    precision: str = "highest"

    @property
    def name(self) -> str:
        where = f"d{self.dim}" + (f"of{self.width}" if self.width > self.dim else "")
        tf32 = "-tf32" if self.precision == "high" else ""
        return f"topk-{self.dtype}{tf32}-{self.metric}-{where}-k{self.k}-q{self.queries}"

    @property
    def shape(self) -> str:
        of = f" of {self.width}" if self.width > self.dim else ""
        return (
            f"{self.rows:,} × {self.dim}{of}, {self.queries:,} queries, k {self.k}, {self.metric}"
        )

    def tiny(self) -> Scan:
        width = 24 if self.width > self.dim else 16
        queries, k = min(self.queries, 2), min(self.k, 4)
        return self._replace(queries=queries, k=k, dim=16, width=width, rows=TINY_ROWS)

    def work(self) -> Work:
        x = database(self.rows, self.width, self.dtype)[:, : self.dim]
        q = vectors(self.queries, self.dim, self.dtype, seed=1)
        ours = lambda: prefix_topk(q, x, self.k, metric=self.metric, impl="triton")  # noqa: E731
        calls: dict[str, Call] = {OURS: ours}
        if self.queries <= FEW:
            calls[f"{OURS}_graph"] = captured(ours)
        size, flops = x.element_size(), 2.0 * self.queries * self.rows * self.dim
        if size == 1:  # the same numbers in bf16, for which PyTorch has products
            q, x = q.bfloat16(), x.bfloat16()
        else:
            calls["torch"] = torch_topk(q, x, self.k, self.metric)
        if self.dtype != "fp32":
            calls["torch_fp32_scores"] = torch_topk(q, x, self.k, self.metric, torch.float32)
        if DEVICE == "cuda" and self.metric == "ip" and size > 1:
            calls["compiled"] = torch_topk(q, x, self.k, compiled=True)
        return Work(
            calls, judge_of(calls, q, x, self.k, self.metric), "recall", 1.0,
            size * self.dim * (self.rows + self.queries) + 12 * self.queries * self.k,
            {"tf32" if self.precision == "high" else self.dtype: flops},
            f"{size}·d·(N + B) + 12·B·k bytes; 2·B·N·d FLOPs",
        )  # fmt: skip


class Rerank(NamedTuple):
    queries: int
    candidates: int
    k: int
    dtype: str = "bf16"
    dim: int = 1024
    rows: int = 4_000_000  # 8 GB in half precision, far beyond any cache
    precision: str = "highest"

    @property
    def name(self) -> str:
        return f"rerank-{self.dtype}-d{self.dim}-c{self.candidates}-q{self.queries}"

    @property
    def shape(self) -> str:
        queries = f"{self.queries:,} queries × {self.candidates:,} candidates"
        return f"{queries} of {self.rows:,} × {self.dim}, k {self.k}"

    def tiny(self) -> Rerank:
        return self._replace(
            queries=min(self.queries, 3), candidates=40, k=4, dim=24, rows=TINY_ROWS
        )

    def work(self) -> Work:
        x = database(self.rows, self.dim, self.dtype)
        q = vectors(self.queries, self.dim, self.dtype, seed=1)
        rows = distinct_rows(self.queries, self.candidates, self.rows)
        calls: dict[str, Call] = {
            OURS: lambda: rerank(q, x, rows, self.k, impl="triton"),
            "torch": torch_rerank(q, x, rows, self.k),
        }
        if self.dtype != "fp32":
            calls["torch_fp32_scores"] = torch_rerank(q, x, rows, self.k, torch.float32)
        if DEVICE == "cuda":
            calls["compiled"] = torch_rerank(q, x, rows, self.k, summed=True)
        size, pairs = x.element_size(), self.queries * self.candidates
        return Work(
            calls, judge_of(calls, q, x, self.k, "ip", rows), "recall", 1.0,
            pairs * (size * self.dim + 8) + self.queries * (size * self.dim + 12 * self.k),
            {self.dtype: 2.0 * pairs * self.dim},
            f"B·C·({size}·D + 8) + B·({size}·D + 12·k) bytes; 2·B·C·D FLOPs",
        )  # fmt: skip


class Funnel(NamedTuple):
    queries: int
    stages: tuple[tuple[int, int], ...] = ((64, 200), (256, 50), (1024, 10))
    dtype: str = "bf16"
    rows: int = 2_000_000
    precision: str = "highest"

    @property
    def name(self) -> str:
        return f"funnel-{self.dtype}-q{self.queries}"

    @property
    def shape(self) -> str:
        stages = " → ".join(f"{dim}:{keep}" for dim, keep in self.stages)
        return f"{self.rows:,} × {self.stages[-1][0]}, {self.queries:,} queries, {stages}"

    def tiny(self) -> Funnel:
        stages = (8, 40), (16, 10), (24, 4)
        return self._replace(queries=min(self.queries, 3), stages=stages, rows=TINY_ROWS)

    def work(self) -> Work:
        width = self.stages[-1][0]
        x = database(self.rows, width, self.dtype)
        q = vectors(self.queries, width, self.dtype, seed=1)
        calls: dict[str, Call] = {
            OURS: lambda: funnel_search(q, x, self.stages, impl="triton"),
            "torch": torch_funnel(q, x, self.stages),
            "torch_fp32_scores": torch_funnel(q, x, self.stages, torch.float32),
        }
        some = exact.spread_over(self.queries, 16).to(DEVICE)
        truth = exact.funnel(q[some], x, self.stages)

        def judge(name: str) -> float:
            ids = calls[name]()[1][some]  # rounding may swap rows at a stage's end
            return (ids[:, :, None] == truth[:, None]).any(2).double().mean().item()

        # A later stage reads its new columns of the rows that the stage before has kept.
        first = self.stages[0][0]
        later = sum(
            (dim - before) * kept
            for (before, kept), (dim, _) in zip(self.stages, self.stages[1:], strict=False)
        )
        size = x.element_size()
        return Work(
            calls, judge, "recall", 0.99,
            size * (self.rows * first + self.queries * (width + later)),
            {self.dtype: 2.0 * self.queries * (self.rows * first + later)},
            f"{size}·(N·d₀ + B·(D + Σ(d − d')·keep')) bytes; 2·B·(N·d₀ + Σ…) FLOPs",
        )  # fmt: skip


SPECS = [
    *(Scan(queries) for queries in (1, MANY, FEW, 16384)),
    Rerank(MANY, 200, 10),
    Funnel(MANY),
    Rerank(MANY, 2048, 100),
    *(Scan(MANY, dtype="fp32", precision=p) for p in ("highest", "high")),
    *(Scan(MANY, dtype=dtype) for dtype in ("int8", "fp8")),
]
HEADLINES = SPECS[:7]


def rows(*, tiny: bool) -> Iterator[Row]:
    for spec, made in distinct(SPECS, tiny=tiny):
        yield Row(spec.name, made.shape, spec.dtype, made.work, spec.precision, spec in HEADLINES)


@lru_cache(maxsize=1)
def database(rows: int, width: int, dtype: str) -> Tensor:
    return vectors(rows, width, dtype, seed=0)


def vectors(rows: int, width: int, dtype: str, *, seed: int) -> Tensor:
    x = torch.empty(rows, width, dtype=DTYPES[dtype], device=DEVICE)
    source = generator(seed)
    for part in x.split(GENERATED):
        made = torch.randn(part.shape, generator=source, device=DEVICE)
        part.copy_((40 * made).round().clamp(-127, 127) if x.element_size() == 1 else made)
    return x


def distinct_rows(queries: int, candidates: int, rows: int) -> Tensor:
    """``[queries, candidates]`` int64: one of every ``rows / candidates`` consecutive rows each."""
    span = rows // candidates
    within = torch.randint(
        span, (queries, candidates), generator=generator(2), device=DEVICE, dtype=torch.int64
    )
    return torch.arange(candidates, device=DEVICE) * span + within


def judge_of(
    calls: dict[str, Call], q: Tensor, x: Tensor, k: int, metric: str, rows: Tensor | None = None
) -> Callable[[str], float]:
    """Judges a provider by its recall on some of the queries, ours by scores and their order too.

    Args:
        rows: ``[B, C]`` candidates; None is all rows.
    """
    some = exact.spread_over(len(q)).to(DEVICE)
    asked, slack = q[some], exact.tolerance(q[some], x, metric)
    if rows is None:
        best = exact.topk(asked, x, k, metric)[0]
    else:
        best = exact.pair_scores(asked, x, rows[some], metric).topk(k).values

    def judge(name: str) -> float:
        scores, ids = calls[name]()
        found = exact.pair_scores(asked, x, ids[some], metric)
        if name.startswith(OURS):
            exact.check_form(scores, ids, len(x))
            error = ((scores[some].double() - found).abs() / slack).max().item()
            assert error <= 1, f"{name}: a score is off by {error:.3g} of its bound"
        return exact.recall(found, best[:, -1:] - slack)

    return judge
