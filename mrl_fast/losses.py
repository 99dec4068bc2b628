"""Nested logits and losses: every prefix's scores from one pass over the columns.

``S_g = x[:, :d_g] @ weight[:, :d_g].T`` is a running sum over slabs, so all G score matrices cost
one. The cross-entropy keeps none of them: it saves a maximum and a log-sum a row and prefix, and
computes the scores again in the backward, where suffix sums of the score gradients give the
weights' and inputs' slab by slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mrl_fast import reference
from mrl_fast._checks import (
    check_choice,
    check_dims,
    check_matrix,
    check_same_device,
    check_vector,
)
from mrl_fast._dispatch import implementation
from mrl_fast._types import NestedLoss


class _Head(NamedTuple):
    """A weight and the prefixes that share it: all of them (MRL-E), or one (MRL)."""

    weight: Tensor  # [V, >= dims[-1]]
    bias: Tensor | None  # [V]
    dims: tuple[int, ...]


Weights = Tensor | Sequence[Tensor]
Biases = Tensor | Sequence[Tensor | None] | None


class _NestedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, engine: ModuleType, x, weight, bias, dims):
        ctx.engine, ctx.dims = engine, dims
        ctx.save_for_backward(x, weight, bias)
        return engine.logits_forward(x, weight, bias, dims)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        dx, dw, db = ctx.engine.logits_backward(grad, x, weight, bias, ctx.dims)
        return None, dx, dw, db, None


class _NestedLogProb(torch.autograd.Function):
    """Row by row and prefix by prefix: the target's log-probability, and Σ_j soft_j ·
    log-probability of j."""

    @staticmethod
    def forward(ctx, engine: ModuleType, x, weight, bias, target, soft, dims):
        row_max, log_sum, logp_target, logp_soft = engine.cross_entropy_forward(
            x, weight, bias, target, soft, dims
        )
        ctx.engine, ctx.dims = engine, dims
        ctx.save_for_backward(x, weight, bias, target, soft, row_max, log_sum)
        return logp_target, logp_soft  # [G, B] each; the second is None without soft

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_target, d_soft):  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, dw, db = ctx.engine.cross_entropy_backward(
            *ctx.saved_tensors, ctx.dims, d_target, d_soft
        )
        return None, dx, dw, db, None, None, None


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
    x, heads = _check_heads(x, weight, dims, bias)
    engine = implementation(impl, x, heads[0].weight)
    if engine is reference:
        return reference.matryoshka_logits(x, *_prefixes(heads))
    return torch.cat([_NestedLogits.apply(engine, x, *head) for head in heads])


def matryoshka_cross_entropy(
    x: Tensor,
    weight: Weights,
    target: Tensor,
    dims: Sequence[int],
    *,
    bias: Biases = None,
    dim_weights: Tensor | Sequence[float] | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> NestedLoss:
    """Cross-entropy of every nested prefix, summed, with no logits in memory.

    Equals ``sum(c * F.cross_entropy(F.linear(x[:, :d], weight[:, :d], bias), target, ...) for c, d
    in zip(dim_weights, dims))``. Saves two fp32 numbers a row and prefix; the backward computes the
    scores again. fp32 statistics and gradient accumulation for every input dtype. Differentiable
    once.

    Args:
        x: Embeddings, ``[B, D]``, any row stride.
        weight: Tied head (MRL-E): ``[V, W]`` with ``W >= dims[-1]``. Separate heads (MRL): G
            tensors ``[V, dims[g]]``.
        target: Class indices, ``[B]`` int64, each in ``[0, V)`` or ``ignore_index``.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        bias: ``[V]``, the same for every prefix; for separate heads a sequence of G of them.
        dim_weights: c_g, ``[G]``; default all 1: a sum over prefixes, not a mean.
        class_weight: ``[V]``, as ``weight`` of ``torch.nn.CrossEntropyLoss``.
        ignore_index: Target value whose rows count for nothing.
        label_smoothing: In ``[0, 1]``, spread over V classes as PyTorch does.
        reduction: ``"mean"`` (weighted, over the rows that are not ignored; NaN if none), ``"sum"``
            or ``"none"``.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        NestedLoss: ``loss`` (scalar, or ``[B]`` with ``"none"``) and detached ``per_dim`` (``[G]``
            or ``[G, B]``).

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, equation 1.
    """
    x, heads = _check_heads(x, weight, dims, bias)
    check_choice(reduction, "reduction", ("mean", "sum", "none"))
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing!r}")
    num_classes = len(heads[0].weight)
    check_vector(target, "target", len(x), x, dtype=torch.int64)
    keep = target != ignore_index
    if not target.is_cuda and len(target):  # on a GPU the check would wait for the device
        low, high = torch.where(keep, target, 0).aminmax()
        if low < 0 or high >= num_classes:
            wrong = int(low if low < 0 else high)
            raise ValueError(
                f"target: expected classes in [0, {num_classes}) or {ignore_index}, got {wrong}"
            )
    if class_weight is not None:
        check_vector(class_weight, "class_weight", num_classes, x)
    dim_weights = _check_dim_weights(dim_weights, sum(len(head.dims) for head in heads), x)

    engine = implementation(impl, x, heads[0].weight)
    if engine is reference:
        return reference.matryoshka_cross_entropy(
            x,
            *_prefixes(heads),
            target,
            dim_weights,
            class_weight,
            ignore_index,
            label_smoothing,
            reduction,
        )

    # t_ij = hit_i·[j = y_i] + keep_i·soft_j, and a row's loss is −Σ_j t_ij · logp_ij
    safe_target = torch.where(keep, target, 0)
    if class_weight is None:
        hit = keep.float()  # [B]
    else:
        class_weight = class_weight.detach().float()
        hit = torch.where(keep, class_weight[safe_target], 0.0)
    soft = None
    if label_smoothing > 0:
        soft = torch.ones(num_classes, device=x.device) if class_weight is None else class_weight
        soft = soft * (label_smoothing / num_classes)  # [V]

    parts = [
        _NestedLogProb.apply(engine, x, head.weight, head.bias, safe_target, soft, head.dims)
        for head in heads  # separate heads share no scores: one prefix each
    ]
    logp_target = torch.cat([part for part, _ in parts])  # [G, B]
    rows = torch.where(keep, (1.0 - label_smoothing) * hit * -logp_target, 0.0)  # [G, B]
    if soft is not None:
        rows = rows - torch.where(keep, torch.cat([part for _, part in parts]), 0.0)
    if reduction == "none":
        per_dim = rows
    else:
        per_dim = rows.sum(dim=1)
        if reduction == "mean":
            per_dim = per_dim / hit.sum()
    return NestedLoss(torch.tensordot(dim_weights, per_dim, 1), per_dim.detach())


def _prefixes(heads: Sequence[_Head]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each prefix's own weight ``[V, d_g]`` and bias."""
    pairs = [(head.weight[:, :d], head.bias) for head in heads for d in head.dims]
    return [weight for weight, _ in pairs], [bias for _, bias in pairs]


def _check_heads(
    x: Tensor, weight: Weights, dims: Sequence[int], bias: Biases
) -> tuple[Tensor, list[_Head]]:
    """x and the heads, checked and in the dtype of the product."""
    check_matrix(x, "x")
    dims = check_dims(dims, x.shape[1])
    named: list[tuple[str, str, _Head]]
    if isinstance(weight, Tensor):
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"bias: expected a tensor, as weight is one, got {type(bias).__name__}")
        named = [("weight", "bias", _Head(weight, bias, dims))]
    else:
        for name, value in (
            ("weight", weight),
            ("bias", [None] * len(dims) if bias is None else bias),
        ):
            if isinstance(value, Tensor) or not isinstance(value, Sequence):
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
                _Head(weight[g], None if bias is None else bias[g], (d,)),
            )
            for g, d in enumerate(dims)
        ]
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    heads: list[_Head] = []
    for weight_name, bias_name, (w, b, head_dims) in named:
        check_same_device(check_matrix(w, weight_name), weight_name, x)
        classes = len(heads[0].weight) if heads else max(len(w), 1)
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
        heads.append(_Head(w.to(dtype), None if b is None else b.to(dtype), head_dims))
    return x.to(dtype), heads


def _check_dim_weights(
    dim_weights: Tensor | Sequence[float] | None, count: int, x: Tensor
) -> Tensor:  # [G] fp32
    if dim_weights is None:
        return torch.ones(count, device=x.device)
    if not isinstance(dim_weights, Tensor):
        dim_weights = torch.tensor(list(dim_weights), dtype=torch.float32)
    if dim_weights.shape != (count,):
        raise ValueError(f"dim_weights: expected shape [{count}], got {list(dim_weights.shape)}")
    return dim_weights.to(x.device, torch.float32)
