"""Exact top-k by prefix dot products, rerank and the funnel, with no [B, N] score matrix and
without waiting for the device.

A scan keeps the buckets of rows that its own rounding cannot exclude (scan.py); their rows are
scored again, pair by pair, by the canonical routine (pairs.py), and what comes back is selected
from those by (score, row) (keys.py). A query whose buffer overflows, as among thousands of equal
rows, is flagged, and the device itself scans all rows for it by that routine.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from mrl_fast.kernels.search.keys import Result, narrow, select
from mrl_fast.kernels.search.pair_scores import RESCANNED, WHOLE_BLOCK, Pairs
from mrl_fast.kernels.search.scan import BUCKET, Config, Margin, Scan, Vectors, scan_config
from mrl_fast.kernels.shared.tiling import chunks, operand
from torch import Tensor

TEMPORARY_BYTES = 256 << 20
BUFFER = 2048, 16384  # buckets a query, at least and at most
LEAST_RANK = 16  # a threshold by fewer is a matter of luck


class Plan(NamedTuple):
    """How a scan for k of N rows goes, by tiles of a shape and with an error within a margin."""

    rank: int  # of the threshold
    buffer: int  # buckets
    kept: int  # buckets whose rows are scored again
    ends: list[int]  # of the phases, in tiles; the first seeds the threshold

    @classmethod
    def of(cls, k: int, x: Tensor, config: Config, margin: Margin) -> "Plan":
        tiles = triton.cdiv(len(x), config.BLOCK_N)
        rank = max(k, LEAST_RANK)
        buffer = min(max(triton.next_power_of_2(64 * rank), BUFFER[0]), BUFFER[1])
        # Cosines of vectors that lie anywhere have a deviation of dim^-0.5; the best of millions
        # are 4.5 of it out, where so many more are within twice the error; in clusters more are.
        error = margin.c + margin.d + margin.e  # for norms of 1
        near = math.exp(min(9 * error * x.shape[1] ** 0.5, 3.0))
        # Of the next r times as many rows as were seen, about r · near · rank buckets are kept.
        growth = max(1.0, (buffer - 2 * near * rank) / (3 * near * rank))
        ends = [min(tiles, buffer * BUCKET // config.BLOCK_N)]
        while ends[-1] < tiles:
            ends.append(min(tiles, int(ends[-1] * (1 + growth)) + 1))
        # For clusters: room for their rows where sums are coarse, for near ties where they are not.
        least = 2 * rank if margin.bound > 1e-3 else rank + rank // 8 + 8
        kept = triton.next_power_of_2(max(int(near * rank), least))
        return cls(rank, buffer, min(kept, buffer), ends)

    @property
    def bytes(self) -> int:
        """Of a query's temporaries."""
        return 8 * (self.buffer + self.kept * BUCKET)


def row_vectors(x: Tensor, metric: str) -> tuple[Vectors, Tensor]:
    """The metric's part of each row of ``x [N, dim]``, and the largest norm, ``[1]``; infinite
    where squares leave fp32's normal range, so that no bound holds."""
    norms = row_norms(x)
    largest = upper(norms.nan_to_num(0.0, torch.inf).max(), x.shape[1])
    vectors = Vectors()
    if metric == "cosine":
        smallest = torch.where(norms > 0, norms, torch.inf).min()
        largest = torch.where(smallest > SAFE_NORM, largest.clamp(1, 1), torch.inf)
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


SAFE_NORM = 2.0**-40  # squares of smaller ones may leave fp32's normal range


def upper(norms: Tensor, dim: int) -> Tensor:
    """Above the norms, whatever was rounded or lost of ``dim`` squares."""
    return norms * (1 + 1e-6) + dim**0.5 * 1.1e-19


def prefix_topk(queries: Tensor, database: Tensor, k: int, dim: int, metric: str) -> Result:
    """The k best rows of each query."""
    q, x = operand(queries[:, :dim]), operand(database[:, :dim])
    result = empty(q, k)
    topk(q, x, k, metric, result)
    return result


class Rows(NamedTuple):
    """What is known of the rows ``[N, dim]`` that are searched.

    Attributes:
        vectors: What a scan makes of a row's sum; with a term of −inf where it is not allowed.
        norm: ``[1]`` fp32, as ``row_vectors`` returns it.
        allowed: ``[N]`` uint8, 0 where a row may not be found.
        ids: ``[N]`` int64, what rows are called in a result; None: their numbers.
        linear: Scores are what ``vectors`` makes of sums, not the metric's.
    """

    vectors: Vectors | None = None
    norm: Tensor | None = None
    allowed: Tensor | None = None
    ids: Tensor | None = None
    linear: bool = False

    def of(self, part: slice) -> "Rows":
        """For some of the queries."""
        v = self.vectors
        if v is None or v.factor is None:
            return self
        return self._replace(vectors=v._replace(factor=v.factor[part]))

    def pairs(self, q: Tensor, x: Tensor, metric: str, *, double: bool) -> Pairs:
        v = self.vectors
        linear = (v.scale, v.factor, v.outer) if v and self.linear else None
        return Pairs(q, x, metric, linear=linear, allowed=self.allowed, double=double)


def topk(
    q: Tensor, x: Tensor, k: int, metric: str, result: Result, rows: Rows | None = None, *,
    double: bool = False,
) -> None:  # fmt: skip
    """The k best of the rows ``x [N, dim]`` to ``result``; ``double`` sums scores in fp64."""
    rows = rows or Rows()
    if not len(x):
        result[0].fill_(-torch.inf)
        result[1].fill_(-1)
    if not len(q) * len(x):
        return
    if k > RESCANNED:
        return score_all(q, x, k, metric, result, rows, double=double)
    coarse, config = scan_queries(q, x, metric), scan_config(len(q), x)
    plan = Plan.of(k, x, config, coarse.margin)
    step = max(1, TEMPORARY_BYTES // plan.bytes)
    step = step if step < 128 else step // 128 * 128  # whole tiles of queries
    if rows.vectors is None and len(q) > min(step, config.BLOCK_B):
        vectors, norm = row_vectors(x, metric)  # rather than once a tile of queries
        rows = rows._replace(vectors=vectors, norm=norm)
    for part in chunks(len(q), step):
        norm = (
            torch.zeros(1, dtype=torch.float32, device=q.device) if rows.norm is None else rows.norm
        )
        mine, its = coarse.part(part), rows.of(part)
        scan = Scan(config, mine.q, x, metric, its.vectors, mine.norms, norm, low=mine.low)
        keys = shortlist(scan, its.pairs(q[part], x, metric, double=double), k, plan, mine)
        select(keys, (result[0][part], result[1][part]), rows.ids)


class Coarse(NamedTuple):
    """Queries as a scan reads them: in the rows' dtype, in two parts where one would lose bits."""

    q: Tensor  # [B, dim]
    low: Tensor | None  # [B, dim]
    norms: Tensor  # [B] fp32, at least the queries'; infinite where no bound holds
    errors: Tensor | None  # [B] fp32, norms of what both parts lack; None: nothing
    margin: Margin

    def part(self, part: slice) -> "Coarse":
        low, errors = (None if x is None else x[part] for x in (self.low, self.errors))
        return Coarse(self.q[part], low, self.norms[part], errors, self.margin)


def scan_queries(q: Tensor, x: Tensor, metric: str) -> Coarse:
    coarse, low, errors, dim = q.to(x.dtype), None, None, x.shape[1]
    norms = row_norms(q)
    if metric == "cosine":
        norms = torch.where(norms > SAFE_NORM, norms, torch.inf)
    if q.dtype != x.dtype:
        rest = q - coarse.to(q.dtype)
        low = rest.to(x.dtype)
        errors = upper(row_norms(rest - low.to(q.dtype)), dim)
        if x.is_floating_point():  # the parts' norms together
            norms = norms * (1 + torch.finfo(x.dtype).eps)
    return Coarse(coarse, low, upper(norms, dim), errors, Margin.of(x, metric))


def shortlist(
    scan: Scan, pairs: Pairs, k: int, plan: Plan, q: Coarse, among: Tensor | None = None
) -> Tensor:
    """Keys of rows among which are each query's k best, ``[B, kept · BUCKET]``; none of a query
    where ``among [B]`` int32 is 0."""
    config, begin = scan.config, 0
    hits, count, flag, theta = buffers(q.q, plan.buffer, plan.ends[0] * config.BLOCK_N // BUCKET)
    if among is not None:
        count *= among
    for end in plan.ends:
        scan(hits, count, theta, begin, end, window=int(begin == 0))
        narrow(hits, count, flag, theta, q.norms, q.errors, scan.norm, plan.rank, q.margin[1:])
        begin = end
    keys = pairs.bucket_keys(hits, count, flag, plan.kept, config.BLOCK_N, config.groups)
    pairs.rescan(keys, flag, k)
    return keys


def approx_topk(
    queries: Tensor, database: Tensor, k: int, dim: int, metric: str, recall: float
) -> tuple[Result, float]:
    """Of the k best rows those that no better one shares a bucket with; and the share of them that
    is expected to be found: buckets hold the rows of many tiles, one hit of each is kept, and its
    16 rows are scored again."""
    q, x = operand(queries[:, :dim]), operand(database[:, :dim])
    config, result = scan_config(len(q), x), empty(q, k)
    tiles, of_tile = triton.cdiv(len(x), config.BLOCK_N), config.BLOCK_N // BUCKET
    window = tiles
    while window > 1 and expected_recall(k, tiles, window, of_tile) < recall:
        window = (window + 1) // 2
    buckets = triton.cdiv(tiles, window) * of_tile
    if window < 2 or buckets > BUFFER[1] or not len(q):  # as many as there are rows
        topk(q, x, k, metric, result)
        return result, 1.0
    vectors, norm = row_vectors(x, metric)
    rows, coarse = Rows(vectors, norm), scan_queries(q, x, metric)
    plan = Plan.of(k, x, config, coarse.margin)
    plan = plan._replace(buffer=triton.next_power_of_2(buckets), ends=[])
    for part in chunks(len(q), max(1, TEMPORARY_BYTES // plan.bytes)):
        mine, pairs = coarse.part(part), rows.pairs(q[part], x, metric, double=False)
        scan = Scan(
            config, mine.q, x, metric, vectors, mine.norms, norm
        )  # of one dtype: no low part
        hits, count, flag, theta = buffers(mine.q, plan.buffer, buckets)
        scan(hits, count, theta, 0, tiles, window=window)
        narrow(hits, count, flag, theta, mine.norms, None, norm, k, mine.margin[1:])
        keys = pairs.bucket_keys(hits, count, flag, plan.kept, config.BLOCK_N, config.groups)
        pairs.rescan(keys, flag, k)
        select(keys, (result[0][part], result[1][part]))
    return result, expected_recall(k, tiles, window, of_tile)


def expected_recall(k: int, tiles: int, window: int, of_tile: int) -> float:
    """Of k rows that lie anywhere, the share that is the best of its bucket: ``of_tile`` of each
    window of tiles, the last of which may be shorter."""
    whole, rest = divmod(tiles, window)
    sizes = ((whole, window / tiles / of_tile), (1, rest / tiles / of_tile))
    return sum(n * of_tile * (1 - (1 - share) ** k) for n, share in sizes) / k


def buffers(q: Tensor, size: int, seeds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, device = len(q), q.device
    hits = torch.empty(B, size, dtype=torch.int64, device=device)
    count = torch.full((B,), seeds, dtype=torch.int32, device=device)
    flag = torch.zeros(B, dtype=torch.int32, device=device)
    return hits, count, flag, torch.empty(B, dtype=torch.float32, device=device)


def score_all(
    q: Tensor, x: Tensor, k: int, metric: str, result: Result, rows: Rows, *, double: bool = False
) -> None:
    """The k best of all rows, every pair scored canonically; a chunk of queries and of rows at a
    time, at least as many rows as are kept."""
    least = max(4096, k)
    for part in chunks(len(q), max(1, TEMPORARY_BYTES // (32 * (min(len(x), least) + k)))):
        pairs = rows.of(part).pairs(q[part], x, metric, double=double)
        size = part.stop - part.start
        best = torch.empty(size, 0, dtype=torch.int64, device=q.device)
        for found in chunks(len(x), max(least, TEMPORARY_BYTES // (32 * size) - k)):
            numbers = torch.arange(found.start, found.stop, device=q.device).expand(size, -1)
            best = torch.cat([best, pairs.keys(numbers)], 1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        select(best, (result[0][part], result[1][part]), rows.ids)


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
    (dim, keep), *later = stages
    found = prefix_topk(queries, database, keep, dim, metric)
    return rerank_stages(queries, database, found, later, metric, scored=dim)


def rerank_stages(
    q: Tensor, x: Tensor, found: Result, stages: Sequence[tuple[int, int]], metric: str, *,
    scored: int, ids: Tensor | None = None,
) -> Result:  # fmt: skip
    """Goes on from what a first stage found; its scores are of ``scored`` columns, 0 where they are
    of something else. A score that is a sum over whole blocks of columns is carried on."""
    for i, (dim, keep) in enumerate(stages):
        result = empty(q, keep)
        carried = metric != "cosine" and scored % WHOLE_BLOCK == 0
        rerank_rows(
            operand(q[:, :dim]), operand(x[:, :dim]), found[1], keep, metric, result,
            begin=scored if carried else 0, sums=found[0] if carried and scored else None,
            ids=ids if i == len(stages) - 1 else None,
        )  # fmt: skip
        found, scored = result, dim
    return found


def empty(q: Tensor, k: int) -> Result:
    """Room for a result, all of which will be written."""
    return (
        torch.empty(len(q), k, dtype=torch.float32, device=q.device),
        torch.empty(len(q), k, dtype=torch.int64, device=q.device),
    )
