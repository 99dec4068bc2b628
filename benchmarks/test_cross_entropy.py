"""Forward + backward of the nested cross-entropy against the loop over dims, and its peak memory.

Rivals: the loop over F.linear + F.cross_entropy, as RAIVNLab/MRL does it, and the loop over
F.linear_cross_entropy where PyTorch has it, with both of its option sets.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mrl_fast import matryoshka_cross_entropy

# rows, classes, dims, tied: a vocabulary with MRL-E; an ImageNet head with MRL-E and with MRL
SHAPES = [
    (512, 16384, (16, 32, 64, 128, 256, 512, 1024), True),
    (1024, 1000, (8, 16, 32, 64, 128, 256, 512, 1024, 2048), True),
    (1024, 1000, (8, 16, 32, 64, 128, 256, 512, 1024, 2048), False),
]


@pytest.mark.parametrize(("rows", "classes", "dims", "tied"), SHAPES, ids=str)
def test_cross_entropy(compare, device, rows, classes, dims, tied):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(rows, dims[-1], device=device, dtype=dtype, requires_grad=True)
    widths = dims[-1:] if tied else dims
    weights = [
        torch.nn.Parameter(torch.randn(classes, d, device=device, dtype=dtype) / d**0.5)
        for d in widths
    ]
    target = torch.randint(classes, (rows,), device=device)

    def step(loss):
        x.grad = None
        for weight in weights:
            weight.grad = None
        loss.backward()
        assert x.grad is not None
        return x.grad

    def heads():
        return [weights[0][:, :d] for d in dims] if tied else weights

    def ours():
        head = weights[0] if tied else weights
        return step(matryoshka_cross_entropy(x, head, target, dims).loss)

    def loop():
        pairs = zip(dims, heads(), strict=True)
        return step(sum(F.cross_entropy(F.linear(x[:, :d], w), target) for d, w in pairs))

    rivals = {"loop": loop}
    if hasattr(F, "linear_cross_entropy"):
        sets = {"linear_cross_entropy": {}}
        if options := getattr(torch.nn, "LinearCrossEntropyOptions", None):
            sets["linear_cross_entropy_options"] = {"options": options()}

        def fused(extra):
            pairs = zip(dims, heads(), strict=True)
            return step(sum(F.linear_cross_entropy(x[:, :d], w, target, **extra) for d, w in pairs))

        rivals |= {name: lambda extra=extra: fused(extra) for name, extra in sets.items()}
    torch.testing.assert_close(
        ours().clone(), loop(), rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-5
    )
    width = dims[-1] if tied else sum(dims)
    compare(ours, rivals, repetitions=7, flops=8.0 * rows * classes * width)
