"""Modules around the functional losses: a nested head, and a loss that is ready for a trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mrl_fast._checks import check_dims, check_int
from mrl_fast.losses import matryoshka_cross_entropy, matryoshka_logits


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
