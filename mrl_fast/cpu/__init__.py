"""The CPU implementation (``impl="cpp"``): C++ SIMD kernels over raw addresses."""

from mrl_fast.cpu.nested import (
    fold_backward,
    fold_forward,
    logits_backward,
    logits_forward,
    predict_forward,
)
from mrl_fast.cpu.search import funnel_search, pack, prefix_topk, rerank, search_rows

__all__ = [
    "fold_backward",
    "fold_forward",
    "funnel_search",
    "logits_backward",
    "logits_forward",
    "pack",
    "predict_forward",
    "prefix_topk",
    "rerank",
    "search_rows",
]
