"""The specification of search: every op in plain PyTorch, by a matrix of fp64 scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast.shared.types import SearchResult, Stage


def _cosine(q: Tensor, x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(q, dim=1)[:, None] * torch.linalg.vector_norm(x, dim=1)
    return torch.where(norms > 0, (q @ x.T) / norms, 0.0)


def _l2(q: Tensor, x: Tensor) -> Tensor:
    return -torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist").square()


SCORES = {"ip": lambda q, x: q @ x.T, "cosine": _cosine, "l2": _l2}  # [B, d], [N, d] -> [B, N]
METRICS = tuple(SCORES)


def scores(queries: Tensor, database: Tensor, dim: int, metric: str) -> Tensor:
    """Of every pair, ``[B, N]`` fp64."""
    return SCORES[metric](queries[:, :dim].double(), database[:, :dim].double())


def best(scores: Tensor, rows: Tensor, k: int) -> SearchResult:
    """The k best of each row of ``scores``, by (score descending, row ascending); a negative row
    marks a missing candidate."""
    scores = torch.where(rows >= 0, scores.float(), -torch.inf)  # [B, C]
    by_row = rows.where(rows >= 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    by_score = scores.gather(1, by_row).argsort(dim=1, descending=True, stable=True)[:, :k]
    order = by_row.gather(1, by_score)
    missing = k - order.shape[1]
    return SearchResult(
        F.pad(scores.gather(1, order), (0, missing), value=-torch.inf),
        F.pad(rows.gather(1, order), (0, missing), value=-1),
    )


def prefix_topk(queries: Tensor, database: Tensor, k: int, dim: int, metric: str) -> SearchResult:
    rows = torch.arange(len(database), dtype=torch.int64, device=queries.device)
    rows = rows.expand(len(queries), -1)
    return best(scores(queries, database, dim, metric), rows, k)


def rerank(
    queries: Tensor, database: Tensor, candidates: Tensor, k: int, dim: int, metric: str
) -> SearchResult:
    s = scores(queries, database, dim, metric)  # [B, N]
    if not len(database):
        s = s.new_zeros(len(queries), 1)
    return best(s.gather(1, candidates.clamp(min=0)), candidates, k)


def funnel_search(
    queries: Tensor, database: Tensor, stages: Sequence[Stage], metric: str
) -> SearchResult:
    (dim, keep), *later = stages
    result = prefix_topk(queries, database, keep, dim, metric)
    for dim, keep in later:
        result = rerank(queries, database, result.ids, keep, dim, metric)
    return result
