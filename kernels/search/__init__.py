"""Kernels of search: one gated scan, canonical pair scores, and selection by (score, row)."""

from mrl_fast.kernels.search import topk
from mrl_fast.kernels.shared.device import on_its_device

approx_topk = on_its_device(topk.approx_topk)
funnel_search = on_its_device(topk.funnel_search)
prefix_topk = on_its_device(topk.prefix_topk)
rerank = on_its_device(topk.rerank)

__all__ = ["approx_topk", "funnel_search", "prefix_topk", "rerank"]
