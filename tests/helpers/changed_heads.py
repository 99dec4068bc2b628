"""Linear layers changed as PEFT, pruning, hooks and parametrizations change them."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from mrl_fast import MRLLinear

DIMS, CLASSES, ROWS = (3, 8, 20), 11, 17


class LoraLinear(nn.Module):
    """Like PEFT's: stands in the place of a linear layer and shows that one's weight as its own."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, base.in_features))
        self.B = nn.Parameter(torch.randn(base.out_features, 2))

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + F.linear(F.linear(x, self.A), self.B)


def lora(head):
    return LoraLinear(head)


def parametrized_weight_norm(head):
    return parametrizations.weight_norm(head)


def spectral_norm(head):
    return parametrizations.spectral_norm(head).eval()  # in training each read moves its vectors


def hook_weight_norm(head):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but in use
        head = nn.utils.weight_norm(head)
    with torch.no_grad():
        head.weight_g.mul_(3)  # the weight computed before is now stale
    return head


def pruned(head):
    return prune.random_unstructured(head, "weight", 0.5)


def scaled_input(head):
    head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return head


def scaled_output(head):
    head.register_forward_hook(lambda module, args, out: 2 * out)
    return head


def doubled_gradient(head):
    head.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],))
    return head


def replaced_forward(head):  # as accelerate does
    head.forward = lambda x: 2 * F.linear(x, head.weight, head.bias)
    return head


def quantized(head):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but in use
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(head), {nn.Linear})[0]


FUSED = [parametrized_weight_norm, spectral_norm]
CALLED = [lora, hook_weight_norm, pruned, scaled_input, scaled_output, doubled_gradient,
          replaced_forward, quantized]  # fmt: skip


def batch():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, DIMS[-1] + 4, generator=g).requires_grad_()
    return x, torch.randint(CLASSES, (ROWS,), generator=g)


def changed(tied, change):
    torch.manual_seed(0)
    head = MRLLinear(DIMS, CLASSES, tied=tied)
    for i, layer in enumerate(head.heads):
        head.heads[i] = change(layer)
    return head


def by_calls(head, x):
    """Each prefix's logits by calls of the layers; a tied layer gets zeros beyond the prefix."""
    if not head.tied:
        return [layer(x[:, :d]) for layer, d in zip(head.heads, DIMS, strict=True)]
    keep = torch.arange(DIMS[-1])
    return [head.heads[0](torch.where(keep < d, x[:, : DIMS[-1]], 0.0)) for d in DIMS]
