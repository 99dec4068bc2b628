"""Nested classification heads: logits and predictions of every prefix from one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mrl_fast.shared.checks import (
    check_dims,
    check_int,
    check_matrix,
    check_same_device,
    check_vector,
)
from mrl_fast.shared.dispatch import choose, exporting
from mrl_fast.shared.types import Prediction
from mrl_fast.training import ops, reference
from mrl_fast.training.layers import (
    SHARDED,
    all_plain,
    call_heads,
    check_unhooked,
    check_width,
    described,
    is_plain,
    is_sharded,
    plain_linears,
)


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
    if not exporting() and not len(heads[0].weight):
        raise ValueError("weight: expected at least one class, got shape [0, ...]")
    impl = choose(impl, x, heads[0].weight)
    if impl == "reference":
        return reference.matryoshka_predict(x, *prefixes(heads))
    with torch.no_grad():
        parts = [ops.predict(x, h.weight, h.bias, list(h.dims), impl) for h in heads]
    labels, confidence = zip(*parts, strict=True)
    return Prediction(torch.cat(labels), torch.cat(confidence))


class MRLLinear(nn.Module):
    """Linear classifiers over nested prefixes.

    Equals G ``nn.Linear(d, num_classes)``, or with ``tied=True`` (MRL-E) one ``nn.Linear(dims[-1],
    num_classes)`` cut to each prefix, the same bias each time. Initialised as ``nn.Linear``.

    Plain and parametrized heads are multiplied in one fused pass. Any other head (replaced by LoRA,
    quantized, pruned, with hooks) is called once a prefix; a tied one is given each prefix padded
    by zeros to ``dims[-1]``. An exported or traced model is made of PyTorch's own ops, and
    ``plain`` gives ordinary linear layers: both run where mrl_fast is not installed.

    Args:
        dims: Prefix widths, strictly ascending.
        num_classes: V.
        tied: One weight for all prefixes (MRL-E) instead of one each (MRL).
        bias: Learn a bias (tied: one; separate: one a prefix).
        device, dtype: As for ``nn.Linear``.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 3.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        *,
        tied: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dims = check_dims(dims)
        self.num_classes = check_int(num_classes, "num_classes", 1)
        self.tied = tied
        widths = self.dims[-1:] if tied else self.dims
        options: dict[str, Any] = dict(bias=bias, device=device, dtype=dtype)
        self.heads = nn.ModuleList(nn.Linear(d, self.num_classes, **options) for d in widths)

    @classmethod
    def from_raivn(cls, layer: Any) -> MRLLinear:
        """A head of the linear layers of an ``MRL_Linear_Layer``: shared with it, not copied.

        Its logits are one tensor ``[G, B, V]`` where the layer returns a tuple of G.
        ``mrl_fast.integrations.raivn.MRL_Linear_Layer.from_mrl_linear`` is the way back.

        Args:
            layer: RAIVNLab/MRL's own, or ``mrl_fast.integrations.raivn``'s.

        Raises:
            TypeError: Not such a layer, or one with hooks, which the head would not run.
        """
        for name in ("nesting_list", "num_classes", "efficient", "nesting_classifier_0"):
            if not hasattr(layer, name):
                got = f"{type(layer).__name__} with no {name}"
                raise TypeError(f"layer: expected an MRL_Linear_Layer of RAIVNLab/MRL, got {got}")
        check_unhooked(layer, "layer")
        # on meta: its own linear layers are replaced at once
        head = cls(layer.nesting_list, layer.num_classes, tied=layer.efficient, device="meta")
        names = [f"nesting_classifier_{i}" for i in range(len(head.heads))]
        head.heads = nn.ModuleList(getattr(layer, name) for name in names)
        return head

    @torch.no_grad()
    def plain(self) -> nn.ModuleList:
        """Ordinary linear layers with the values of this head, for where mrl_fast is not installed.

        ``torch.stack([layer(x[:, : layer.in_features]) for layer in head.plain()])`` equals
        ``head(x)``. Each is an ``nn.Linear(dims[g], num_classes)`` with a copy of the weight: of a
        tied head, of the prefix's columns. Parametrizations are folded in.

        Raises:
            TypeError: The call of the head or of a layer uses more than the weights (LoRA, hooks,
                pruning, quantization): merge or remove that first.
        """
        named = _named_heads(self.weight, self.dims, self.bias)
        if not is_plain(self, MRLLinear):
            expected = "head: expected an MRLLinear without hooks or own forward"
            raise TypeError(f"{expected}, got {described(self)}")
        layers = nn.ModuleList()
        for weight, bias in zip(*prefixes([head for _, _, head in named]), strict=True):
            layer = nn.Linear(weight.shape[1], self.num_classes, bias is not None, device="meta")
            layer.weight = nn.Parameter(weight.clone())
            if bias is not None:
                layer.bias = nn.Parameter(bias.clone())
            layers.append(layer)
        return layers

    @property
    def weight(self) -> Tensor | list[Tensor]:
        """``[V, D]`` if tied, else G tensors ``[V, dims[g]]``: what the functional losses take.

        Raises:
            TypeError: A head is no plain linear layer: its weight is not all that its call uses.
        """
        weights = [head.weight for head in plain_linears(self.heads, "heads")]
        return weights[0] if self.tied else weights

    @property
    def bias(self) -> Tensor | list[Tensor | None] | None:
        """``[V]`` if tied, else G of them; None without any. Raises as ``weight``."""
        biases: list[Tensor | None] = [head.bias for head in plain_linears(self.heads, "heads")]
        if all(bias is None for bias in biases):
            return None
        return biases[0] if self.tied else biases

    def __dir__(self) -> list[str]:
        """Without what cannot be read now: ``torch.jit`` reads every name that it finds here."""
        unread = () if all_plain(self.heads) else ("weight", "bias")
        return [name for name in super().__dir__() if name not in unread]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D]`` → logits ``[G, B, V]``. Of an x that is wider than ``dims[-1]`` the first
        columns are taken."""
        if all_plain(self.heads):
            return matryoshka_logits(x, self.weight, self.dims, bias=self.bias)
        return torch.stack(call_heads(self.heads, x, self.dims))

    def extra_repr(self) -> str:
        return f"dims={list(self.dims)}, num_classes={self.num_classes}, tied={self.tied}"


def is_fusible(head: Any) -> bool:
    """Whether ``head(x)`` is the product with the weights that the head shows: it is a plain
    ``MRLLinear`` of plain heads, or no module."""
    if not isinstance(head, nn.Module):
        return True
    return is_plain(head, MRLLinear) and all_plain(head.heads)


def head_of_linears(layers: Iterable[Any], name: str) -> MRLLinear:
    """A head of one linear layer a prefix, or of what has taken its place: shared, not copied."""
    layers = list(layers)
    for i, layer in enumerate(layers):
        if not isinstance(layer, nn.Module) or not hasattr(layer, "in_features"):
            raise TypeError(f"{name}[{i}]: expected an nn.Linear, got {type(layer).__name__}")
    dims = check_dims([layer.in_features for layer in layers], name=name)
    classes = [layer.out_features for layer in layers]
    for i, count in enumerate(classes):
        if count != classes[0]:
            raise ValueError(
                f"{name}[{i}]: expected {classes[0]} classes as {name}[0], got {count}"
            )
    head = MRLLinear(dims, classes[0], device="meta")
    head.heads = nn.ModuleList(layers)
    return head


def prefixes(heads: Sequence[Head]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each prefix's own weight ``[V, d_g]`` and bias."""
    pairs = [(head.weight[:, :d], head.bias) for head in heads for d in head.dims]
    return [weight for weight, _ in pairs], [bias for _, bias in pairs]


def check_heads(
    x: Tensor, weight: Weights, dims: Sequence[int], bias: Biases
) -> tuple[Tensor, list[Head]]:
    """x and the heads, checked and in the dtype of the product; unchecked in an export."""
    if exporting():
        return x, [head for _, _, head in _named_heads(weight, tuple(dims), bias)]
    check_matrix(x, "x")
    dims = check_dims(dims)
    check_width(x, dims)
    named = _named_heads(weight, dims, bias)
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    tied = isinstance(weight, Tensor)
    classes = "V"  # the first head says how many
    heads: list[Head] = []
    for weight_name, bias_name, (w, b, head_dims) in named:
        if is_sharded(w):
            raise TypeError(f"{weight_name}: {SHARDED}")
        check_same_device(check_matrix(w, weight_name), weight_name, x)
        width = head_dims[-1]
        wide = w.shape[1] >= width if tied else w.shape[1] == width
        if not wide or classes not in ("V", len(w)):
            shape = f"[{classes}, {'>= ' if tied else ''}{width}]"
            raise ValueError(f"{weight_name}: expected shape {shape}, got {list(w.shape)}")
        classes = len(w)
        if b is not None:
            check_vector(b, bias_name, classes, x)
        for name, tensor in ((weight_name, w), (bias_name, b)):
            if tensor is not None and tensor.dtype != x.dtype and not autocast:
                raise TypeError(
                    f"{name}: expected {x.dtype} as x, got {tensor.dtype}; give "
                    f"x.to({tensor.dtype}), or compute under autocast"
                )
        heads.append(Head(w.to(dtype), None if b is None else b.to(dtype), head_dims))
    return x.to(dtype), heads


def _named_heads(
    weight: Weights, dims: tuple[int, ...], bias: Biases
) -> list[tuple[str, str, Head]]:
    """Each head with its arguments' names: one tied, or one a dim."""
    if isinstance(weight, Tensor):
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"bias: expected a tensor, as weight is one, got {type(bias).__name__}")
        return [("weight", "bias", Head(weight, bias, dims))]
    biases = [None] * len(dims) if bias is None else bias
    for name, value in (("weight", weight), ("bias", biases)):
        if isinstance(value, Tensor) or not hasattr(value, "__getitem__"):
            kind = type(value).__name__
            raise TypeError(f"{name}: expected a sequence of {len(dims)} tensors, got {kind}")
        if len(value) != len(dims):
            raise ValueError(f"{name}: expected {len(dims)} tensors, one a dim, got {len(value)}")
    return [
        (f"weight[{g}]", f"bias[{g}]", Head(weight[g], biases[g], (d,))) for g, d in enumerate(dims)
    ]
