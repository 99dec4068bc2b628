"""sentence-transformers' MatryoshkaLoss and Matryoshka2dLoss, with one fused loss for all dims.

They are subclasses of the originals: attributes, errors, configuration and citation are theirs, and
so is the loop that runs a loss which has no fused form.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mrl_fast.shared.checks import check_dims

try:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.base.trainer import BaseTrainer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator

    from mrl_fast.integrations.sentence_transformers.fused import Form, embed, fused_form
except ImportError as error:
    raise ImportError(
        "mrl_fast.integrations.sentence_transformers needs sentence-transformers 6 for its losses: "
        "pip install 'mrl-fast[sentence-transformers]'"
    ) from error


@contextmanager
def _recorded(module: Any, of: Callable[[Any, Any], Any]) -> Iterator[list[Any]]:
    """What ``of(module, output)`` is after each call of the module."""
    found: list[Any] = []
    hook = module.register_forward_hook(lambda module, args, out: found.append(of(module, out)))
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def _unchanged(loss: nn.Module) -> Iterator[None]:
    """Afterwards a cached loss calculates as before: it may be that of several nested losses, each
    with its own dims."""
    own = vars(loss).get("calculate_loss")  # None: its class's
    try:
        yield
    finally:
        vars(loss).pop("calculate_loss", None)
        if own is not None:
            vars(loss)["calculate_loss"] = own


class _Logged(nn.Module):
    """Has a trainer log the loss of each dim, beside the sum that it trains on."""

    def log_dims(self, dims: Sequence[int]) -> None:
        self.per_dim: dict[int, Tensor] = {}
        self._dims = tuple(dict.fromkeys(dims))
        self._latest: dict[bool, dict[int, Tensor]] = {True: {}, False: {}}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().__call__(*args, **kwargs)
        # To be asked for parts, a trainer needs a dict, which no other caller of a loss could take.
        trainer = sys._getframe(1).f_locals.get("self")
        if isinstance(trainer, BaseTrainer):
            latest = self._latest[trainer.model.training]
            latest.update(self.per_dim)
            if len(latest) == len(self._dims):  # else some dim was not drawn yet
                trainer.track_loss_components({f"loss_{d}": latest[d] for d in self._dims})
        return loss


class MatryoshkaLoss(_Logged, losses.MatryoshkaLoss):
    """A loss over every nested prefix of the embeddings: ``sentence_transformers``' MatryoshkaLoss.

    ``MultipleNegativesRankingLoss`` and ``GISTEmbedLoss``, cached or not, with every option of
    theirs and the similarities ``cos_sim`` and ``dot_score``, are computed for all dims at once,
    with no score matrix in memory (GIST keeps its masks, a byte a pair), to the rounding of the
    original's value and gradients; a cached loss embeds its mini-batches again once, as before. Any
    other loss runs in the original's loop, which a warning says once. Each prefix is normalised.

    A ``SentenceTransformerTrainer`` logs ``loss_768``, ``loss_256``, … beside ``loss`` (in an
    evaluation ``eval_loss_768``, …): unweighted means over the steps since the last log. Of a dim
    that was not drawn in a step (``n_dims_per_step``) its last loss counts. Where the losses of
    several data sets have different dims, the trainer divides each by the steps of all.

    Args:
        model: The SentenceTransformer.
        loss: The loss of each prefix.
        matryoshka_dims: Prefix widths, in any order, each in ``[1, D]``.
        matryoshka_weights: One a dim; default all 1: a sum over dims.
        n_dims_per_step: Dims drawn for a step, by Python's ``random`` as in the original; −1 is
            all. Ranks of ``torch.distributed`` use those that rank 0 draws: all have to call.

    Attributes:
        per_dim: The last call's detached, unweighted loss of each dim that was drawn, as a dict by
            dim (elsewhere in mrl_fast a tensor by position): ascending where the loss is fused, as
            ``matryoshka_dims`` where it runs in the loop.

    Raises:
        ValueError, TypeError: As the original; a dim beyond the embeddings' width.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022.
    """

    def __init__(
        self,
        model: Any,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | None = None,
        n_dims_per_step: int = -1,
    ):
        with _unchanged(loss):  # the original replaces a cached loss's calculation for good
            super().__init__(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
        self.log_dims(self.matryoshka_dims)
        self._warned = False

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        features = list(sentence_features)
        inner: Any = self.loss
        if self.uses_gradient_cache:
            with _unchanged(inner):
                inner.calculate_loss = partial(self._calculate_loss, inner.calculate_loss)
                return inner(features, labels)
        dims, weights = self._draw(features[0].values())
        form = fused_form(inner)
        # the original cuts all embeddings that its model makes, as a guide too, and no others
        if (
            form is None
            or inner.model is not self.model
            or getattr(inner, "guide", None) is self.model
        ):
            return self._loop(features, labels, dims, weights)
        return self._fused(form, *embed(inner, features), dims, weights)

    def _calculate_loss(
        self, unnested: Callable[..., Tensor], reps: list[list[Tensor]], *args: Any, **kwargs: Any
    ) -> Tensor:
        """In the place of a cached loss's own, ``unnested``; reps: embeddings by column and
        mini-batch."""
        dims, weights = self._draw(reps[0])
        form = fused_form(self.loss)
        if form is None:
            self._warn(dims)
            parts: list[Tensor] = []

            def calculate(*args: Any, **kwargs: Any) -> Tensor:
                parts.append(unnested(*args, **kwargs))
                return parts[-1]

            total = CachedLossDecorator(calculate, dims, weights)(reps, *args, **kwargs)
            self._keep(dims, parts)
            return total
        guides = [torch.cat(column) for column in args[0]] if hasattr(self.loss, "guide") else []
        columns = [torch.cat(column).detach() for column in reps]
        if not kwargs.get("with_backward"):
            return self._fused(form, columns, guides, dims, weights)
        columns = [column.requires_grad_() for column in columns]
        loss = self._fused(form, columns, guides, dims, weights)
        gradients = torch.autograd.grad(loss, columns)
        for column, gradient in zip(reps, gradients, strict=True):
            for rep, part in zip(column, gradient.split([*map(len, column)]), strict=True):
                rep.grad = part  # a view: where autograd would copy
        return loss.detach()

    def _fused(
        self,
        form: Form,
        columns: list[Tensor],
        guides: list[Tensor],
        dims: Sequence[int],
        weights: Sequence[float],
    ) -> Tensor:
        if len(columns) < 2:
            raise ValueError(f"sentence_features: expected at least 2 columns, got {len(columns)}")
        weight_of: dict[int, float] = {}
        for d, weight in zip(dims, weights, strict=True):
            weight_of[d] = weight_of.get(d, 0.0) + weight
        ascending = check_dims(sorted(weight_of), columns[0].shape[-1], "matryoshka_dims")
        weights = [weight_of[d] for d in ascending]
        loss, per_dim = form(self.loss, columns, guides, ascending, weights)
        self._keep(ascending, per_dim)
        return loss

    def _loop(
        self,
        features: list[dict[str, Tensor]],
        labels: Tensor,
        dims: tuple[int, ...],
        weights: tuple[float, ...],
    ) -> Tensor:
        self._warn(dims)
        every = self.matryoshka_dims, self.matryoshka_weights
        self.matryoshka_dims, self.matryoshka_weights = dims, weights  # of this step
        try:
            with _recorded(self.loss, lambda module, out: out) as parts:
                total = super().forward(features, labels)
        finally:
            self.matryoshka_dims, self.matryoshka_weights = every
        self._keep(dims, parts)
        return total

    def _draw(self, batch: Iterable[Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """This step's dims and weights, the same on all ranks; batch: of tensors on the device."""
        count = len(self.matryoshka_dims)
        if not 0 < self.n_dims_per_step < count:
            return self.matryoshka_dims, self.matryoshka_weights
        drawn = sorted(random.sample(range(count), self.n_dims_per_step))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            device = next(x.device for x in batch if isinstance(x, Tensor))
            shared = torch.tensor(drawn, dtype=torch.int64, device=device)
            dist.broadcast(shared, 0)
            drawn = shared.tolist()
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        return tuple(dims[i] for i in drawn), tuple(weights[i] for i in drawn)

    def _keep(self, dims: Sequence[int], losses: Iterable[Tensor]) -> None:
        self.per_dim = {d: loss.detach() for d, loss in zip(dims, losses, strict=True)}

    def _warn(self, dims: Sequence[int]) -> None:
        if not self._warned:
            self._warned = True
            name = type(self.loss).__name__
            warnings.warn(
                f"{name} has no fused form: it runs once for each of {len(dims)} prefixes",
                stacklevel=3,
            )


class Matryoshka2dLoss(_Logged, losses.Matryoshka2dLoss):
    """MatryoshkaLoss at the last layer and at drawn others: ``sentence_transformers``'
    Matryoshka2dLoss, which is its AdaptiveLayerLoss over the fused MatryoshkaLoss above.

    Args:
        model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step: As for MatryoshkaLoss;
            dims are drawn for each layer anew.
        n_layers_per_step, last_layer_weight, prior_layers_weight, kl_div_weight, kl_temperature,
            layer_weighting: As for the original and its AdaptiveLayerLoss.

    Attributes:
        per_dim: As of MatryoshkaLoss, at the last layer; what a trainer logs.

    Raises:
        ValueError, TypeError: As MatryoshkaLoss; a model that does not begin with a Transformer.

    Source: Li et al., 2D Matryoshka Sentence Embeddings, 2024.
    """

    loss: MatryoshkaLoss

    def __init__(
        self,
        model: Any,
        loss: nn.Module,
        matryoshka_dims: list[int],
        matryoshka_weights: list[float] | None = None,
        n_layers_per_step: int = 1,
        n_dims_per_step: int = 1,
        last_layer_weight: float = 1.0,
        prior_layers_weight: float = 1.0,
        kl_div_weight: float = 1.0,
        kl_temperature: float = 0.3,
        layer_weighting: Any = "uniform",
    ):
        if not isinstance(model[0], Transformer):
            raise ValueError(
                "model: expected one whose first module is a Transformer, whose layers the loss "
                f"compares, got {type(model[0]).__name__}: MatryoshkaLoss needs no layers"
            )
        nested = MatryoshkaLoss(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
        losses.AdaptiveLayerLoss.__init__(
            self,
            model,
            nested,
            n_layers_per_step=n_layers_per_step,
            last_layer_weight=last_layer_weight,
            prior_layers_weight=prior_layers_weight,
            kl_div_weight=kl_div_weight,
            kl_temperature=kl_temperature,
            layer_weighting=layer_weighting,
        )
        self.log_dims(nested.matryoshka_dims)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        with _recorded(self.loss, lambda module, out: module.per_dim) as layers:
            loss = super().forward(sentence_features, labels)
        self.per_dim = layers[0]  # the last layer comes first
        return loss
