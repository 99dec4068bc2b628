"""Kernels of search: one gated scan, canonical pair scores, and selection by (score, row)."""

from mrl_fast.kernels.search import approx, funnel, topk
from mrl_fast.kernels.search.metrics import TERMS
from mrl_fast.kernels.shared.device import on_its_device

METRICS = tuple(TERMS)

approx_topk = on_its_device(approx.approx_topk)
funnel_search = on_its_device(funnel.funnel_search)
prefix_topk = on_its_device(topk.prefix_topk)
rerank = on_its_device(funnel.rerank)

__all__ = ["METRICS", "approx_topk", "funnel_search", "prefix_topk", "rerank"]
