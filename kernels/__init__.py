"""Triton kernels: tensors and sizes in, tensors out; no autograd, no validation, no environment."""

if __name__ != "mrl_fast.kernels":
    raise ImportError("these kernels are installed as mrl_fast.kernels; import them by that name")

from mrl_fast.kernels.fold_gradients import fold_backward
from mrl_fast.kernels.fold_statistics import fold_forward
from mrl_fast.kernels.logits import logits_backward, logits_forward
from mrl_fast.kernels.predict import predict_forward
from mrl_fast.kernels.retrieval import approx_topk, funnel_search, prefix_topk, rerank

__all__ = [
    "approx_topk",
    "fold_backward",
    "fold_forward",
    "funnel_search",
    "logits_backward",
    "logits_forward",
    "predict_forward",
    "prefix_topk",
    "rerank",
]
