"""Triton kernels: tensors and sizes in, tensors out; no autograd, no validation, no environment."""

if __name__ != "mrl_fast.kernels":
    raise ImportError("these kernels are installed as mrl_fast.kernels; import them by that name")

import functools

import torch
from mrl_fast.kernels import fold_gradients, fold_statistics, logits, predict, retrieval


def on_its_device(function):
    """Triton launches on the current device, which need not be where the first tensor is."""

    @functools.wraps(function)
    def call(first, *args, **kwargs):
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return call


fold_backward = on_its_device(fold_gradients.fold_backward)
fold_forward = on_its_device(fold_statistics.fold_forward)
logits_backward = on_its_device(logits.logits_backward)
logits_forward = on_its_device(logits.logits_forward)
predict_forward = on_its_device(predict.predict_forward)
approx_topk = on_its_device(retrieval.approx_topk)
funnel_search = on_its_device(retrieval.funnel_search)
prefix_topk = on_its_device(retrieval.prefix_topk)
rerank = on_its_device(retrieval.rerank)

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
