"""The phases and buffers of a search by scans, and what is known of the rows it searches."""

import functools
import math
from typing import NamedTuple

import torch
from mrl_fast.kernels.search.metrics import Margin, SumTerms
from mrl_fast.kernels.search.pair_scores import Pairs
from mrl_fast.kernels.search.scan_shape import BUCKET, Config
from mrl_fast.kernels.shared.tiling import cdiv, next_power_of_2
from torch import Tensor

TEMPORARY_BYTES = 256 << 20
BUFFER = 2048, 16384  # buckets a query, at least and at most
FEW = 64  # queries; up to so many, a larger buffer takes less time than another phase
LEAST_RANK = 16  # the k-th best score of a sample varies too much for a smaller k


def fitting(bytes_each: int) -> int:
    """How many things of this size fit the memory for temporaries; at least one."""
    return max(1, TEMPORARY_BYTES // bytes_each)


class Plan(NamedTuple):
    """Phases and buffers of a scan for k of N rows, for a tile's shape and a scan's margin."""

    rank: int  # the threshold is the rank-th best score so far
    buffer: int  # buckets that a query's buffer holds
    kept: int  # buckets whose rows are scored again
    ends: tuple[int, ...]  # ends of the phases, in tiles; the first phase seeds the threshold

    @classmethod
    def from_sizes(cls, k: int, x: Tensor, config: Config, margin: Margin, queries: int) -> "Plan":
        size = *x.shape, config.BLOCK_N
        return _plan(max(k, LEAST_RANK), size, margin, queries <= FEW, BUFFER)

    @property
    def bytes(self) -> int:
        """Bytes of a query's temporaries."""
        return 8 * (self.buffer + self.kept * BUCKET)


@functools.lru_cache(maxsize=4096)
def _plan(
    rank: int, size: tuple[int, int, int], margin: Margin, few: bool, limits: tuple[int, int]
) -> Plan:
    """``size`` is (rows, columns, rows of a tile), ``limits`` the least and the largest buffer."""
    rows, dim, tile = size
    tiles, (least, most) = cdiv(rows, tile), limits
    # Cosines of random vectors have a standard deviation of dim^-0.5, and the best of millions lie
    # 4.5 deviations out. Twice the error further in, there are `near` times as many (in clusters
    # more).
    error = margin.c + margin.d + margin.e  # for norms of 1
    near = math.exp(min(9 * error * dim**0.5, 3.0))
    buffer = min(max(next_power_of_2(64 * rank), least), most)
    ends = _ends(buffer, rank, near, tiles, tile)
    while few and len(ends) > 2 and buffer < most:
        buffer *= 2
        ends = _ends(buffer, rank, near, tiles, tile)
    # Where sums are coarse there is room for a cluster's rows, elsewhere for near ties.
    least = 2 * rank if margin.bound > 1e-3 else rank + rank // 8 + 8
    kept = next_power_of_2(max(int(near * rank), least))
    return Plan(rank, buffer, min(kept, buffer), ends)


def _ends(buffer: int, rank: int, near: float, tiles: int, tile: int) -> tuple[int, ...]:
    """The ends of the phases. Of the next r times as many rows as were seen before, about
    r · near · rank buckets are kept."""
    growth = max(1.0, (buffer - 2 * near * rank) / (3 * near * rank))
    ends = [min(tiles, buffer * BUCKET // tile)]
    while ends[-1] < tiles:
        ends.append(min(tiles, int(ends[-1] * (1 + growth)) + 1))
    return tuple(ends)


class KnownRows(NamedTuple):
    """What is known of the rows ``[N, dim]`` that are searched.

    Attributes:
        terms: Of a scan's scores. The term of a row that is not allowed is −inf.
        norm: ``[1]`` fp32, as ``row_terms`` returns it.
        allowed: ``[N]`` uint8, 0 where a row may not be found.
        ids: ``[N]`` int64, the rows' ids in a result; None: their numbers.
        linear: Final scores too are sums with ``terms``, not the metric's.
    """

    terms: SumTerms | None = None
    norm: Tensor | None = None
    allowed: Tensor | None = None
    ids: Tensor | None = None
    linear: bool = False

    def for_queries(self, part: slice) -> "KnownRows":
        """For some of the queries."""
        terms = self.terms
        if terms is None or terms.factor is None or part.stop - part.start == terms.factor.shape[0]:
            return self
        return self._replace(terms=terms._replace(factor=terms.factor[part]))

    def pairs(self, q: Tensor, x: Tensor, metric: str, *, double: bool) -> Pairs:
        terms = self.terms
        linear = (terms.scale, terms.factor, terms.outer) if terms and self.linear else None
        return Pairs(q, x, metric, linear=linear, allowed=self.allowed, double=double)


class Buffers(NamedTuple):
    """What a scan keeps for each query; ``count``, ``flag``, ``done`` and ``norm`` begin as 0.

    Attributes:
        hits: ``[B, C]`` int64: the bits of a bucket's best score above the bucket's number.
        count: ``[B, at least]`` int32: how many hits were appended; those beyond C were dropped.
        flag: ``[B, at least]`` int32, not 0 where a hit was dropped.
        done: ``[B, at least]`` int32: programs of a rescan that have finished.
        norm: ``[1, at least]`` int32: the bits of the largest norm of a row.
        theta: ``[B]`` fp32: what a score must not be below.
    """

    hits: Tensor
    count: Tensor
    flag: Tensor
    done: Tensor
    norm: Tensor
    theta: Tensor


def buffers(q: Tensor, size: int) -> Buffers:
    B, device = q.shape[0], q.device
    room = cdiv(B, 4) * 4  # so that each begins at a multiple of 16 bytes
    zeros = torch.zeros(4, room, dtype=torch.int32, device=device)
    count, flag, done, norm = zeros.unbind()
    hits = torch.empty(B, size, dtype=torch.int64, device=device)
    theta = torch.empty(B, dtype=torch.float32, device=device)
    return Buffers(hits, count, flag, done, norm, theta)
