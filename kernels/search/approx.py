"""Approximate top-k in one pass: of the rows at one place of many tiles only the best are kept."""

from mrl_fast.kernels.search import plan as plans
from mrl_fast.kernels.search.keys import Result, empty, select
from mrl_fast.kernels.search.metrics import row_terms
from mrl_fast.kernels.search.narrow import narrow
from mrl_fast.kernels.search.plan import KnownRows, Plan, buffers, fitting
from mrl_fast.kernels.search.queries import scan_queries
from mrl_fast.kernels.search.rescan import score_buckets
from mrl_fast.kernels.search.scan import Scan
from mrl_fast.kernels.search.scan_shape import BUCKET, scan_config
from mrl_fast.kernels.search.topk import topk
from mrl_fast.kernels.shared.tiling import cdiv, chunks, columns, next_power_of_2
from torch import Tensor


def approx_topk(
    queries: Tensor, database: Tensor, k: int, dim: int, metric: str, recall: float
) -> tuple[Result, float]:
    """Most of the k best rows, and the share of them that is expected to be found.

    Buckets of 16 rows at the same place of ``window`` tiles compete: the one with the best score is
    kept, and its rows are scored again. A row is missed where a better row's bucket beats its own.
    """
    q, x = columns(queries, dim), columns(database, dim)
    config, result = scan_config(len(q), x), empty(q, k)
    tiles, of_tile = cdiv(len(x), config.BLOCK_N), config.BLOCK_N // BUCKET
    window = tiles
    while window > 1 and expected_recall(k, tiles, window, of_tile) < recall:
        window = (window + 1) // 2
    buckets = cdiv(tiles, window) * of_tile
    if window < 2 or buckets > plans.BUFFER[1] or not len(q):  # no two buckets compete, or too many
        topk(q, x, k, metric, result)
        return result, 1.0
    terms, norm = row_terms(x, metric)
    rows, coarse = KnownRows(terms, norm), scan_queries(q, x, metric)
    plan = Plan.from_sizes(k, x, config, coarse.margin, len(q))
    plan = plan._replace(buffer=next_power_of_2(buckets), ends=())
    for part in chunks(len(q), fitting(plan.bytes)):
        mine, pairs = coarse.part(part), rows.pairs(q[part], x, metric, double=False)
        scan, to = Scan(config, mine, x, metric, terms, norm), buffers(mine.q, plan.buffer)
        scan(to.hits, to.count, to.theta, 0, tiles, window=window)
        narrow(to, mine, norm, k, seeds=buckets)
        keys = score_buckets(pairs, to, plan.kept, config, k)
        select(keys, (result[0][part], result[1][part]))
    return result, expected_recall(k, tiles, window, of_tile)


def expected_recall(k: int, tiles: int, window: int, of_tile: int) -> float:
    """The expected share of k rows at random places that no better one of them competes with:
    each window of tiles has ``of_tile`` places, and the last window may be shorter."""
    whole, rest = divmod(tiles, window)
    sizes = ((whole, window / tiles / of_tile), (1, rest / tiles / of_tile))
    return sum(n * of_tile * (1 - (1 - share) ** k) for n, share in sizes) / k
