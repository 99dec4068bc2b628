"""What shards found, merged to what one index that holds all their rows finds: by rank, and where
ranks are equal in the order in which rows were added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mrl_fast.search.index.answers import Found
from mrl_fast.search.sharded.protocol import ShardFound, ShardFoundRange
from mrl_fast.shared import memory


def nearest(founds: Sequence[ShardFound], k: int) -> Found:
    """The k best of each query; exact where every shard's are.

    Args:
        founds: Of at least one shard, in any order.
    """
    exact = [found.touched for found in founds if found.touched is not None]
    touched = torch.stack(exact).sum(dim=0) if len(exact) == len(founds) else None
    scores, ids, places = (
        torch.cat([getattr(found, name) for found in founds], dim=1)
        for name in ("scores", "ids", "places")
    )
    # Where some answered by stages, all are ranked as these are.
    ranks = scores if touched is None else torch.cat([found.ranks for found in founds], dim=1)
    if len(founds) > 1:
        best = _best(ranks, places)[:, :k]
        scores, ids = scores.gather(1, best), ids.gather(1, best)
    missing = k - scores.shape[1]
    if missing > 0:
        shape = len(scores), missing
        scores = torch.cat([scores, memory.full(shape, -torch.inf)], dim=1)
        ids = torch.cat([ids, memory.full(shape, -1, torch.int64)], dim=1)
    return Found(scores, ids, touched)


def _best(ranks: Tensor, places: Tensor) -> Tensor:
    """Columns ``[B, n]`` in the order of ranks, the largest first, then of places."""
    best = ranks.argsort(dim=1, descending=True, stable=True)
    ranked = ranks.gather(1, best)
    tied = (ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] > -torch.inf)
    if bool(tied.any()):  # a stable sort has them in the order of shards
        rows = tied.any(dim=1).nonzero()[:, 0]
        by_place = places[rows].argsort(dim=1)
        again = ranks[rows].gather(1, by_place).argsort(dim=1, descending=True, stable=True)
        best[rows] = by_place.gather(1, again)
    return best


def within(founds: Sequence[ShardFoundRange]) -> tuple[Tensor, Tensor, Tensor]:
    """Limits, scores and ids of all rows that reach a threshold."""
    if len(founds) == 1:
        return founds[0][:3]
    lims = torch.stack([found.lims for found in founds]).sum(dim=0)
    queries = torch.cat(
        [memory.arange(0, len(f.lims) - 1).repeat_interleave(f.lims.diff()) for f in founds]
    )
    scores, ids, ranks, places = (
        torch.cat([getattr(found, name) for found in founds])
        for name in ("scores", "ids", "ranks", "places")
    )
    order = torch.from_numpy(np.lexsort((places.numpy(), -ranks.numpy(), queries.numpy())))
    return lims, scores[order], ids[order]
