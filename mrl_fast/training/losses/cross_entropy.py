"""Cross-entropy of nested classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrl_fast.shared.checks import check_choice, check_number, check_vector
from mrl_fast.shared.dispatch import choose
from mrl_fast.shared.types import NestedLoss
from mrl_fast.training import reference
from mrl_fast.training.heads import Biases, Weights, check_heads, prefixes
from mrl_fast.training.losses.reductions import (
    REDUCTIONS,
    check_classes,
    check_dim_weights,
    nested_loss,
)
from mrl_fast.training.ops import fold
from mrl_fast.training.spec import FoldSpec


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
    in zip(dim_weights, dims))``. Saves a few numbers a row and prefix; the backward computes the
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
    x, heads = check_heads(x, weight, dims, bias)
    check_choice(reduction, "reduction", REDUCTIONS)
    label_smoothing = check_number(label_smoothing, "label_smoothing", high=1.0)
    num_classes = len(heads[0].weight)
    check_vector(target, "target", len(x), x, dtype=torch.int64)
    keep = target != ignore_index
    safe_target = torch.where(keep, target, 0)
    check_classes(safe_target, num_classes, f" or {ignore_index}")
    if class_weight is not None:
        check_vector(class_weight, "class_weight", num_classes, x)
    dim_weights = check_dim_weights(dim_weights, sum(len(head.dims) for head in heads), x)

    impl = choose(impl, x, heads[0].weight)
    if impl == "reference":
        return reference.matryoshka_cross_entropy(
            x, *prefixes(heads), target, dim_weights,
            weight=None if class_weight is None else class_weight.to(x.dtype),
            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
        )  # fmt: skip

    # A row's loss is −Σ_j t_ij · logp_ij with t_ij = (1 − ε)·hit_i·[j = y_i] + keep_i·soft_j, where
    # ε is label_smoothing.
    if class_weight is None:
        hit = keep.float()  # [B]
    else:
        class_weight = class_weight.detach().float()
        hit = torch.where(keep, class_weight[safe_target], 0.0)
    soft = None
    if label_smoothing > 0:
        soft = hit.new_ones(num_classes) if class_weight is None else class_weight
        soft = soft * (label_smoothing / num_classes)  # [V]

    parts = []
    for head in heads:  # separate heads share no scores: one prefix each
        spec = FoldSpec(x, head.weight, head.dims, head.bias, target=safe_target, soft=soft)
        f = fold(spec, impl)
        part = (1.0 - label_smoothing) * hit * -f.hit
        if soft is not None:
            part = part - f.soft_sum.float()
        parts.append(torch.where(keep, part, 0.0))
    rows = torch.cat(parts)  # [G, B]
    return nested_loss(rows, dim_weights, reduction, hit.sum())
