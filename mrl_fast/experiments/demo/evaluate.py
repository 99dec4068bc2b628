"""How well names find the sentences that document them, prefix by prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mrl_fast.evaluate import Qrels, judged
from mrl_fast.search.ops import prefix_topk

K = 10
Quality = dict[str, list[float]]  # measure → one a dim


def quality(
    queries: Tensor,
    documents: Tensor,
    relevant: Sequence[int],
    dims: Sequence[int],
    on_dim: Callable[[], object] = lambda: None,
) -> Quality:
    """MRR@10 and recall@10 of queries, each with one relevant document, by prefix.

    Args:
        queries: ``[B, D]``. documents: ``[N, D]``. relevant: ``B`` places of documents.
    """
    places = torch.arange(len(queries))
    qrels = Qrels(places, torch.tensor(relevant), torch.ones_like(places))
    found: Quality = {f"MRR@{K}": [], f"R@{K}": []}
    for dim in dims:
        ids = prefix_topk(queries, documents, K, dim=dim, metric="cosine").ids
        result = judged(ids, qrels)
        found[f"MRR@{K}"].append(result.mrr)
        found[f"R@{K}"].append(result.recall)
        on_dim()
    return found
