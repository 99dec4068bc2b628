"""Kernels of the losses: nested scores folded, stored or predicted from, and their gradients."""

from mrl_fast.kernels.shared.device import on_its_device
from mrl_fast.kernels.training import gradients, logits, predict, statistics

fold_backward = on_its_device(gradients.fold_backward)
fold_forward = on_its_device(statistics.fold_forward)
logits_backward = on_its_device(logits.logits_backward)
logits_forward = on_its_device(logits.logits_forward)
predict_forward = on_its_device(predict.predict_forward)

__all__ = [
    "fold_backward",
    "fold_forward",
    "logits_backward",
    "logits_forward",
    "predict_forward",
]
