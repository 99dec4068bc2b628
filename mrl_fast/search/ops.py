"""Exact top-k by prefix dot products, rerank, and the funnel that chains them.

Every score comes from one canonical routine an implementation, so results depend neither on the
batch nor on threads or blocks, and equal scores are ordered by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mrl_fast.shared.arrays import as_integers, as_vectors, result_like
from mrl_fast.shared.checks import (
    FLOATS,
    METRICS,
    check_choice,
    check_finite,
    check_int,
    check_same_device,
    check_stages,
    dtype_name,
)
from mrl_fast.shared.dispatch import choose, module_of
from mrl_fast.shared.types import ApproxResult, SearchResult, Stage

SEARCHED = (*FLOATS, torch.int8, torch.float8_e4m3fn)


def prefix_topk(
    queries: Any,
    database: Any,
    k: int,
    *,
    dim: int | None = None,
    metric: str = "ip",
    out: SearchResult | None = None,
    impl: str | None = None,
) -> SearchResult:
    """The k best rows of a database for each query, by their first ``dim`` columns.

    Equals ``torch.topk(queries[:, :dim] @ database[:, :dim].T, k)`` with ties in the order of rows,
    and no score matrix in memory. Nothing is copied: a prefix of a wide row-major matrix is read in
    place. fp32 accumulation. On a GPU finiteness is not checked, and the call does not wait for the
    device: it can be captured in a CUDA graph.

    Args:
        queries: ``[B, D]`` (or only as wide as the prefix), float32, float16, bfloat16, int8 or
            float8_e4m3fn (eight bits are scored as the numbers they are; on a CPU, and float8 on
            GPUs without it, as a float16 copy), float64 searched as float32; tensor, numpy array,
            DLPack object or list of rows. A single query ``[D]`` is ``[1, D]``.
        database: ``[N, D]``, any row stride, on the same device.
        k: Neighbours a query, at least 1; beyond N they are missing.
        dim: Prefix width in ``[1, D]``; None is the full width.
        metric: ``"ip"``, ``"cosine"`` (each prefix normalised on its own; 0 where its norm is 0),
            ``"l2"`` (scores are −squared distance), or another of ``mrl_fast.search.reference``.
        out: A SearchResult of contiguous ``[B, k]`` fp32 and int64 tensors or arrays to write to.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        SearchResult: scores ``[B, k]`` fp32 and ids ``[B, k]`` int64, best first; −inf and −1 where
            missing.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype or device; NaN or infinite
            values (on a CPU).
    """
    k = check_int(k, "k", 1)
    q, x, dim = _check_vectors(queries, database, dim)
    ops = _implementation(impl, metric, q, x, dim)
    result = SearchResult(*ops.prefix_topk(q, x, k, dim, metric))
    return result_like(queries, result, out)


def approx_topk(
    queries: Any,
    database: Any,
    k: int,
    *,
    recall: float = 0.95,
    dim: int | None = None,
    metric: str = "ip",
    impl: str | None = None,
) -> ApproxResult:
    """The k best rows, but for those that share a bucket with a better one.

    As ``jax.lax.approx_max_k``: rows are dealt to buckets of which each keeps its best. It costs
    one pass whatever the data; ``prefix_topk``, which is exact, costs about as much unless
    thousands of scores are equal.

    Args:
        queries, database, k, dim, metric, impl: As in ``prefix_topk``. ``"cpp"`` and
            ``"reference"`` search exactly.
        recall: The expected share of the k best among those found, if their positions are random,
            in (0, 1]; the number of buckets follows from it. At 1 the search is exact.

    Returns:
        ApproxResult: As a SearchResult, and ``expected_recall``.

    Raises:
        ValueError, TypeError: As ``prefix_topk``.

    Source: Chern et al., TPU-KNN: K Nearest Neighbor Search at Peak FLOP/s, NeurIPS 2022.
    """
    k = check_int(k, "k", 1)
    q, x, dim = _check_vectors(queries, database, dim)
    if not 0 < recall <= 1:
        raise ValueError(f"recall: expected a number in (0, 1], got {recall}")
    ops, expected = _implementation(impl, metric, q, x, dim), 1.0
    if recall < 1 and hasattr(ops, "approx_topk"):
        found, expected = ops.approx_topk(q, x, k, dim, metric, recall)
    else:
        found = ops.prefix_topk(q, x, k, dim, metric)
    result = ApproxResult(*result_like(queries, SearchResult(*found)))
    result.expected_recall = expected
    return result


def rerank(
    queries: Any,
    database: Any,
    candidates: Any,
    k: int,
    *,
    dim: int | None = None,
    metric: str = "ip",
    impl: str | None = None,
) -> SearchResult:
    """The k best of each query's candidate rows, by their first ``dim`` columns.

    Equals scoring ``database[candidates]`` and ``torch.topk``, without gathering the candidates
    first. The scores are those that ``prefix_topk`` gives the same pairs.

    Args:
        queries: ``[B, D]`` (or only as wide as the prefix), float32, float16 or bfloat16, as in
            ``prefix_topk``. A single query ``[D]`` is ``[1, D]``.
        database: ``[N, D]``, any row stride, on the same device.
        candidates: ``[B, C]`` rows in ``[0, N)``, integers of any width, in any order; −1 is no
            candidate. A row given twice counts twice. A single query's may be ``[C]``.
        k: Neighbours a query, at least 1; beyond the candidates they are missing.
        dim: Prefix width in ``[1, D]``; None is the full width.
        metric: As in ``prefix_topk``.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        SearchResult: scores ``[B, k]`` fp32 and ids ``[B, k]`` int64, best first; −inf and −1 where
            missing.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; NaN or
            infinite values (on a CPU).
    """
    q, x, dim = _check_vectors(queries, database, dim)
    rows = as_integers(candidates, "candidates")
    rows = rows[None] if rows.ndim == len(q) == 1 else rows
    if rows.ndim != 2 or len(rows) != len(q):
        raise ValueError(f"candidates: expected shape [{len(q)}, C], got {list(rows.shape)}")
    check_same_device(rows, "candidates", q)
    if not rows.is_cuda and rows.numel():
        low, high = rows.aminmax()
        if low < -1 or high >= len(x):
            wrong = int(low if low < -1 else high)
            raise ValueError(f"candidates: expected rows in [0, {len(x)}) or -1, got {wrong}")
    k = check_int(k, "k", 1)
    ops = _implementation(impl, metric, q, x, dim)
    return result_like(queries, SearchResult(*ops.rerank(q, x, rows, k, dim, metric)))


def funnel_search(
    queries: Any,
    database: Any,
    stages: Sequence[Stage],
    *,
    metric: str = "ip",
    impl: str | None = None,
) -> SearchResult:
    """Searches a short prefix of all rows, then ever longer prefixes of ever fewer.

    Stage 0 is ``prefix_topk`` at its dim; each later stage reranks what the stage before kept. A
    stage adds only the columns that are new to it. Two stages are adaptive retrieval.

    Args:
        queries: ``[B, D]`` (or only as wide as the prefix), float32, float16 or bfloat16, as in
            ``prefix_topk``. A single query ``[D]`` is ``[1, D]``.
        database: ``[N, D]``, any row stride, on the same device.
        stages: ``(dim, keep)`` pairs, dims strictly ascending, keeps not growing: ``[(16, 200),
            (64, 50), (768, 10)]``.
        metric: As in ``prefix_topk``.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        SearchResult: the last stage's keep: scores at its dim, fp32, and ids int64, best first.

    Raises:
        ValueError, TypeError: As ``prefix_topk``; stages of the wrong form.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 4.3.
    """
    checked = check_stages(stages)
    q, x, dim = _check_vectors(queries, database, checked[-1][0], "stages")
    ops = _implementation(impl, metric, q, x, dim)
    return result_like(queries, SearchResult(*ops.funnel_search(q, x, checked, metric)))


def _implementation(
    impl: str | None, metric: str, queries: Tensor, database: Tensor, dim: int
) -> ModuleType:
    """The functions that run: one that is named, or the device's, may lack a metric."""
    check_choice(metric, "metric", METRICS)
    name = choose(impl, queries, database)
    if not queries.is_cuda and name != "cpp":  # which checks them itself
        check_finite(queries[:, :dim], "queries")
    ops = module_of(name, "search")
    check_choice(metric, "metric", ops.METRICS, f" with impl={name!r}")
    return ops


def _has_eight_bits(x: Tensor) -> bool:
    if x.dtype == torch.int8:
        return x.is_cuda
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


def _check_vectors(
    queries: Any, database: Any, dim: int | None, dim_name: str = "dim"
) -> tuple[Tensor, Tensor, int]:
    """Both as tensors, and the width of the widest prefix; float64 is searched as float32."""
    q = as_vectors(queries, "queries", SEARCHED, one=True)
    x = as_vectors(database, "database", SEARCHED)
    if dim is None and q.shape[1] != x.shape[1]:
        raise ValueError(f"queries: expected width {x.shape[1]} as database, got {q.shape[1]}")
    width = min(q.shape[1], x.shape[1])
    if width < 1:
        raise ValueError("database: expected vectors of at least one column, got none")
    dim = width if dim is None else check_int(dim, dim_name, 1, width)
    check_same_device(q, "queries", x)
    q, x = (y.float() if y.dtype == torch.float64 else y for y in (q, x))
    if q.dtype != x.dtype:
        raise TypeError(f"queries: expected {x.dtype} as database, got {dtype_name(queries)}")
    if q.element_size() == 1 and not _has_eight_bits(q):
        q, x = q.half(), x.half()  # exact
    return q, x, dim
