"""Losses and heads of ``kernels``: values and gradients against the reference in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import DEVICE, generator
from benchmarks.gpu.sizes import Sizes, randn, worst
from mrl_fast import (
    matryoshka_cross_entropy,
    matryoshka_distill,
    matryoshka_info_nce,
    matryoshka_logits,
    matryoshka_predict,
    matryoshka_sigmoid_loss,
)

CLIP = ("query_to_doc", "doc_to_query")
Loss = tuple[Callable[..., Any], list[Tensor]]


def gradients(loss: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    result = loss(*leaves)
    result.loss.sum().backward()
    return [result.per_dim, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def errors(size: Sizes, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], float]]]:
    for name, (loss, tensors) in {**heads(size, dtype), **pairs(size, dtype)}.items():
        yield name, partial(loss_error, loss, tensors)
    yield "logits and predictions", partial(prediction_error, size, dtype)


def loss_error(loss: Callable[..., Any], tensors: list[Tensor]) -> float:
    ours = gradients(partial(loss, impl="triton"), *tensors)
    exact = gradients(partial(loss, impl="reference"), *(t.double() for t in tensors))
    return worst(ours, exact)


def heads(size: Sizes, dtype: torch.dtype) -> dict[str, Loss]:
    B, V, dims = size.B, size.V, size.dims
    x, w = (randn(n, dims[-1], seed=i, dtype=dtype) for i, n in enumerate((B, V)))
    separate = [randn(V, d, seed=3, dtype=dtype) for d in dims]
    biases = [randn(V, seed=4, dtype=dtype) for _ in dims]
    target = torch.randint(V, (B,), generator=generator(5), device=DEVICE)
    target = torch.where(torch.arange(B, device=DEVICE) % 7 == 0, -100, target)
    weights = torch.rand(V, generator=generator(6), device=DEVICE)
    smooth: dict[str, Any] = {"class_weight": weights, "label_smoothing": 0.1}

    def tied(x, w, b, impl):
        return matryoshka_cross_entropy(x, w, target, dims, bias=b, impl=impl, **smooth)

    def one_a_prefix(x, *w, impl):
        bias: Any = [b.to(x.dtype) for b in biases]
        return matryoshka_cross_entropy(x, w, target, dims, bias=bias, reduction="none", impl=impl)

    return {"tied": (tied, [x, w, biases[0]]), "separate": (one_a_prefix, [x, *separate])}


def pairs(size: Sizes, dtype: torch.dtype) -> dict[str, Loss]:
    B, dims = size.B, size.dims
    x, y = (randn(B, dims[-1], seed=i, dtype=dtype) for i in (0, 2))
    mask = torch.rand(B, B, generator=generator(7), device=DEVICE) < 0.2
    mask.fill_diagonal_(False)
    both: dict[str, Any] = {"directions": CLIP, "partition_mode": "per_direction"}
    hard: dict[str, Any] = {"hardness_mode": "hard_negatives", "hardness_strength": 2.0}

    def info_nce(x, y, impl, **options):
        return matryoshka_info_nce(x, y, dims, impl=impl, **options)

    def sigmoid(x, y, impl):
        return matryoshka_sigmoid_loss(x, y, dims, scale=10.0, bias=-10.0, impl=impl)

    def distill(x, impl):
        return matryoshka_distill(x, y.to(x.dtype), dims, impl=impl)

    return {
        "info_nce": (info_nce, [x, y]),
        "info_nce, masked": (partial(info_nce, mask=mask, **hard), [x, y]),
        "clip": (partial(info_nce, **both), [x, y]),
        "sigmoid": (sigmoid, [x, y]),
        "distill": (distill, [x]),
    }


def prediction_error(size: Sizes, dtype: torch.dtype) -> float:
    x, w = (randn(n, size.dims[-1], seed=i, dtype=dtype) for i, n in enumerate((size.B, size.V)))
    bias = randn(size.V, seed=4, dtype=dtype)
    logits = matryoshka_logits(x, w, size.dims, bias=bias, impl="triton")
    best = matryoshka_predict(x, w, size.dims, bias=bias, impl="triton").confidence
    wide_x, wide_w, wide_b = (t.double() for t in (x, w, bias))
    exact = matryoshka_logits(wide_x, wide_w, size.dims, bias=wide_b, impl="reference")
    return worst([logits, best], [exact, exact.softmax(2).amax(2)])
