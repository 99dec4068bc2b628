"""Scores in fp64, by which searches are judged, on as many queries as is affordable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

JUDGED = 64  # queries of a batch, spread over it
CHUNK_BYTES = 1 << 30  # of fp64 rows, or of scores


def spread_over(count: int, judged: int = JUDGED) -> Tensor:
    """The first, the last and others in between, ``[min(count, judged)]``."""
    return torch.linspace(0, count - 1, min(count, judged)).round().long()


def pair_scores(q: Tensor, x: Tensor, rows: Tensor, metric: str) -> Tensor:
    """The fp64 scores of each query ``[B, d]`` with its own rows ``[B, C]``."""
    step = max(1, CHUNK_BYTES // (8 * x.shape[1] * rows.shape[1]))
    parts = []
    for some, ids in zip(q.split(step), rows.split(step), strict=True):
        found, wide = x[ids].double(), some.double()[:, None]  # [b, C, d], [b, 1, d]
        if metric == "l2":
            parts.append(-(found - wide).square().sum(-1))
            continue
        scores = (found * wide).sum(-1)
        if metric == "cosine":
            scores /= found.norm(dim=-1) * wide.norm(dim=-1)
        parts.append(scores)
    return torch.cat(parts)


def topk(q: Tensor, x: Tensor, k: int, metric: str = "ip") -> tuple[Tensor, Tensor]:
    """The k best scores, fp64, and rows of all, ``[B, k]``."""
    wide = q.double()
    if metric == "cosine":
        wide = wide / wide.norm(dim=1, keepdim=True)
    step = max(k, CHUNK_BYTES // (8 * max(x.shape[1], len(q))))
    best, rows = wide.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64).to(q.device)
    for begin in range(0, len(x), step):
        part = x[begin : begin + step].double()
        scores = wide @ part.T
        if metric == "cosine":
            scores /= part.norm(dim=1)
        if metric == "l2":
            scores = 2 * scores - part.square().sum(1) - wide.square().sum(1, keepdim=True)
        new = scores.topk(min(k, len(part)), dim=1)
        both = torch.cat([best, new.values], 1), torch.cat([rows, new.indices + begin], 1)
        best, order = both[0].topk(min(k, both[0].shape[1]), dim=1)
        rows = both[1].gather(1, order)
    return best, rows


def tolerance(q: Tensor, x: Tensor, metric: str) -> Tensor:
    """Bound on the error of d + 16 roundings in fp32, ``[B, 1]``."""
    relative = (x.shape[1] + 16) * 2.0**-24
    if metric == "cosine":
        return torch.full((len(q), 1), 2 * relative).to(q.device)
    widest = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).max()
    norms = torch.linalg.vector_norm(q, dim=1, dtype=torch.float32)[:, None]
    return relative * ((norms + widest) ** 2 if metric == "l2" else norms * widest)


def recall(true_scores: Tensor, least: Tensor) -> float:
    """Share of what was found that belongs among the k best, ties included.

    Args:
        true_scores: ``[B, k]`` fp64, of the rows that were found.
        least: ``[B, 1]``, what the k-th best has, less the tolerance.
    """
    return (true_scores >= least).double().mean().item()


def check_form(scores: Tensor, ids: Tensor, rows: int) -> None:
    """Checks that rows exist, that none comes twice, and that scores fall."""
    assert ((ids >= 0) & (ids < rows)).all(), "an id is no row"
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all(), "a row twice"
    assert (scores.diff(dim=1) <= 0).all(), "scores out of order"


def funnel(q: Tensor, x: Tensor, stages: Sequence[tuple[int, int]]) -> Tensor:
    """Rows that the stages keep by exact scores, ``[B, last keep]``."""
    (dim, keep), *later = stages
    rows = topk(q[:, :dim], x[:, :dim], keep)[1]
    for dim, keep in later:
        scores = pair_scores(q[:, :dim], x[:, :dim], rows, "ip")
        rows = rows.gather(1, scores.topk(keep, dim=1).indices)
    return rows
