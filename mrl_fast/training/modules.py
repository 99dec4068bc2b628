"""Losses as modules, ready for a trainer: each keeps its options, and each prefix's last loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl_fast.shared.checks import check_choice, check_dims, check_number, check_vector
from mrl_fast.shared.types import NestedLoss
from mrl_fast.training.heads import is_fusible
from mrl_fast.training.losses.cross_entropy import matryoshka_cross_entropy
from mrl_fast.training.losses.info_nce import matryoshka_info_nce
from mrl_fast.training.losses.reductions import (
    REDUCTIONS,
    check_classes,
    check_dim_weights,
    weighted_sum,
)


class MatryoshkaCrossEntropyLoss(nn.Module):
    """The summed cross-entropy of an ``MRLLinear`` head's prefixes, without its logits.

    ``loss(head, x, target)`` equals ``Σ_g c_g · nn.CrossEntropyLoss(...)(head(x)[g], target)``. No
    logits are in memory where the head and its linear layers are plain or parametrized. Any other
    module is called, and its logits ``[G, B, V]`` are in memory: a head with LoRA, hooks, pruning
    or quantization, one that ``fully_shard`` or DDP wraps.

    Args:
        dim_weights: c_g ≥ 0, one a prefix; default all 1.
        class_weight: ``[V]``, ≥ 0, a buffer: it moves with the module.
        ignore_index, label_smoothing, reduction: As in ``matryoshka_cross_entropy``.

    Attributes:
        per_dim: The last call's detached loss of each prefix, ``[G]`` (``[G, B]`` with
            ``reduction="none"``).
    """

    def __init__(
        self,
        *,
        dim_weights: Sequence[float] | None = None,
        class_weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__()
        self.dim_weights: Tensor | None
        self.class_weight: Tensor | None
        self.register_buffer("dim_weights", _numbers(dim_weights))
        if not isinstance(class_weight, Tensor):
            class_weight = _numbers(class_weight, "class_weight")
        self.register_buffer("class_weight", _checked_weights(class_weight, "class_weight"))
        _checked_weights(self.dim_weights, "dim_weights")
        self.ignore_index = ignore_index
        self.label_smoothing = check_number(label_smoothing, "label_smoothing", high=1.0)
        self.reduction = check_choice(reduction, "reduction", REDUCTIONS)
        self.per_dim: Tensor | None = None

    def forward(self, head: Any, x: Tensor, target: Tensor) -> Tensor:
        """The loss of ``head`` on features, as ``loss(head, features, target)``.

        Args:
            head: An ``MRLLinear``, or any module that makes logits ``[G, B, V]`` of x: a whole
                model too, which under DDP is the way: ``loss(DDP(nn.Sequential(backbone, head)),
                images, target)``. Its logits are then in memory.
            x: The features ``[B, D]`` that the head takes, not its logits; columns after
                ``head.dims[-1]`` do not count. What a whole model takes may have any shape.
            target: ``[B]`` int64, classes in ``[0, V)`` or ``ignore_index``.

        Returns:
            A scalar, or ``[B]`` with ``reduction="none"``.

        Raises:
            ValueError, TypeError: An argument of the wrong kind, shape, dtype, device or range.
        """
        _check_head(head)
        if not is_fusible(head):
            loss, self.per_dim = self._of_logits(head(x), target)
            return loss
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

    def _of_logits(self, logits: Tensor, target: Tensor) -> NestedLoss:
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            got = str(list(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
            if type(logits) is tuple:  # as RAIVNLab/MRL's layer
                got += (
                    "; of an MRL_Linear_Layer MRLLinear.from_raivn(layer) makes such a module, and "
                    "Matryoshka_CE_Loss takes the layer's tuple"
                )
            raise TypeError(f"head: expected a module that returns logits [G, B, V], got {got}")
        if logits.dtype != torch.float64:
            logits = logits.float()
        check_vector(target, "target", logits.shape[1], logits, dtype=torch.int64)
        classes = torch.where(target == self.ignore_index, 0, target)
        check_classes(classes, logits.shape[2], f" or {self.ignore_index}")
        class_weight = self.class_weight
        if class_weight is not None:
            check_vector(class_weight, "class_weight", logits.shape[2], logits)
        losses = [
            F.cross_entropy(
                scores,
                target,
                weight=None if class_weight is None else class_weight.to(logits.dtype),
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                reduction=self.reduction,
            )
            for scores in logits
        ]
        per_dim = torch.stack(losses)  # [G] or [G, B]
        c = check_dim_weights(self.dim_weights, len(per_dim), logits)
        return NestedLoss(weighted_sum(c, per_dim), per_dim.detach())

    def extra_repr(self) -> str:
        options = dict(
            dim_weights=None if self.dim_weights is None else self.dim_weights.tolist(),
            class_weight=None if self.class_weight is None else list(self.class_weight.shape),
            ignore_index=None if self.ignore_index == -100 else self.ignore_index,
            label_smoothing=self.label_smoothing or None,
            reduction=self.reduction,
        )
        return ", ".join(f"{k}={v!r}" for k, v in options.items() if v is not None)


def _check_head(head: Any) -> None:
    """Raises where this is not a head, or not the first of (head, x, target)."""
    if isinstance(head, Tensor):
        got = f"a tensor of shape {list(head.shape)}; the order is loss(head, features, target)"
    elif isinstance(head, list | tuple | nn.ModuleList):
        got = f"{type(head).__name__}; AdaptiveClassifier(layers).head is one of linear layers"
    elif not isinstance(head, nn.Module) and not all(
        hasattr(head, name) for name in ("weight", "bias", "dims")
    ):
        got = type(head).__name__
    else:
        return
    raise TypeError(f"head: expected an MRLLinear or a module that returns its logits, got {got}")


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
            ``normalize``, ``reduction``, ``group`` and ``spread_out``, as in
            ``matryoshka_info_nce``.

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
        check_number(scale, "scale", above=True)
        self.dim_weights: Tensor | None
        self.register_buffer("dim_weights", _numbers(dim_weights))
        self.log_scale: nn.Parameter | None
        log_scale = torch.tensor(math.log(scale), dtype=torch.float32, device="cpu")
        self.register_parameter("log_scale", nn.Parameter(log_scale) if learn_scale else None)
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
        scale = self.scale
        if isinstance(scale, Tensor) and isinstance(queries, Tensor):
            scale = scale.to(queries.device)
        loss, self.per_dim = matryoshka_info_nce(
            queries,
            documents if len(documents) != 1 else documents[0],
            self.dims,
            dim_weights=self.dim_weights,
            scale=scale,
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
    "spread_out",
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
        host = torch.empty(0, dtype=torch.float32, device="cpu")
        self.weights = check_dim_weights(_numbers(dim_weights), len(self.dims), host).tolist()
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


def _numbers(values: Sequence[float] | None, name: str = "dim_weights") -> Tensor | None:
    """``[G]`` fp32, whatever torch's defaults are: a buffer made on the meta device is lost."""
    if values is None:
        return None
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence, got {type(values).__name__}")
    return torch.tensor([*map(float, values)], dtype=torch.float32, device="cpu")


def _checked_weights(weights: Tensor | None, name: str) -> Tensor | None:
    """A vector of finite numbers ≥ 0; a meta tensor has no values to check."""
    if weights is None:
        return None
    check_vector(weights, name, weights.numel(), weights)
    if not weights.is_meta:
        for i, weight in enumerate(weights.tolist()):
            check_number(weight, f"{name}[{i}]")
    return weights
