"""Exact top-k by prefix dot products, rerank and the funnel, with no [B, N] score matrix and
without waiting for the device.

A scan keeps the buckets of rows that its own rounding cannot exclude (scan.py); their rows are
scored again, pair by pair, by the canonical routine (pairs.py), and what comes back is selected
from those by (score, row) (keys.py). A query whose buffer overflows, as among thousands of equal
rows, is flagged, and the device itself scans all rows for it by that routine.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from mrl_fast.kernels.keys import Result, narrow, select
from mrl_fast.kernels.pairs import RESCANNED, WHOLE_BLOCK, Pairs
from mrl_fast.kernels.scan import BUCKET, Margin, Scan, Vectors, scan_config
from mrl_fast.kernels.tiling import chunks, operand
from torch import Tensor

TEMPORARY_BYTES = 256 << 20
BUFFER = 2048, 16384  # buckets a query, at least and at most
LEAST_RANK = 16  # a threshold by fewer is a matter of luck


class Plan(NamedTuple):
    """How a scan for k of N rows goes: exact, where its error is that of fp32 sums."""

    rank: int  # of the threshold
    buffer: int  # buckets
    kept: int  # buckets whose rows are scored again
    ends: list[int]  # of the phases, in tiles; the first seeds the threshold

    @classmethod
    def of(cls, k: int, tiles: int, block_n: int, *, exact: bool) -> "Plan":
        rank = max(k, LEAST_RANK)
        buffer = min(max(triton.next_power_of_2(64 * rank), BUFFER[0]), BUFFER[1])
        # Of the next r times as many rows as were seen, about r · rank buckets are kept.
        growth = max(1.0, (buffer - 2 * rank) / (3 * rank))
        ends = [min(tiles, buffer * BUCKET // block_n)]
        while ends[-1] < tiles:
            ends.append(min(tiles, int(ends[-1] * (1 + growth)) + 1))
        kept = triton.next_power_of_2(rank + rank // 8 + 8 if exact else 2 * rank)
        return cls(rank, buffer, kept, ends)

    @property
    def bytes(self) -> int:
        """Of a query's temporaries."""
        return 8 * (self.buffer + self.kept * BUCKET)


def row_vectors(x: Tensor, metric: str) -> tuple[Vectors, Tensor]:
    """The metric's part of each row of ``x [N, dim]``, and the largest norm, ``[1]``; infinite
    where squares leave fp32's normal range, so that no bound holds."""
    norms = row_norms(x)
    largest = norms.nan_to_num(0.0, torch.inf).max() * (1 + 1e-6)
    vectors = Vectors()
    if metric == "cosine":
        smallest = torch.where(norms > 0, norms, torch.inf).min()
        largest = torch.where(smallest > 2.0**-40, largest, torch.inf)
        vectors = Vectors(scale=norms.reciprocal().where(norms != 0, 0.0))
    if metric == "l2":
        vectors = Vectors(term=-0.5 * norms * norms)
    return vectors, largest.reshape(1)


def row_norms(x: Tensor) -> Tensor:
    """``[N]`` fp32."""
    norm = torch.linalg.vector_norm
    if x.element_size() > 1:
        return norm(x, dim=1, dtype=torch.float32)
    return torch.cat([norm(part.float(), dim=1) for part in x.split(1 << 20)])


def prefix_topk(queries: Tensor, database: Tensor, k: int, dim: int, metric: str) -> Result:
    """The k best rows of each query."""
    q, x = operand(queries[:, :dim]), operand(database[:, :dim])
    result = empty(q, k)
    topk(q, x, k, metric, result)
    return result


def topk(
    q: Tensor,
    x: Tensor,
    k: int,
    metric: str,
    result: Result,
    *,
    rows: tuple[Vectors, Tensor] | None = None,
    allowed: Tensor | None = None,
    ids: Tensor | None = None,
    linear: bool = False,
) -> None:
    """The k best of the rows ``x [N, dim]`` to ``result``.

    Args:
        rows: The metric's part of each row, −inf where a row is not allowed, and the largest norm;
            None: to be found.
        allowed: ``[N]`` uint8, 0 where a row may not be found.
        ids: ``[N]`` int64, what rows are called in the result.
        linear: Scores are what ``rows`` makes of products, not the metric's.
    """
    if not len(q) * len(x):
        return
    if k > RESCANNED:
        return score_all(
            q, x, k, metric, result, rows=rows, allowed=allowed, ids=ids, linear=linear
        )
    block_n = scan_config(len(q), x).BLOCK_N
    plan = Plan.of(
        k, triton.cdiv(len(x), block_n), block_n, exact=Margin.of(x, metric).bound < 1e-3
    )
    step = max(1, TEMPORARY_BYTES // plan.bytes)
    if rows is None and len(q) > min(step, scan_config(len(q), x).BLOCK_B):
        rows = row_vectors(x, metric)  # rather than once a tile of queries
    q_norms = row_norms(q)
    for part in chunks(len(q), step):
        vectors, norm = rows or (None, torch.zeros(1, device=q.device))
        pairs = Pairs(
            q[part], x, metric, allowed=allowed,
            linear=(vectors.scale, vectors.term) if linear else None,
        )  # fmt: skip
        scan = Scan(q[part], x, metric, vectors, q_norms[part], norm)
        keys = shortlist(scan, pairs, k, plan, Margin.of(x, metric), q_norms[part])
        select(keys, (result[0][part], result[1][part]), ids)


def shortlist(
    scan: Scan, pairs: Pairs, k: int, plan: Plan, margin: Margin, q_norms: Tensor
) -> Tensor:
    """Keys of rows among which are each query's k best, ``[B, kept · BUCKET]``."""
    B, device, config = len(scan.q), scan.q.device, scan.config
    hits = torch.empty(B, plan.buffer, dtype=torch.int64, device=device)
    seeds = plan.ends[0] * config.BLOCK_N // BUCKET
    count = torch.full((B,), seeds, dtype=torch.int32, device=device)
    flag = torch.zeros(B, dtype=torch.int32, device=device)
    theta = torch.empty(B, device=device)
    begin = 0
    for end in plan.ends:
        scan(hits, count, theta, begin, end, dense=begin == 0)
        narrow(hits, count, flag, theta, q_norms, scan.norm, plan.rank, margin[1:])
        begin = end
    found = pairs.bucket_keys(hits, count, flag, plan.kept, config.BLOCK_N, config.groups)
    pairs.rescan(found, flag, k)
    return found


def score_all(
    q: Tensor, x: Tensor, k: int, metric: str, result: Result, *,
    rows: tuple[Vectors, Tensor] | None = None, allowed: Tensor | None = None,
    ids: Tensor | None = None, linear: bool = False,
) -> None:  # fmt: skip
    """The k best of all rows, every pair scored canonically; a chunk of queries and of rows at a
    time, at least as many rows as are kept."""
    least = max(4096, k)
    vectors = rows[0] if rows else Vectors()
    for part in chunks(len(q), max(1, TEMPORARY_BYTES // (32 * (min(len(x), least) + k)))):
        pairs = Pairs(
            q[part], x, metric, allowed=allowed,
            linear=(vectors.scale, vectors.term) if linear else None,
        )  # fmt: skip
        size = part.stop - part.start
        best = torch.empty(size, 0, dtype=torch.int64, device=q.device)
        for found in chunks(len(x), max(least, TEMPORARY_BYTES // (32 * size) - k)):
            numbers = torch.arange(found.start, found.stop, device=q.device).expand(size, -1)
            best = torch.cat([best, pairs.keys(numbers)], 1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        select(best, (result[0][part], result[1][part]), ids)


def rerank(
    queries: Tensor, database: Tensor, candidates: Tensor, k: int, dim: int, metric: str
) -> Result:
    q, x = operand(queries[:, :dim]), operand(database[:, :dim])
    result = empty(q, k)
    rerank_rows(q, x, candidates.contiguous(), k, metric, result)
    return result


def rerank_rows(
    q: Tensor, x: Tensor, candidates: Tensor, k: int, metric: str, result: Result, *,
    begin: int = 0, sums: Tensor | None = None, ids: Tensor | None = None,
) -> None:  # fmt: skip
    """The k best candidates ``[B, C]`` to ``result``; ``sums [B, C]`` are those of the columns
    before ``begin``."""
    for part in chunks(len(q), max(1, TEMPORARY_BYTES // (24 * max(1, candidates.shape[1])))):
        carried = None if sums is None else sums[part]
        keys = Pairs(q[part], x, metric).keys(candidates[part], begin=begin, sums=carried)
        select(keys, (result[0][part], result[1][part]), ids)


def funnel_search(
    queries: Tensor, database: Tensor, stages: Sequence[tuple[int, int]], metric: str
) -> Result:
    """A score that is its sum, over whole blocks of columns, is carried to the next stage."""
    (dim, keep), *later = stages
    scores, rows = prefix_topk(queries, database, keep, dim, metric)
    for wider, keep in later:
        q, x = operand(queries[:, :wider]), operand(database[:, :wider])
        result = empty(q, keep)
        carried = metric != "cosine" and dim % WHOLE_BLOCK == 0
        rerank_rows(
            q, x, rows, keep, metric, result, begin=dim if carried else 0,
            sums=scores if carried else None,
        )  # fmt: skip
        (scores, rows), dim = result, wider
    return scores, rows


def empty(q: Tensor, k: int) -> Result:
    shape = len(q), k
    return (
        torch.full(shape, -torch.inf, device=q.device),
        torch.full(shape, -1, dtype=torch.int64, device=q.device),
    )
