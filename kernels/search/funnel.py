"""Scores of chosen rows, and the funnel that carries a prefix's sums to a longer one."""

from collections.abc import Sequence

from mrl_fast.kernels.search.keys import Result, empty, select
from mrl_fast.kernels.search.pair_scores import WHOLE_BLOCK, Pairs
from mrl_fast.kernels.search.plan import fitting
from mrl_fast.kernels.search.topk import part_of, prefix_topk
from mrl_fast.kernels.shared.tiling import chunks, columns
from torch import Tensor


def rerank(
    queries: Tensor, database: Tensor, candidates: Tensor, k: int, dim: int, metric: str
) -> Result:
    q, x = columns(queries, dim), columns(database, dim)
    result = empty(q, k)
    rerank_rows(q, x, candidates.contiguous(), k, metric, result)
    return result


def rerank_rows(
    q: Tensor, x: Tensor, candidates: Tensor, k: int, metric: str, result: Result, *,
    begin: int = 0, sums: Tensor | None = None, ids: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the k best of the candidates ``[B, C]`` to ``result``; ``sums [B, C]`` are their sums
    over the columns before ``begin``."""
    for part in chunks(len(q), fitting(24 * max(1, candidates.shape[1]))):
        carried = None if sums is None else part_of(sums, part)
        pairs = Pairs(part_of(q, part), x, metric)
        keys = pairs.keys(part_of(candidates, part), begin=begin, sums=carried)
        select(keys, (part_of(result[0], part), part_of(result[1], part)), ids)


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
    """Continues from what a first stage found. Its scores are sums of ``scored`` columns, or of
    something else where that is 0. A sum over whole blocks of columns is carried on."""
    for i, (dim, keep) in enumerate(stages):
        result = empty(q, keep)
        carried = metric != "cosine" and scored % WHOLE_BLOCK == 0
        rerank_rows(
            columns(q, dim), columns(x, dim), found[1], keep, metric, result,
            begin=scored if carried else 0, sums=found[0] if carried and scored else None,
            ids=ids if i == len(stages) - 1 else None,
        )  # fmt: skip
        found, scored = result, dim
    return found
