"""Exact top-k by prefix dot products, rerank and the funnel, with no [B, N] score matrix and
without waiting for the device.

A scan keeps the buckets of rows that its own rounding cannot exclude (scan.py); their rows are
scored again, pair by pair, by the canonical routine (pairs.py), and what comes back is selected
from those by (score, row) (keys.py). A query whose buffer overflows, as among thousands of equal
rows, is flagged, and the device itself scans all rows for it by that routine.
"""

import torch
from mrl_fast.kernels.search.keys import Result, empty, narrow, select
from mrl_fast.kernels.search.metrics import row_terms
from mrl_fast.kernels.search.pair_scores import RESCANNED, Pairs
from mrl_fast.kernels.search.plan import (
    KnownRows,
    Plan,
    ScanQueries,
    buffers,
    fitting,
    scan_queries,
)
from mrl_fast.kernels.search.rescan import rescan
from mrl_fast.kernels.search.scan import Scan
from mrl_fast.kernels.search.scan_shape import BUCKET, scan_config
from mrl_fast.kernels.shared.tiling import chunks, operand
from torch import Tensor


def prefix_topk(queries: Tensor, database: Tensor, k: int, dim: int, metric: str) -> Result:
    """The k best rows of each query."""
    q, x = operand(queries[:, :dim]), operand(database[:, :dim])
    result = empty(q, k)
    topk(q, x, k, metric, result)
    return result


def topk(
    q: Tensor, x: Tensor, k: int, metric: str, result: Result, rows: KnownRows | None = None, *,
    double: bool = False,
) -> None:  # fmt: skip
    """The k best of the rows ``x [N, dim]`` to ``result``; ``double`` sums scores in fp64."""
    rows = rows or KnownRows()
    if not len(x):
        result[0].fill_(-torch.inf)
        result[1].fill_(-1)
    if not len(q) * len(x):
        return
    if k > RESCANNED:
        return score_all(q, x, k, metric, result, rows, double=double)
    coarse, config = scan_queries(q, x, metric), scan_config(len(q), x)
    plan = Plan.of(k, x, config, coarse.margin)
    step = fitting(plan.bytes)
    step = step if step < 128 else step // 128 * 128  # whole tiles of queries
    if rows.terms is None and len(q) > min(step, config.BLOCK_B):
        terms, norm = row_terms(x, metric)  # rather than once a tile of queries
        rows = rows._replace(terms=terms, norm=norm)
    for part in chunks(len(q), step):
        norm = (
            torch.zeros(1, dtype=torch.float32, device=q.device) if rows.norm is None else rows.norm
        )
        mine, its = coarse.part(part), rows.for_queries(part)
        scan = Scan(config, mine.q, x, metric, its.terms, mine.norms, norm, low=mine.low)
        keys = shortlist(scan, its.pairs(q[part], x, metric, double=double), k, plan, mine)
        select(keys, (result[0][part], result[1][part]), rows.ids)


def shortlist(
    scan: Scan, pairs: Pairs, k: int, plan: Plan, q: ScanQueries, among: Tensor | None = None
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
    rescan(pairs, keys, flag, k)
    return keys


def score_all(
    q: Tensor, x: Tensor, k: int, metric: str, result: Result, rows: KnownRows, *,
    double: bool = False,
) -> None:  # fmt: skip
    """The k best of all rows, every pair scored canonically; a chunk of queries and of rows at a
    time, at least as many rows as are kept."""
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
