"""Recall, with the one rule for ties: a row whose score equals that of the k-th best counts."""

from __future__ import annotations

import torch
from torch import Tensor

from mrl_fast.shared.types import SearchResult


def count_found(found: SearchResult, exact: SearchResult, *, tolerance: float = 0.0) -> Tensor:
    """How many of the k best rows each query's search found.

    A row counts if it is one of the k best, or if its score equals that of the k-th. Without exact
    scores, as in a file of ids, it counts if its score equals that of the worst of the k best that
    were found. Recall is the sum of the counts over ``(exact.ids >= 0).sum()``.

    Args:
        found: ids ``[B, m]``, each at most once a query and −1 where none; scores ``[B, m]``, whose
            equality means equality at full width.
        exact: The k best, ids ``[B, k]``, −1 where there are fewer; scores ``[B, k]`` or None.
        tolerance: Scores are equal that differ by at most this share of the k-th: 0 where both
            searches round alike.

    Returns:
        ``[B]`` int64, at most the number of ids that are not −1 in each row of ``exact``.
    """
    sorted_ids = exact.ids.sort(dim=1).values
    place = torch.searchsorted(sorted_ids, found.ids).clamp_max(sorted_ids.shape[1] - 1)
    present = found.ids >= 0
    best = (sorted_ids.gather(1, place) == found.ids) & present
    known = found if exact.scores is None else exact
    counted = best if exact.scores is None else exact.ids >= 0
    worst = known.scores.where(counted, torch.inf).amin(dim=1, keepdim=True)  # [B, 1]
    ties = torch.isclose(found.scores, worst, rtol=tolerance, atol=0.0)
    ties &= present & counted.any(dim=1, keepdim=True)
    return (best | ties).sum(dim=1).minimum((exact.ids >= 0).sum(dim=1))
