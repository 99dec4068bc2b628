"""RAIVNLab/MRL's loss and layers under their own names: ``from mrl_fast.integrations.raivn import
Matryoshka_CE_Loss, MRL_Linear_Layer`` instead of ``from MRL import …``; its checkpoints load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrl_fast.shared.checks import check_dims, check_int
from mrl_fast.shared.dispatch import exporting
from mrl_fast.training.heads import MRLLinear, matryoshka_logits
from mrl_fast.training.layers import (
    all_plain,
    call_heads,
    check_stored,
    check_unhooked,
    check_width,
    plain_linears,
)
from mrl_fast.training.losses.cross_entropy import matryoshka_cross_entropy
from mrl_fast.training.losses.reductions import check_classes, weighted_sum


class MRL_Linear_Layer(nn.Module):
    """Linear classifiers over nested prefixes, MRL or (``efficient``) MRL-E.

    Equals ``tuple(F.linear(x[:, :d], weight_d, bias_d) for d in nesting_list)``; MRL-E has one
    weight, cut to each prefix, and one bias. Parameters are ``nesting_classifier_{i}.weight`` and
    ``.bias``, those of MRL-E ``nesting_classifier_0``.

    With ``layer.deferred = True`` a layer in training mode multiplies nothing: it returns the pair
    ``(layer, x)``, from which ``Matryoshka_CE_Loss`` makes the same loss with no logits in memory.
    A loop ``loss = criterion(model(images), target)`` stays as it is, autocast included if the loss
    is within. Whoever else reads the output in training finds no logits there, so it is not the
    default. A tuple that computes logits when it is read would not do: torch reads its memory past
    ``__getitem__``, and the weights may have changed by then. The loss needs the weights
    that the forward had: under DDP it does, under FSDP and DataParallel it does not.

    Args:
        nesting_list: Prefix widths, strictly ascending.
        num_classes: V.
        efficient: One weight for all prefixes (MRL-E).
        kwargs: Of ``nn.Linear``: ``bias``, ``device``, ``dtype``.

    Raises:
        ValueError, TypeError: An argument of the wrong kind or range; in ``forward``, an x that is
            not ``[B, D]`` with ``D >= nesting_list[-1]``.

    Source: github.com/RAIVNLab/MRL, MRL.py; Kusupati et al., NeurIPS 2022, section 3.
    """

    def __init__(
        self,
        nesting_list: Sequence[int],
        num_classes: int = 1000,
        efficient: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        self.nesting_list = list(check_dims(nesting_list, name="nesting_list"))
        self.num_classes = check_int(num_classes, "num_classes", 1)
        self.efficient = efficient
        self.deferred = False
        for i, width in enumerate(self.nesting_list[-1:] if efficient else self.nesting_list):
            self.add_module(f"nesting_classifier_{i}", nn.Linear(width, self.num_classes, **kwargs))

    @classmethod
    def from_mrl_linear(cls, head: MRLLinear) -> MRL_Linear_Layer:
        """A layer of the linear layers of an ``MRLLinear``: shared with it, not copied.

        ``MRLLinear.from_raivn`` is the way back. ``from_mrl_linear(head).state_dict()`` is a
        checkpoint that RAIVNLab/MRL loads.

        Raises:
            TypeError: Not an ``MRLLinear``, or one with hooks, which the layer would not run, or
                with layers whose state is more than a weight and a bias (LoRA, quantization,
                parametrizations), which RAIVNLab/MRL could not load.
        """
        if not isinstance(head, MRLLinear):
            raise TypeError(f"head: expected an MRLLinear, got {type(head).__name__}")
        check_unhooked(head, "head")
        check_stored(head.heads, "heads")
        layer = cls(head.dims, head.num_classes, head.tied, device="meta")  # replaced at once
        for i, classifier in enumerate(head.heads):
            setattr(layer, f"nesting_classifier_{i}", classifier)
        return layer

    @property
    def classifiers(self) -> list[Any]:
        """``nn.Linear`` layers, or what has taken their place."""
        return list(self.children())

    def reset_parameters(self) -> None:
        for classifier in self.classifiers:
            classifier.reset_parameters()

    @property
    def head(self) -> dict[str, Any]:
        """``weight``, ``bias`` and ``dims``, as the functional ops take them.

        Raises:
            TypeError: A classifier is no plain linear layer: its weight is not all that it uses.
        """
        classifiers = plain_linears(self.classifiers, "classifiers")
        weights = [classifier.weight for classifier in classifiers]
        biases = [classifier.bias for classifier in classifiers]
        weight, bias = (weights[0], biases[0]) if self.efficient else (weights, biases)
        return dict(weight=weight, bias=bias, dims=self.nesting_list)

    def __dir__(self) -> list[str]:
        """Without what cannot be read now: ``torch.jit`` reads every name that it finds here."""
        return [name for name in super().__dir__() if name != "head" or self.is_plain]

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """``[B, D]`` → G logits ``[B, V]``, or ``(layer, x)`` if they are deferred: never in an
        export."""
        if self.deferred and self.training and self.is_plain and not exporting():
            return self, x
        return self.logits(x)

    @property
    def is_plain(self) -> bool:
        """Whether the classifiers' weights are all that their calls use, so that a loss may defer
        the logits."""
        return all_plain(self.classifiers)

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[B, D]`` → G logits ``[B, V]``."""
        if not self.is_plain:
            return tuple(call_heads(self.classifiers, x, self.nesting_list))
        logits = matryoshka_logits(x, **self.head)
        # not unbind: they may be written to
        return tuple(logits[g] for g in range(len(self.nesting_list)))

    def extra_repr(self) -> str:
        return f"nesting_list={self.nesting_list}, efficient={self.efficient}"


class Matryoshka_CE_Loss(nn.Module):
    """The weighted sum of every prefix's cross-entropy.

    ``criterion(output, target)`` equals ``sum(c * nn.CrossEntropyLoss(**kwargs)(logits, target) for
    c, logits in zip(relative_importance, output))``. Where ``output`` is ``(layer, features)``, an
    ``MRL_Linear_Layer`` and its ``[B, D]`` input, the sum is that of ``layer(features)``, fused:
    no logits are in memory. A ``deferred`` layer's output is such a pair.

    Args:
        relative_importance: c_g, one a prefix; default all 1. It moves to the logits' device.
        kwargs: Of ``nn.CrossEntropyLoss``: ``weight``, ``ignore_index``, ``reduction``,
            ``label_smoothing``. With ``reduction="none"`` the losses of rows are summed too, as
            there.

    Attributes:
        per_dim: The last call's detached loss of each prefix, ``[G]`` (``[G, B]`` with
            ``reduction="none"``).

    Raises:
        ValueError, TypeError: An argument of the wrong kind, shape or number. The fused form takes
            classes, ``[B]`` int64, and not their probabilities.

    Source: github.com/RAIVNLab/MRL, MRL.py; Kusupati et al., NeurIPS 2022, equation 1.
    """

    def __init__(self, relative_importance: Sequence[float] | None = None, **kwargs: Any):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(**kwargs)
        self.relative_importance: Tensor | None
        importance = None if relative_importance is None else _numbers(relative_importance)
        self.register_buffer("relative_importance", importance, persistent=False)
        self.per_dim: Tensor | None = None

    def forward(self, output: Any, target: Tensor) -> Tensor:
        layer = output[0] if isinstance(output, Sequence) and output else None
        if isinstance(layer, MRL_Linear_Layer):
            if len(output) != 2:
                raise ValueError(f"output: expected (layer, features), got {len(output)} items")
            return self._fused(layer, output[1], target)
        if not isinstance(output, Tensor | Sequence):
            raise TypeError(
                "output: expected G logits, or an MRL_Linear_Layer and its input, "
                f"got {type(output).__name__}"
            )
        c = self._importance(len(output))
        self._check_target(output, target)
        losses = torch.stack([self.criterion(logits, target) for logits in output])
        self.per_dim = losses.detach()
        return losses.sum() if c is None else weighted_sum(c.to(losses), losses).sum()

    def _check_target(self, output: Any, target: Any) -> None:
        """Of classes of rows: PyTorch takes probabilities and maps too, and checks those."""
        known = isinstance(target, Tensor) and target.dtype == torch.int64 and target.ndim == 1
        if known and all(isinstance(logits, Tensor) and logits.ndim == 2 for logits in output):
            ignored = self.criterion.ignore_index
            classes = torch.where(target == ignored, 0, target)
            check_classes(classes, output[0].shape[1], f" or {ignored}")

    def _fused(self, layer: MRL_Linear_Layer, features: Tensor, target: Tensor) -> Tensor:
        if not layer.is_plain:
            return self.forward(layer.logits(features), target)
        loss, self.per_dim = matryoshka_cross_entropy(
            features,
            target=target,
            **layer.head,
            dim_weights=self._importance(len(layer.nesting_list)),
            class_weight=self.criterion.weight,
            ignore_index=self.criterion.ignore_index,
            label_smoothing=self.criterion.label_smoothing,
            reduction=self.criterion.reduction,
        )
        return loss.sum()  # of rows, with "none"

    def _importance(self, count: int) -> Tensor | None:
        c = self.relative_importance
        if c is not None and len(c) != count:
            raise ValueError(
                f"relative_importance: expected {count} numbers, one a prefix, got {len(c)}"
            )
        return c


class FixedFeatureLayer(nn.Linear):
    """A linear classifier of the first ``in_features`` columns: the FF-k baseline.

    Equals ``F.linear(x[:, :in_features], weight, bias)``.

    Args:
        in_features: k. out_features: V.
        kwargs: Of ``nn.Linear``.

    Raises:
        ValueError, TypeError: In ``forward``, an x that is not ``[B, D]`` with ``D >=
            in_features``.

    Source: github.com/RAIVNLab/MRL, MRL.py.
    """

    def __init__(self, in_features: int, out_features: int, **kwargs: Any):
        super().__init__(in_features, out_features, **kwargs)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not exporting():
            check_width(x, [self.in_features])
        return F.linear(x[:, : self.in_features], self.weight, self.bias)


def _numbers(values: Any) -> Tensor:  # [G] fp32
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"relative_importance: expected finite numbers, got {values!r}")
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")
