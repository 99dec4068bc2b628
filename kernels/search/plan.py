"""How a search by scans goes: its phases and buffers, what is known of the rows, and the queries as
a scan reads them."""

import math
from typing import NamedTuple

import torch
import triton
from mrl_fast.kernels.search.metrics import QUERY_NORMS, Margin, SumTerms, row_norms, upper
from mrl_fast.kernels.search.pair_scores import Pairs
from mrl_fast.kernels.search.scan_shape import BUCKET, Config
from torch import Tensor

TEMPORARY_BYTES = 256 << 20
BUFFER = 2048, 16384  # buckets a query, at least and at most
LEAST_RANK = 16  # a threshold by the best of fewer varies too much


def fitting(bytes_each: int) -> int:
    """How many of something fit what temporaries may take, at least one."""
    return max(1, TEMPORARY_BYTES // bytes_each)


class Plan(NamedTuple):
    """Phases and buffers of a scan for k of N rows, for a tile's shape and a scan's margin."""

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
        # Where sums are coarse there is room for a cluster's rows, elsewhere for near ties.
        least = 2 * rank if margin.bound > 1e-3 else rank + rank // 8 + 8
        kept = triton.next_power_of_2(max(int(near * rank), least))
        return cls(rank, buffer, min(kept, buffer), ends)

    @property
    def bytes(self) -> int:
        """Of a query's temporaries."""
        return 8 * (self.buffer + self.kept * BUCKET)


class KnownRows(NamedTuple):
    """What is known of the rows ``[N, dim]`` that are searched.

    Attributes:
        terms: What a scan makes of a row's sum; with a term of −inf where it is not allowed.
        norm: ``[1]`` fp32, as ``row_terms`` returns it.
        allowed: ``[N]`` uint8, 0 where a row may not be found.
        ids: ``[N]`` int64, what rows are called in a result; None: their numbers.
        linear: Scores are what ``terms`` makes of sums, not the metric's.
    """

    terms: SumTerms | None = None
    norm: Tensor | None = None
    allowed: Tensor | None = None
    ids: Tensor | None = None
    linear: bool = False

    def for_queries(self, part: slice) -> "KnownRows":
        """For some of the queries."""
        terms = self.terms
        if terms is None or terms.factor is None:
            return self
        return self._replace(terms=terms._replace(factor=terms.factor[part]))

    def pairs(self, q: Tensor, x: Tensor, metric: str, *, double: bool) -> Pairs:
        terms = self.terms
        linear = (terms.scale, terms.factor, terms.outer) if terms and self.linear else None
        return Pairs(q, x, metric, linear=linear, allowed=self.allowed, double=double)


class ScanQueries(NamedTuple):
    """Queries as a scan reads them: in the rows' dtype, in two parts where one would lose bits."""

    q: Tensor  # [B, dim]
    low: Tensor | None  # [B, dim]
    norms: Tensor  # [B] fp32, at least the queries'; infinite where no bound holds
    errors: Tensor | None  # [B] fp32, norms of what both parts lack; None: nothing
    margin: Margin

    def part(self, part: slice) -> "ScanQueries":
        low, errors = (None if x is None else x[part] for x in (self.low, self.errors))
        return ScanQueries(self.q[part], low, self.norms[part], errors, self.margin)


def scan_queries(q: Tensor, x: Tensor, metric: str) -> ScanQueries:
    coarse, low, errors, dim = q.to(x.dtype), None, None, x.shape[1]
    norms = QUERY_NORMS[metric](row_norms(q))
    if q.dtype != x.dtype:
        rest = q - coarse.to(q.dtype)
        low = rest.to(x.dtype)
        errors = upper(row_norms(rest - low.to(q.dtype)), dim)
        if x.is_floating_point():  # the parts' norms together
            norms = norms * (1 + torch.finfo(x.dtype).eps)
    return ScanQueries(coarse, low, upper(norms, dim), errors, Margin.of(x, metric))


def buffers(q: Tensor, size: int, seeds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, device = len(q), q.device
    hits = torch.empty(B, size, dtype=torch.int64, device=device)
    count = torch.full((B,), seeds, dtype=torch.int32, device=device)
    flag = torch.zeros(B, dtype=torch.int32, device=device)
    return hits, count, flag, torch.empty(B, dtype=torch.float32, device=device)
