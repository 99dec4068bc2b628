"""Matryoshka (nested) embeddings, trained and searched at the speed of the hardware."""

from mrl_fast._types import NestedLoss, SearchResult
from mrl_fast.index import MatryoshkaIndex
from mrl_fast.losses import matryoshka_cross_entropy, matryoshka_logits
from mrl_fast.modules import MatryoshkaCrossEntropyLoss, MRLLinear
from mrl_fast.retrieval import funnel_search, prefix_topk, rerank

__version__ = "0.1.0"

__all__ = [
    "MRLLinear",
    "MatryoshkaCrossEntropyLoss",
    "MatryoshkaIndex",
    "NestedLoss",
    "SearchResult",
    "funnel_search",
    "matryoshka_cross_entropy",
    "matryoshka_logits",
    "prefix_topk",
    "rerank",
]
