"""Search by C++ SIMD kernels: one chain of multiply-adds a pair, whatever is searched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrl_fast import _C
from mrl_fast._checks import METRICS, check_finite
from mrl_fast.cpu import native

DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
}  # as enum DType in csrc/cpu/engine.h


def prefix_topk(
    queries: Tensor, database: Tensor, k: int, dim: int, metric: str
) -> tuple[Tensor, Tensor]:
    return funnel_search(queries, database, [(dim, k)], metric)


def funnel_search(
    queries: Tensor, database: Tensor, stages: Sequence[tuple[int, int]], metric: str
) -> tuple[Tensor, Tensor]:
    none = torch.empty(0, 0)
    return search_rows(queries, none, database, len(database), stages, metric)


def search_rows(
    queries: Tensor,
    packed: Tensor,
    tail: Tensor,
    rows: int,
    stages: Sequence[tuple[int, int]],
    metric: str,
) -> tuple[Tensor, Tensor]:
    """Searches rows whose first columns lie in vertical tiles and whose others lie row-major.

    Args:
        packed: ``[ceil(rows / TILE), p, TILE]`` fp32, or empty where p is 0. The first stage's dim
            is at least p.
        tail: ``[>= rows, D - p]``, the other columns.
    """
    packed_dim = packed.shape[1]
    q = queries.float()  # [B, D]; a half-precision value is exact in fp32
    scores, ids = _results(q, stages[-1][1])
    problem = _C.search(
        packed.data_ptr(), packed_dim, tail.data_ptr(), DTYPES[tail.dtype], tail.stride(0), rows,
        q.data_ptr(), len(q), q.stride(0), METRICS.index(metric), list(stages),
        torch.get_num_threads(), native.ISA, scores.data_ptr(), ids.data_ptr(),
    )  # fmt: skip
    _refuse(problem, tail[:rows, : stages[-1][0] - packed_dim])
    return scores, ids


def rerank(
    queries: Tensor, database: Tensor, candidates: Tensor, k: int, dim: int, metric: str
) -> tuple[Tensor, Tensor]:
    q, candidates = queries.float(), candidates.contiguous()
    scores, ids = _results(q, k)
    problem = _C.rerank(
        database.data_ptr(), DTYPES[database.dtype], database.stride(0), len(database),
        q.data_ptr(), len(q), q.stride(0), METRICS.index(metric), candidates.data_ptr(),
        candidates.shape[1], dim, k, torch.get_num_threads(), native.ISA,
        scores.data_ptr(), ids.data_ptr(),
    )  # fmt: skip
    _refuse(problem, database[:, :dim])
    return scores, ids


def pack(vectors: Tensor, tiles: Tensor) -> None:
    """Writes ``[n, p]`` vectors into vertical tiles ``[ceil(n / TILE), p, TILE]`` fp32; padding is
    0."""
    problem = _C.pack_rows(
        vectors.data_ptr(), DTYPES[vectors.dtype], vectors.stride(0),
        len(vectors), vectors.shape[1], torch.get_num_threads(), native.ISA, tiles.data_ptr(),
    )  # fmt: skip
    _refuse(problem, vectors)


def _results(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)


def _refuse(problem: str, vectors: Tensor) -> None:
    if problem:
        check_finite(vectors, "database")
        raise ValueError(
            "database: expected scores within float32, got one beyond (vectors too large)"
        )
