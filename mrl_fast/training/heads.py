"""Nested classification heads: logits and predictions of every prefix from one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mrl_fast.shared.checks import check_dims, check_matrix, check_same_device, check_vector
from mrl_fast.shared.dispatch import choose
from mrl_fast.shared.types import Prediction
from mrl_fast.training import ops, reference


class Head(NamedTuple):
    """A weight and the prefixes that share it: all of them (MRL-E), or one (MRL)."""

    weight: Tensor  # [V, >= dims[-1]]
    bias: Tensor | None  # [V]
    dims: tuple[int, ...]


Weights = Tensor | Sequence[Tensor]
Biases = Tensor | Sequence[Tensor | None] | None


def matryoshka_logits(
    x: Tensor,
    weight: Weights,
    dims: Sequence[int],
    *,
    bias: Biases = None,
    impl: str | None = None,
) -> Tensor:
    """Class scores of every nested prefix of each row.

    Equals ``torch.stack([F.linear(x[:, :d], weight[:, :d], bias) for d in dims])`` for a tied head,
    at the cost of the widest prefix alone. Accumulates in fp32. Differentiable once.

    Args:
        x: Embeddings, ``[B, D]``, any row stride.
        weight: Tied head (MRL-E): ``[V, W]`` with ``W >= dims[-1]``. Separate heads (MRL): G
            tensors ``[V, dims[g]]``.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        bias: ``[V]``, the same for every prefix; for separate heads a sequence of G of them.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        ``[G, B, V]`` in x's dtype.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype or device.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 3.
    """
    x, heads = check_heads(x, weight, dims, bias)
    impl = choose(impl, x, heads[0].weight)
    if impl == "reference":
        return reference.matryoshka_logits(x, *prefixes(heads))
    parts = [ops.nested_logits(x, h.weight, h.bias, list(h.dims), impl) for h in heads]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def matryoshka_predict(
    x: Tensor,
    weight: Weights,
    dims: Sequence[int],
    *,
    bias: Biases = None,
    impl: str | None = None,
) -> Prediction:
    """The class that every nested prefix predicts, and how surely.

    Equals ``matryoshka_logits(...).softmax(-1).max(-1)`` with no logits in memory; equal logits
    give the first class. Not differentiable.

    Args:
        x: Embeddings, ``[B, D]``, any row stride.
        weight: Tied head (MRL-E): ``[V, W]`` with ``W >= dims[-1]`` and ``V >= 1``. Separate heads
            (MRL): G tensors ``[V, dims[g]]``.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        bias: ``[V]``, the same for every prefix; for separate heads a sequence of G of them.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        Prediction: ``labels`` ``[G, B]`` int64 and ``confidence`` ``[G, B]``, the largest softmax
            (fp32; fp64 by the reference for fp64).

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype or device.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 4.2
    (the confidence that adaptive classification compares with a threshold).
    """
    x, heads = check_heads(x, weight, dims, bias)
    if not len(heads[0].weight):
        raise ValueError("weight: expected at least one class, got shape [0, ...]")
    impl = choose(impl, x, heads[0].weight)
    if impl == "reference":
        return reference.matryoshka_predict(x, *prefixes(heads))
    parts = [ops.predict(x, h.weight, h.bias, list(h.dims), impl) for h in heads]
    labels, confidence = zip(*parts, strict=True)
    return Prediction(torch.cat(labels), torch.cat(confidence))


def prefixes(heads: Sequence[Head]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each prefix's own weight ``[V, d_g]`` and bias."""
    pairs = [(head.weight[:, :d], head.bias) for head in heads for d in head.dims]
    return [weight for weight, _ in pairs], [bias for _, bias in pairs]


def check_heads(
    x: Tensor, weight: Weights, dims: Sequence[int], bias: Biases
) -> tuple[Tensor, list[Head]]:
    """x and the heads, checked and in the dtype of the product."""
    check_matrix(x, "x")
    dims = check_dims(dims, x.shape[1])
    named: list[tuple[str, str, Head]]
    if isinstance(weight, Tensor):
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"bias: expected a tensor, as weight is one, got {type(bias).__name__}")
        named = [("weight", "bias", Head(weight, bias, dims))]
    else:
        for name, value in (
            ("weight", weight),
            ("bias", [None] * len(dims) if bias is None else bias),
        ):
            if isinstance(value, Tensor) or not hasattr(value, "__getitem__"):
                kind = type(value).__name__
                raise TypeError(f"{name}: expected a sequence of {len(dims)} tensors, got {kind}")
            if len(value) != len(dims):
                raise ValueError(
                    f"{name}: expected {len(dims)} tensors, one a dim, got {len(value)}"
                )
        named = [
            (
                f"weight[{g}]",
                f"bias[{g}]",
                Head(weight[g], None if bias is None else bias[g], (d,)),
            )
            for g, d in enumerate(dims)
        ]
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    heads: list[Head] = []
    for weight_name, bias_name, (w, b, head_dims) in named:
        check_same_device(check_matrix(w, weight_name), weight_name, x)
        classes = len(heads[0].weight) if heads else len(w)
        exact = not isinstance(weight, Tensor)
        if len(w) != classes or (
            w.shape[1] != head_dims[-1] if exact else w.shape[1] < head_dims[-1]
        ):
            shape = f"[{classes if heads else 'V'}, {'' if exact else '>= '}{head_dims[-1]}]"
            raise ValueError(f"{weight_name}: expected shape {shape}, got {list(w.shape)}")
        if b is not None:
            check_vector(b, bias_name, classes, x)
        for name, tensor in ((weight_name, w), (bias_name, b)):
            if tensor is not None and tensor.dtype != x.dtype and not autocast:
                raise TypeError(f"{name}: expected {x.dtype} as x, got {tensor.dtype}")
        heads.append(Head(w.to(dtype), None if b is None else b.to(dtype), head_dims))
    return x.to(dtype), heads
