"""What the losses share: checks of their options, and the sum over prefixes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from mrl_fast.shared.checks import check_number
from mrl_fast.shared.types import NestedLoss

REDUCTIONS = ("mean", "sum", "none")


def nested_loss(
    rows: Tensor, dim_weights: Tensor, reduction: str, count: Tensor | float
) -> NestedLoss:
    """The weighted sum of the prefixes' losses, from those of rows ``[G, B]``; a mean divides by
    ``count``."""
    per_dim = rows if reduction == "none" else rows.sum(dim=1)
    if reduction == "mean":
        per_dim = per_dim / count if isinstance(count, Tensor) or count else per_dim * torch.nan
    return NestedLoss(weighted_sum(dim_weights, per_dim), per_dim.detach())


def weighted_sum(dim_weights: Tensor, per_dim: Tensor) -> Tensor:
    """The sum over the first axis; not by a matrix product, which autocast would round."""
    weights = dim_weights.to(per_dim.dtype).reshape(-1, *[1] * (per_dim.ndim - 1))
    return (weights * per_dim).sum(0)


def check_dim_weights(
    dim_weights: Tensor | Sequence[float] | None, count: int, x: Tensor
) -> Tensor:  # [G] fp32
    if dim_weights is None:
        return torch.ones(count, dtype=torch.float32, device=x.device)
    if not isinstance(dim_weights, Tensor):
        if not isinstance(dim_weights, Iterable):
            raise TypeError(f"dim_weights: expected a sequence, got {type(dim_weights).__name__}")
        dim_weights = torch.tensor(list(dim_weights), dtype=torch.float32, device=x.device)
    if dim_weights.shape != (count,):
        raise ValueError(f"dim_weights: expected shape [{count}], got {list(dim_weights.shape)}")
    return dim_weights.to(x.device, torch.float32)


def check_classes(target: Tensor, count: int, otherwise: str = "") -> None:
    """Raises where a target is not in [0, count). On a GPU, which would have to be waited for, and
    in a compiled graph, which would break, a wrong target makes the loss NaN instead."""
    if target.is_cuda or not target.numel() or torch.compiler.is_compiling():
        return
    low, high = target.aminmax()
    if low < 0 or high >= count:
        wrong = int(low if low < 0 else high)
        raise ValueError(f"target: expected classes in [0, {count}){otherwise}, got {wrong}")


def check_scalar(value: Tensor | float, name: str, like: Tensor) -> Tensor | float:
    """A number, or a tensor of one element that may be learned."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name}: expected a number or one floating-point element, got a tensor of shape "
                f"{list(value.shape)}, {value.dtype}"
            )
        if value.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, got {value.device}")
        return value.reshape(())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def check_scale(value: Tensor | float, name: str, like: Tensor) -> Tensor | float:
    """A positive scale; the value of a tensor is not read."""
    value = check_scalar(value, name, like)
    return check_number(value, name, above=True) if isinstance(value, float) else value
