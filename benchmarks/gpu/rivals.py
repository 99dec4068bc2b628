"""Searches by PyTorch on a GPU, each made into ``() → (scores, ids)``.

torch             matmul and topk, in the chunks of queries or of rows that are fastest here;
                  half precision scores are rounded to it, in torch_fp32_scores they are not
compiled          a chunk of the same under torch.compile
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Call, device_seconds, lazily

SCORE_BYTES = 4 << 30  # of a chunk of scores
TRIAL_QUERIES = 1024  # that chunks are chosen on
GATHER_BYTES = 2 << 30

Result = tuple[Tensor, Tensor]
Score = Callable[[Tensor, slice], Tensor]  # queries [b, d], rows → [b, rows]
Chunk = Callable[[Tensor, slice], Result]  # the k best of these rows, counted from their first


def wide(dtype: torch.dtype | None) -> dict[str, Any]:
    return {} if dtype is None else {"out_dtype": dtype}


def scores_of(x: Tensor, metric: str, out_dtype: torch.dtype | None = None) -> Score:
    """A function that scores; the rows' norms are computed ahead, as an index would do it."""
    widened = wide(out_dtype)
    if metric == "ip":
        return lambda q, rows: torch.mm(q, x[rows].T, **widened)
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    if metric == "cosine":
        inverse = norms.reciprocal().to(out_dtype or x.dtype)

        def cosine(q: Tensor, rows: slice) -> Tensor:
            unit = torch.nn.functional.normalize(q)
            return torch.mm(unit, x[rows].T, **widened).mul_(inverse[rows])

        return cosine
    squares = norms.square().to(out_dtype or x.dtype)

    def l2(q: Tensor, rows: slice) -> Tensor:
        own = torch.linalg.vector_norm(q, dim=1, dtype=torch.float32).square()[:, None]
        doubled = torch.mm(q, x[rows].T, **widened).mul_(2).sub_(squares[rows])
        return doubled.sub_(own.to(doubled.dtype))

    return l2


def scan(q: Tensor, count: int, k: int, chunk: Chunk, query_step: int, row_step: int) -> Result:
    found = []
    for some in q.split(query_step):
        parts = []
        for begin in range(0, count, row_step):
            values, ids = chunk(some, slice(begin, min(begin + row_step, count)))
            parts.append((values, ids + begin))
        values, ids = (torch.cat(t, 1) for t in zip(*parts, strict=True))
        if len(parts) > 1:
            values, order = values.topk(k)
            ids = ids.gather(1, order)
        found.append((values, ids))
    values, ids = (torch.cat(t) for t in zip(*found, strict=True))
    return values, ids


def torch_topk(
    q: Tensor, x: Tensor, k: int, metric: str = "ip", out_dtype: torch.dtype | None = None, *,
    compiled: bool = False,
) -> Call:  # fmt: skip
    def build() -> Call:
        score, count = scores_of(x, metric, out_dtype), len(x)
        size = (out_dtype or x.dtype).itemsize

        def chunk(some: Tensor, rows: slice) -> Result:
            return score(some, rows).topk(min(k, rows.stop - rows.start))

        row_steps = [count, *(n for n in (1 << 17, 1 << 20) if n < count)]
        steps = [(max(1, SCORE_BYTES // (n * size)), n) for n in row_steps]
        trials = {}
        for step in steps if len(steps) > 1 else []:
            trial = lambda step=step: scan(q[:TRIAL_QUERIES], count, k, chunk, *step)  # noqa: E731
            trial()
            trials[step] = device_seconds(trial)
        best = min(trials, key=lambda step: trials[step], default=steps[0])
        if not compiled:
            return lambda: scan(q, count, k, chunk, *best)
        whole: Any = torch.compile(
            lambda some, part: torch.topk(some @ part.T, min(k, len(part))), dynamic=False
        )
        return lambda: scan(q, count, k, lambda some, rows: whole(some, x[rows]), *best)

    return lazily(build)


def torch_rerank(
    q: Tensor, x: Tensor, candidates: Tensor, k: int, out_dtype: torch.dtype | None = None, *,
    summed: bool = False,
) -> Call:  # fmt: skip
    """Gathers candidates, as many as fit, and scores them by bmm; or by products that are summed,
    compiled: then nothing gathered needs to be written."""
    step = max(1, GATHER_BYTES // (candidates.shape[1] * x.shape[1] * x.element_size()))

    def by_bmm(some: Tensor, rows: Tensor) -> Tensor:
        return torch.bmm(x[rows], some[:, :, None], **wide(out_dtype))[:, :, 0]

    def by_sum(some: Tensor, rows: Tensor) -> Tensor:
        return (x[rows].float() * some.float()[:, None]).sum(-1)

    def build() -> Call:
        score = torch.compile(by_sum, dynamic=False) if summed else by_bmm

        def call() -> Result:
            found = []
            for some, rows in zip(q.split(step), candidates.split(step), strict=True):
                best = score(some, rows).topk(k)
                found.append((best.values, rows.gather(1, best.indices)))
            values, ids = (torch.cat(t) for t in zip(*found, strict=True))
            return values, ids

        return call

    return lazily(build)


def torch_funnel(
    q: Tensor, x: Tensor, stages: Sequence[tuple[int, int]], out_dtype: torch.dtype | None = None
) -> Call:
    (first, kept), *later = stages
    start = torch_topk(q[:, :first], x[:, :first], kept, out_dtype=out_dtype)

    def call() -> Result:
        scores, rows = start()
        for dim, keep in later:
            scores, rows = torch_rerank(q[:, :dim], x[:, :dim], rows, keep, out_dtype)()
        return scores, rows

    return call
