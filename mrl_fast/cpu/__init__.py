"""The CPU implementation (``impl="cpp"``): C++ SIMD kernels over raw addresses."""

from mrl_fast.cpu.nested import (
    fold_backward,
    fold_forward,
    logits_backward,
    logits_forward,
    predict_forward,
)
from mrl_fast.cpu.search import (
    exact_search,
    funnel_search,
    prefix_topk,
    range_search,
    rerank,
    rotated,
    search_rows,
)
from mrl_fast.cpu.snapshot import Snapshot, flags_of, restricted
from mrl_fast.cpu.storage import Block, Layout, Store

__all__ = [
    "Block",
    "Layout",
    "Snapshot",
    "Store",
    "exact_search",
    "flags_of",
    "fold_backward",
    "fold_forward",
    "funnel_search",
    "logits_backward",
    "logits_forward",
    "predict_forward",
    "prefix_topk",
    "range_search",
    "rerank",
    "restricted",
    "rotated",
    "search_rows",
]
