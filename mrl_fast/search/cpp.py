"""Search by C++ SIMD kernels: one chain of multiply-adds a pair, whatever is searched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrl_fast.shared import native
from mrl_fast.shared.checks import check_finite
from mrl_fast.shared.memory import HOST, address, empty
from mrl_fast.shared.native import _C, DTYPES, METRICS
from mrl_fast.shared.types import Stage

F32, F64, I64 = torch.float32, torch.float64, torch.int64


def prefix_topk(
    queries: Tensor, database: Tensor, k: int, dim: int, metric: str
) -> tuple[Tensor, Tensor]:
    return funnel_search(queries, database, [(dim, k)], metric)


def funnel_search(
    queries: Tensor, database: Tensor, stages: Sequence[Stage], metric: str
) -> tuple[Tensor, Tensor]:
    return search_rows(queries, row_major(database), stages, metric, database)


def row_major(database: Tensor) -> _C.Rows:
    begin = address(database, database.dtype)
    span = (0, database.shape[0], 0, 0, begin, database.stride(0), 0, 0, 0, 0, 0, 0, 0)
    return _C.Rows([span], 0, 0, DTYPES[database.dtype], [], ([], 0, 0, 0), 0)


def search_rows(
    queries: Tensor,
    rows: _C.Rows,
    stages: Sequence[Stage],
    metric: str,
    unchecked: Tensor | None = None,
    graph: _C.Graph | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the stages. The first one's dim is at least the rows' packed columns.

    ``unchecked``: the vectors, where it is not known yet that they are finite. ``graph``: that
    the first stage walks.
    """
    q = queries.float()  # [B, D]; a half-precision value is exact in fp32
    scores, ids = _results(q, stages[-1][1])
    problem = _C.search(
        rows, _queries(q), METRICS[metric].number, _stages(stages), native.run(), _to(scores, ids),
        graph,
    )  # fmt: skip
    widest = queries.shape[1] if graph is not None else max(stage[0] for stage in stages)
    _refuse(problem, queries, widest, unchecked)
    return scores, ids


def exact_search(
    queries: Tensor, rows: _C.Rows, dim: int, k: int, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best by fp64 scores; and how many rows of each query were read beyond their prefix."""
    return _exact_search(queries, rows, (dim, k, 0), metric, None)


def ranked_exact_search(
    queries: Tensor, rows: _C.Rows, dim: int, k: int, metric: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``exact_search``; and the fp64 scores, ``[B, k]``, which tell rows apart whose scores are
    equal in fp32."""
    scores64 = empty(queries.shape[0], k, dtype=F64)
    return *_exact_search(queries, rows, (dim, k, 0), metric, scores64), scores64


def _exact_search(
    queries: Tensor,
    rows: _C.Rows,
    stage: tuple[int, int, int],
    metric: str,
    scores64: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, ids = _results(queries, stage[1])
    touched = empty(queries.shape[0], dtype=I64)
    problem = _C.exact_search(
        rows, _queries(queries), METRICS[metric].number, stage, native.run(),
        _to(scores, ids, scores64), address(touched, I64),
    )  # fmt: skip
    _refuse(problem, queries, stage[0])
    return scores, ids, touched


def range_search(
    queries: Tensor, rows: _C.Rows, dim: int, threshold: float, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Limits, scores and ids of every row that reaches the threshold, as exact search scores it."""
    return _range_search(queries, rows, dim, threshold, metric, ranked=False)[:3]


def ranked_range_search(
    queries: Tensor, rows: _C.Rows, dim: int, threshold: float, metric: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``range_search``; and the fp64 scores."""
    return _range_search(queries, rows, dim, threshold, metric, ranked=True)


def _range_search(
    queries: Tensor, rows: _C.Rows, dim: int, threshold: float, metric: str, *, ranked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _C.range_search(
        rows, _queries(queries), METRICS[metric].number, dim, threshold, native.run()
    )
    _refuse(found.problem, queries, dim)
    limits = torch.tensor([0, *found.counts], dtype=I64, device=HOST).cumsum(0)
    total = int(limits[-1])
    scores, ids = empty(total), empty(total, dtype=I64)
    scores64 = empty(total if ranked else 0, dtype=F64)
    found.write(*_to(scores, ids, scores64 if ranked else None))
    return limits, scores, ids, scores64


def rerank(
    queries: Tensor, database: Tensor, candidates: Tensor, k: int, dim: int, metric: str
) -> tuple[Tensor, Tensor]:
    q, candidates = queries.float(), candidates.contiguous()
    scores, ids = _results(q, k)
    problem = _C.rerank(
        row_major(database), _queries(q), METRICS[metric].number,
        (address(candidates, I64), candidates.shape[1]), (dim, k, 0), native.run(),
        _to(scores, ids),
    )  # fmt: skip
    _refuse(problem, queries, dim, database)
    return scores, ids


def _stages(stages: Sequence[Stage]) -> list[tuple[int, int, int]]:
    """As (dim, keep, bits); of a graph (beam, keep, −1)."""
    return [
        (*stage[1:], -1)
        if stage[0] == "graph"
        else (stage[0], stage[-1], stage[1] if len(stage) == 3 else 0)
        for stage in stages
    ]


def _queries(q: Tensor) -> tuple[int, int, int]:
    return address(q, F32), q.shape[0], q.stride(0)


def _to(scores: Tensor, ids: Tensor, scores64: Tensor | None = None) -> tuple[int, int, int]:
    return address(scores, F32), address(ids, I64), address(scores64, F64)


def _results(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    count = queries.shape[0]  # len() of a tensor takes a microsecond
    return empty(count, k), empty(count, k, dtype=I64)


def _refuse(problem: str, queries: Tensor, dim: int, unchecked: Tensor | None = None) -> None:
    if problem:
        check_finite(queries[:, :dim], "queries")
        if unchecked is not None:
            check_finite(unchecked[:, :dim], "database")
        raise ValueError(
            "database: expected scores within float32, got one beyond (vectors too large)"
        )
