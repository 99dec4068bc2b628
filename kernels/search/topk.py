"""Exact top-k by prefix dot products, with no [B, N] score matrix and no wait for the device.

A scan keeps the buckets of rows that may be among the best within its rounding (scan.py). Their
rows are scored again, pair by pair, by the canonical routine (pair_scores.py), and the k best are
selected by (score, row) (keys.py). A query whose buffer overflows, as among thousands of equal
rows, is flagged, and the device itself scores all rows for it by that routine (rescan.py).
"""

from typing import NamedTuple

import torch
from mrl_fast.kernels.search.keys import Result, empty, select
from mrl_fast.kernels.search.metrics import row_terms
from mrl_fast.kernels.search.narrow import narrow
from mrl_fast.kernels.search.pair_scores import RESCANNED, Pairs
from mrl_fast.kernels.search.plan import KnownRows, Plan, buffers, fitting
from mrl_fast.kernels.search.queries import ScanQueries, scan_queries
from mrl_fast.kernels.search.rescan import score_buckets
from mrl_fast.kernels.search.scan import Scan
from mrl_fast.kernels.search.scan_shape import BUCKET, Config, scan_config
from mrl_fast.kernels.shared.tiling import chunks, columns
from torch import Tensor


def prefix_topk(queries: Tensor, database: Tensor, k: int, dim: int, metric: str) -> Result:
    """The k best rows of each query."""
    q, x = columns(queries, dim), columns(database, dim)
    result = empty(q, k)
    topk(q, x, k, metric, result)
    return result


def topk(
    q: Tensor, x: Tensor, k: int, metric: str, result: Result, rows: KnownRows | None = None, *,
    double: bool = False,
) -> None:  # fmt: skip
    """Writes the k best of the rows ``x [N, dim]``; ``double`` sums scores in fp64."""
    rows, (B, _), (N, _) = rows or KnownRows(), q.shape, x.shape  # len(q) would take a microsecond
    if not N:
        result[0].fill_(-torch.inf)
        result[1].fill_(-1)
    if not B * N:
        return
    if k > RESCANNED:
        return score_all(q, x, k, metric, result, rows, double=double)
    coarse, config = scan_queries(q, x, metric), scan_config(B, x)
    plan = Plan.from_sizes(k, x, config, coarse.margin, B)
    step = fitting(plan.bytes)
    step = step if step < 128 else step // 128 * 128  # whole tiles of queries
    if rows.terms is None and B > min(step, config.BLOCK_B):
        terms, norm = row_terms(x, metric)  # once, not once for every tile of queries
        rows = rows._replace(terms=terms, norm=norm)
    for part in chunks(B, step):
        its = rows.for_queries(part)
        search = Search(x, metric, k, plan, config, its)
        pairs = its.pairs(part_of(q, part), x, metric, double=double)
        keys = search.shortlist(coarse.part(part), pairs)
        select(keys, (part_of(result[0], part), part_of(result[1], part)), rows.ids)


def part_of(x: Tensor, part: slice) -> Tensor:
    return x if part.stop - part.start == x.shape[0] else x[part]


class Search(NamedTuple):
    """The scans of the rows ``x [N, dim]`` that find some queries' k best.

    Attributes:
        among: ``[B]`` int32, 0 where a query needs no search; None: all do.
    """

    x: Tensor
    metric: str
    k: int
    plan: Plan
    config: Config
    rows: KnownRows
    among: Tensor | None = None

    def shortlist(self, q: ScanQueries, pairs: Pairs) -> Tensor:
        """Keys of rows that include each query's k best, ``[B, kept · BUCKET]``; all are empty for
        a query that needs no search."""
        plan, rows, begin = self.plan, self.rows, 0
        to = buffers(q.q, plan.buffer)
        norm = to.norm if rows.terms is None else rows.norm
        scan = Scan(self.config, q, self.x, self.metric, rows.terms, norm, self.among)
        seeds = plan.ends[0] * scan.config.BLOCK_N // BUCKET
        for end in plan.ends:
            dense = begin == 0
            scan(to.hits, to.count, to.theta, begin, end, window=int(dense))
            narrow(
                to, q, norm, plan.rank, seeds=seeds if dense else 0,
                among=self.among if dense else None,
            )  # fmt: skip
            begin = end
        return score_buckets(pairs, to, plan.kept, scan.config, self.k)


def score_all(
    q: Tensor, x: Tensor, k: int, metric: str, result: Result, rows: KnownRows, *,
    double: bool = False,
) -> None:  # fmt: skip
    """Writes the k best of all rows, with every pair scored canonically, by chunks of queries and
    of rows. A chunk has at least k rows."""
    least = max(4096, k)
    for part in chunks(len(q), fitting(32 * (min(len(x), least) + k))):
        pairs = rows.for_queries(part).pairs(q[part], x, metric, double=double)
        size = part.stop - part.start
        best = torch.empty(size, 0, dtype=torch.int64, device=q.device)
        for found in chunks(len(x), max(least, fitting(32 * size) - k)):
            numbers = torch.arange(
                found.start, found.stop, dtype=torch.int64, device=q.device
            ).expand(size, -1)
            best = torch.cat([best, pairs.keys(numbers)], 1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        select(best, (result[0][part], result[1][part]), rows.ids)
