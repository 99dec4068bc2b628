"""Modules around the functional losses: a nested head, and losses that are ready for a trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mrl_fast.shared.checks import check_dims, check_int
from mrl_fast.training.heads import matryoshka_logits
from mrl_fast.training.losses import matryoshka_cross_entropy, matryoshka_info_nce
from mrl_fast.training.losses.reductions import check_dim_weights


class MRLLinear(nn.Module):
    """Linear classifiers over nested prefixes.

    Equals G ``nn.Linear(d, num_classes)``, or with ``tied=True`` (MRL-E) one ``nn.Linear(dims[-1],
    num_classes)`` cut to each prefix, the same bias each time. Initialised as ``nn.Linear``.

    Args:
        dims: Prefix widths, strictly ascending.
        num_classes: V.
        tied: One weight for all prefixes (MRL-E) instead of one each (MRL).
        bias: Learn a bias (tied: one; separate: one a prefix).

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 3.
    """

    def __init__(
        self, dims: Sequence[int], num_classes: int, *, tied: bool = False, bias: bool = True
    ):
        super().__init__()
        self.dims = check_dims(dims)
        self.num_classes = check_int(num_classes, "num_classes", 1)
        self.tied = tied
        widths = self.dims[-1:] if tied else self.dims
        self.heads = nn.ModuleList(nn.Linear(d, self.num_classes, bias=bias) for d in widths)

    @property
    def weight(self) -> Tensor | list[Tensor]:
        """``[V, D]`` if tied, else G tensors ``[V, dims[g]]``: what the functional losses take."""
        weights: list[Tensor] = [head.get_parameter("weight") for head in self.heads]
        return weights[0] if self.tied else weights

    @property
    def bias(self) -> Tensor | list[Tensor] | None:
        if self.heads[0].bias is None:
            return None
        biases: list[Tensor] = [head.get_parameter("bias") for head in self.heads]
        return biases[0] if self.tied else biases

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D]`` → logits ``[G, B, V]``."""
        return matryoshka_logits(x, self.weight, self.dims, bias=self.bias)

    def extra_repr(self) -> str:
        return f"dims={list(self.dims)}, num_classes={self.num_classes}, tied={self.tied}"


class MatryoshkaCrossEntropyLoss(nn.Module):
    """The summed cross-entropy of an ``MRLLinear`` head's prefixes, without its logits.

    ``loss(head, x, target)`` equals the sum over g of ``nn.CrossEntropyLoss(...)(head(x)[g],
    target)``.

    Args:
        dim_weights: c_g, one a prefix; default all 1.
        class_weight: ``[V]``, a buffer: it moves with the module.
        ignore_index, label_smoothing, reduction: As in ``matryoshka_cross_entropy``.

    Attributes:
        per_dim: The last call's detached loss of each prefix, ``[G]`` (``[G, B]`` with
            ``reduction="none"``).
    """

    def __init__(
        self,
        *,
        dim_weights: Sequence[float] | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__()
        weights = None if dim_weights is None else torch.tensor(list(dim_weights))
        self.dim_weights: Tensor | None
        self.class_weight: Tensor | None
        self.register_buffer("dim_weights", weights)
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.per_dim: Tensor | None = None

    def forward(self, head: MRLLinear, x: Tensor, target: Tensor) -> Tensor:
        loss, self.per_dim = matryoshka_cross_entropy(
            x,
            head.weight,
            target,
            head.dims,
            bias=head.bias,
            dim_weights=self.dim_weights,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
        return loss


class MatryoshkaInfoNCELoss(nn.Module):
    """InfoNCE of every nested prefix, ready for a trainer.

    ``loss(queries, positives, negatives_1, …)`` equals sentence-transformers' MatryoshkaLoss over
    MultipleNegativesRankingLoss on the same embeddings.

    Args:
        dims: Prefix widths, strictly ascending.
        dim_weights: c_g, one a prefix; default all 1.
        scale: Inverse temperature at the start.
        learn_scale: Learn it, as the parameter ``log_scale`` (CLIP); else it stays.
        options: ``directions``, ``partition_mode``, ``hardness_mode``, ``hardness_strength``,
            ``normalize``, ``reduction`` and ``group``, as in ``matryoshka_info_nce``.

    Attributes:
        per_dim: The last call's detached loss of each prefix, ``[G]``.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        dim_weights: Sequence[float] | None = None,
        scale: float = 20.0,
        learn_scale: bool = False,
        **options: Any,
    ):
        super().__init__()
        known = INFO_NCE_OPTIONS
        if unknown := set(options) - known:
            raise TypeError(
                f"{sorted(unknown)[0]}: expected one of {', '.join(sorted(known))} as an option"
            )
        self.dims = check_dims(dims)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale: expected a positive number, got {scale!r}")
        weights = None if dim_weights is None else torch.tensor(list(dim_weights))
        self.dim_weights: Tensor | None
        self.register_buffer("dim_weights", weights)
        self.log_scale: nn.Parameter | None
        log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learn_scale else None
        self.register_parameter("log_scale", log_scale)
        self.fixed_scale = scale
        self.options = options
        self.per_dim: Tensor | None = None

    @property
    def scale(self) -> Tensor | float:
        return self.fixed_scale if self.log_scale is None else self.log_scale.exp()

    def forward(
        self,
        queries: Tensor,
        *documents: Tensor,
        target: Tensor | None = None,
        mask: Tensor | dict[str, Tensor] | None = None,
    ) -> Tensor:
        loss, self.per_dim = matryoshka_info_nce(
            queries,
            documents if len(documents) != 1 else documents[0],
            self.dims,
            dim_weights=self.dim_weights,
            scale=self.scale,
            target=target,
            mask=mask,
            **self.options,
        )
        return loss

    def extra_repr(self) -> str:
        return f"dims={list(self.dims)}, learn_scale={self.log_scale is not None}"


INFO_NCE_OPTIONS = {
    "directions",
    "partition_mode",
    "hardness_mode",
    "hardness_strength",
    "normalize",
    "reduction",
    "group",
}


class MatryoshkaLoopLoss(nn.Module):
    """Any loss of embeddings, over every nested prefix, by a plain loop.

    For losses that have no fused form (CoSENT, triplet, margin-MSE, cosine embedding). The first
    call warns that this is what happens. ``loss(embeddings, *labels)`` equals ``sum(c *
    inner(*[e[..., :d] for e in embeddings], *labels) for c, d in zip(dim_weights, dims))``.

    Args:
        inner: Takes the embeddings one by one, then the labels; returns a scalar.
        dims: Prefix widths, strictly ascending.
        dim_weights: c_g, one a prefix; default all 1.
        normalize: Normalise each prefix first.

    Attributes:
        per_dim: The last call's detached loss of each prefix, ``[G]``.
    """

    def __init__(
        self,
        inner: Callable[..., Tensor],
        dims: Sequence[int],
        *,
        dim_weights: Sequence[float] | None = None,
        normalize: bool = False,
    ):
        super().__init__()
        if not callable(inner):
            raise TypeError(f"inner: expected a callable, got {type(inner).__name__}")
        self.inner = inner
        self.dims = check_dims(dims)
        self.weights = check_dim_weights(dim_weights, len(self.dims), torch.empty(0)).tolist()
        self.normalize = normalize
        self.per_dim: Tensor | None = None
        self.warned = False

    def forward(self, embeddings: Sequence[Tensor], *labels: Any) -> Tensor:
        if isinstance(embeddings, Tensor):
            raise TypeError("embeddings: expected a sequence of tensors, got a tensor")
        for i, e in enumerate(embeddings):
            check_dims(self.dims, e.shape[-1], f"dims (of embeddings[{i}])")
        if not self.warned:
            self.warned = True
            name = getattr(self.inner, "__name__", type(self.inner).__name__)
            warnings.warn(
                f"{name} has no fused form: it runs once for each of {len(self.dims)} prefixes",
                stacklevel=2,
            )
        losses = []
        for d in self.dims:
            prefixes = [e[..., :d] for e in embeddings]
            if self.normalize:
                prefixes = [nn.functional.normalize(p, dim=-1) for p in prefixes]
            losses.append(self.inner(*prefixes, *labels))
        per_dim = torch.stack(losses)
        if per_dim.ndim != 1:
            raise ValueError(
                f"inner: expected a scalar loss, got one of shape {list(losses[0].shape)}"
            )
        self.per_dim = per_dim.detach()
        return (per_dim * per_dim.new_tensor(self.weights)).sum()
