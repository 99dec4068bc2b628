"""Matryoshka (nested) embeddings, trained and searched at the speed of the hardware."""

from mrl_fast.integrations.sentence_transformers import semantic_search
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.ops import approx_topk, funnel_search, prefix_topk, rerank
from mrl_fast.search.sharded import ShardedIndex
from mrl_fast.shared.threads import get_num_threads, set_num_threads
from mrl_fast.shared.types import (
    ApproxResult,
    ExactResult,
    NestedLoss,
    Prediction,
    RangeResult,
    SearchResult,
    SpreadOut,
    StagedResult,
)
from mrl_fast.training.cascade import AdaptiveClassifier, AdaptiveCost
from mrl_fast.training.heads import MRLLinear, matryoshka_logits, matryoshka_predict
from mrl_fast.training.losses.cross_entropy import matryoshka_cross_entropy
from mrl_fast.training.losses.distill import matryoshka_distill
from mrl_fast.training.losses.info_nce import matryoshka_info_nce
from mrl_fast.training.losses.sigmoid import matryoshka_sigmoid_loss
from mrl_fast.training.losses.spread_out import matryoshka_spread_out
from mrl_fast.training.modules import (
    MatryoshkaCrossEntropyLoss,
    MatryoshkaInfoNCELoss,
    MatryoshkaLoopLoss,
)
from mrl_fast.training.thresholds import AdaptivePrediction, AdaptiveReport

__version__ = "0.1.0"

__all__ = [
    "AdaptiveClassifier",
    "AdaptiveCost",
    "AdaptivePrediction",
    "AdaptiveReport",
    "ApproxResult",
    "ExactResult",
    "MRLLinear",
    "MatryoshkaCrossEntropyLoss",
    "MatryoshkaIndex",
    "MatryoshkaInfoNCELoss",
    "MatryoshkaLoopLoss",
    "NestedLoss",
    "Prediction",
    "RangeResult",
    "SearchResult",
    "ShardedIndex",
    "SpreadOut",
    "StagedResult",
    "approx_topk",
    "funnel_search",
    "get_num_threads",
    "matryoshka_cross_entropy",
    "matryoshka_distill",
    "matryoshka_info_nce",
    "matryoshka_logits",
    "matryoshka_predict",
    "matryoshka_sigmoid_loss",
    "matryoshka_spread_out",
    "prefix_topk",
    "rerank",
    "semantic_search",
    "set_num_threads",
]
