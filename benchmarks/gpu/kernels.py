"""Every kernel once, on small ragged shapes, against the reference: what the sanitizers watch.

python -m benchmarks.gpu.kernels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mrl_fast.kernels.search import certified, plan
from mrl_fast.kernels.search.certified import Prefix, exact_topk
from mrl_fast.kernels.search.keys import empty
from mrl_fast.kernels.search.metrics import row_terms
from mrl_fast.kernels.search.pair_scores import RESCANNED
from mrl_fast.kernels.search.plan import KnownRows
from mrl_fast.kernels.search.topk import prefix_topk as triton_topk
from torch import Tensor

from benchmarks.gpu import interpreter
from benchmarks.gpu.measure import DEVICE, DTYPES, generator
from mrl_fast import (
    funnel_search,
    matryoshka_cross_entropy,
    matryoshka_distill,
    matryoshka_info_nce,
    matryoshka_logits,
    matryoshka_predict,
    matryoshka_sigmoid_loss,
    prefix_topk,
    rerank,
)
from mrl_fast.search import reference

# Ragged in every axis. Tiles are at most 256 on a side; the interpreter's are 16 to 64, and slow.
ON_GPU = DEVICE == "cuda"
B, V, D = (135, 300, 75) if ON_GPU else (18, 20, 21)
DIMS = (5, 16, 75) if ON_GPU else (5, 16, 21)
QUERIES, ROWS, K = (70, 20_011, 7) if ON_GPU else (2, 301, 4)
METRICS = "ip", "cosine", "l2"
CLIP = ("query_to_doc", "doc_to_query")


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A slice of something wider, so that strides are real."""
    *rest, last = shape
    wide = torch.randn(*rest, last + 3, generator=generator(seed), device=DEVICE)
    return wide.to(dtype)[..., :last]


def check(name: str, ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, e in zip(ours, expected, strict=True):
        worst = (a.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-30)
        assert worst <= tolerance, f"{name}: off by {worst:.2e}"
    print(name, flush=True)


def gradients(loss: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    result = loss(*leaves)
    result.loss.sum().backward()
    return [result.per_dim, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def losses(name: str, dtype: torch.dtype, tolerance: float) -> None:
    x, w = (randn(n, D, seed=i, dtype=dtype) for i, n in enumerate((B, V)))
    y = randn(B, D, seed=2, dtype=dtype)
    separate = [randn(V, d, seed=3, dtype=dtype) for d in DIMS]
    biases = [randn(V, seed=4, dtype=dtype) for _ in DIMS]
    target = torch.randint(V, (B,), generator=generator(5), device=DEVICE)
    target[::7] = -100
    weights = torch.rand(V, generator=generator(6), device=DEVICE)
    mask = torch.rand(B, B, generator=generator(7), device=DEVICE) < 0.2
    mask.fill_diagonal_(False)
    smooth: dict[str, Any] = {"class_weight": weights, "label_smoothing": 0.1}
    both: dict[str, Any] = {"directions": CLIP, "partition_mode": "per_direction"}
    hard: dict[str, Any] = {"hardness_mode": "hard_negatives", "hardness_strength": 2.0}
    bias_of = lambda x: [b.to(x.dtype) for b in biases]  # noqa: E731
    cases: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "tied": (
            lambda x, w, b, impl: matryoshka_cross_entropy(
                x, w, target, DIMS, bias=b, impl=impl, **smooth
            ),
            [x, w, biases[0]],
        ),
        "separate": (
            lambda x, *w, impl: matryoshka_cross_entropy(
                x, w, target, DIMS, bias=bias_of(x), reduction="none", impl=impl
            ),
            [x, *separate],
        ),
        "info_nce": (lambda x, y, impl: matryoshka_info_nce(x, y, DIMS, impl=impl), [x, y]),
        "info_nce, masked": (
            lambda x, y, impl: matryoshka_info_nce(x, y, DIMS, mask=mask, impl=impl, **hard),
            [x, y],
        ),
        "clip": (lambda x, y, impl: matryoshka_info_nce(x, y, DIMS, impl=impl, **both), [x, y]),
        "sigmoid": (
            lambda x, y, impl: matryoshka_sigmoid_loss(
                x, y, DIMS, scale=10.0, bias=-10.0, impl=impl
            ),
            [x, y],
        ),
        "distill": (lambda x, impl: matryoshka_distill(x, y.to(x.dtype), DIMS, impl=impl), [x]),
    }
    for case, (loss, tensors) in cases.items():
        ours = gradients(partial(loss, impl="triton"), *tensors)
        exact = gradients(partial(loss, impl="reference"), *(t.double() for t in tensors))
        check(f"{case} {name}", ours, exact, tolerance)
    logits = matryoshka_logits(x, w, DIMS, bias=biases[0], impl="triton")
    best = matryoshka_predict(x, w, DIMS, bias=biases[0], impl="triton").confidence
    wide_x, wide_w, wide_b = (t.double() for t in (x, w, biases[0]))
    exact = matryoshka_logits(wide_x, wide_w, DIMS, bias=wide_b, impl="reference")
    check(f"heads {name}", [logits, best], [exact, exact.softmax(2).amax(2)], tolerance)


def searches(name: str, dtype: torch.dtype) -> None:
    q, x = (randn(n, D, seed=i, dtype=dtype) for i, n in enumerate((QUERIES, ROWS)))
    rows = torch.randint(-1, ROWS, (QUERIES, 45), generator=generator(2), device=DEVICE)
    stages = [(DIMS[0], 40), (DIMS[1], 15), (D, K)]
    for metric in METRICS:
        for what, search in {
            "topk": lambda impl: prefix_topk(q, x, K, dim=DIMS[1], metric=metric, impl=impl),  # noqa: B023
            "rerank": lambda impl: rerank(q, x, rows, K, metric=metric, impl=impl),  # noqa: B023
            "funnel": lambda impl: funnel_search(q, x, stages, metric=metric, impl=impl),  # noqa: B023
        }.items():
            ours, expected = search("triton"), search("reference")
            check(f"{what} {metric} {name}", [ours.scores], [expected.scores], 1e-4)
    many = min(ROWS, RESCANNED + 1)  # of which every pair is scored, on a GPU
    ours, expected = (prefix_topk(q[:2], x, many, dim=D, impl=i) for i in ("triton", "reference"))
    check(f"topk of {many} {name}", [ours.scores], [expected.scores], 1e-4)


def phases(name: str, dtype: torch.dtype) -> None:
    """Scans that are gated by a threshold, of every number of queries that has its own blocks; ties
    that are rescanned; a search certified by bounds, where they suffice and where not."""
    rows = ROWS if ON_GPU else 600
    q, x = (randn(n, D, seed=i, dtype=torch.float32) for i, n in enumerate((QUERIES, rows)))
    if dtype.itemsize == 1:
        q, x = ((40 * v).round().clamp(-128, 127) for v in (q, x))
    q, x = q.to(dtype), x.to(dtype)
    tied = x[:1].expand(rows, D).contiguous()
    with small_buffers():
        for metric in METRICS if ON_GPU or dtype == torch.float32 else METRICS[:1]:
            for queries in (QUERIES, 50, 20, 1) if ON_GPU else (QUERIES,):
                for dim in DIMS[1:] if ON_GPU else (D,):
                    search(f"phases {metric} {name}", q[:queries], x, dim, metric)
            search(f"ties {metric} {name}", q[:3], tied, D, metric)
            if dtype.itemsize > 1 and (ON_GPU or metric == "l2"):
                exact(f"exact {metric} {name}", q[:3], x, metric)


def search(name: str, q: Tensor, x: Tensor, dim: int, metric: str) -> None:
    scores = reference.scores(q, x, dim, metric).sort(dim=1, descending=True).values
    check(name, [triton_topk(q, x, K, dim, metric)[0]], [scores[:, :K]], 1e-4)


def exact(name: str, q: Tensor, x: Tensor, metric: str) -> None:
    for structured in (True, False):
        x = x.clone()
        if structured:
            x[:, DIMS[1] :] *= 1e-3
        (terms, norm), (short, short_norm) = (row_terms(x[:, :d], metric) for d in (D, DIMS[1]))
        tails = torch.linalg.vector_norm(x[:, DIMS[1] :].float(), dim=1) * (1 + 1e-6)
        tails = tails if terms.scale is None else tails * terms.scale
        bounds = KnownRows(terms._replace(outer=tails), norm)
        prefix = Prefix(DIMS[1], KnownRows(short, short_norm), bounds)
        result = empty(q, K)
        exact_topk(q, x, K, metric, result, KnownRows(terms, norm), prefix)
        scores = reference.scores(q, x, D, metric).sort(dim=1, descending=True).values
        check(name, [result[0]], [scores[:, :K]], 1e-5)


@contextmanager
def small_buffers() -> Iterator[None]:
    """So that few rows are scanned in phases, and survivors of a bound may be too many."""
    before = plan.BUFFER, plan.LEAST_RANK, certified.SURVIVORS
    plan.BUFFER, plan.LEAST_RANK, certified.SURVIVORS = (16, 32), 4, 40
    try:
        yield
    finally:
        plan.BUFFER, plan.LEAST_RANK, certified.SURVIVORS = before


def main() -> None:
    errors = {"fp32": 1e-4, "bf16": 1e-1, "fp16": 3e-2}  # of the largest; the tests are stricter
    for name in errors if ON_GPU else ("fp32",):
        searches(name, DTYPES[name])
        losses(name, DTYPES[name], errors[name])
    eight = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    for name, dtype in (DTYPES | eight if ON_GPU else {"fp32": torch.float32} | eight).items():
        phases(name, dtype)


if __name__ == "__main__":
    if not ON_GPU:
        interpreter.install()
    main()
