"""Triton kernels: tensors and sizes in, tensors out; no autograd, no validation, no environment."""

if __name__ != "mrl_fast.kernels":
    raise ImportError("these kernels are installed as mrl_fast.kernels; import them by that name")

from mrl_fast.kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward
from mrl_fast.kernels.logits import logits_backward, logits_forward
from mrl_fast.kernels.retrieval import funnel_search, prefix_topk, rerank

__all__ = [
    "cross_entropy_backward",
    "cross_entropy_forward",
    "funnel_search",
    "logits_backward",
    "logits_forward",
    "prefix_topk",
    "rerank",
]
