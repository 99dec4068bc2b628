"""sentence-transformers' GlobalOrthogonalRegularizationLoss by Gram matrices, over prefixes too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mrl_fast.shared.checks import check_dims
from mrl_fast.shared.types import SpreadOut
from mrl_fast.training.losses.spread_out import matryoshka_spread_out

try:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim, dot_score, pytorch_cos_sim
except ImportError as error:
    raise ImportError(
        "mrl_fast.integrations.sentence_transformers needs sentence-transformers 6 for its losses: "
        "pip install 'mrl-fast[sentence-transformers]'"
    ) from error

NORMALIZED = {cos_sim: True, pytorch_cos_sim: True, dot_score: False}
TERMS = {"gor_mean": SpreadOut(1.0, 0.0), "gor_second_moment": SpreadOut(0.0, 1.0)}


class GlobalOrthogonalRegularizationLoss(losses.GlobalOrthogonalRegularizationLoss):
    """``sentence_transformers``' loss of that name, with no matrix of similarities in memory.

    With ``matryoshka_dims`` each term is the weighted sum of all prefixes' own: beside a
    MatryoshkaLoss of the same dims it spreads every prefix. Without, and with any similarity, it is
    the original.

    Args:
        model, mean_weight, second_moment_weight, aggregation: As for the original.
        similarity_fct: ``cos_sim`` or ``dot_score``; another is computed by the original, and takes
            no dims.
        matryoshka_dims: Prefix widths, in any order, none twice; default: all columns.
        matryoshka_weights: One a dim; default all 1.

    Raises:
        ValueError, TypeError: As the original; dims with another similarity, or as many weights
            missing.
    """

    def __init__(
        self,
        model: Any,
        similarity_fct: Any = cos_sim,
        mean_weight: float | None = 1.0,
        second_moment_weight: float | None = 1.0,
        aggregation: Any = "mean",
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
    ):
        super().__init__(model, similarity_fct, mean_weight, second_moment_weight, aggregation)
        if matryoshka_dims is None:
            if matryoshka_weights is not None:
                raise ValueError("matryoshka_weights: expected None without matryoshka_dims")
            self.matryoshka_dims = self.matryoshka_weights = None
            return
        if similarity_fct not in NORMALIZED:
            raise ValueError(
                "matryoshka_dims: expected None with another similarity_fct than cos_sim and "
                f"dot_score, got {matryoshka_dims}"
            )
        dims = check_dims(matryoshka_dims, name="matryoshka_dims", ascending=False)
        weights = [1.0] * len(dims) if matryoshka_weights is None else [*matryoshka_weights]
        if len(weights) != len(dims):
            raise ValueError(
                f"matryoshka_weights: expected {len(dims)}, one a dim, got {len(weights)}"
            )
        ordered = sorted(zip(dims, weights, strict=True))
        self.matryoshka_dims = tuple(d for d, _ in ordered)
        self.matryoshka_weights = tuple(weight for _, weight in ordered)

    def compute_loss_from_embeddings(self, embeddings: Any, labels: Any = None) -> dict[str, Any]:
        if self.similarity_fct not in NORMALIZED:
            return super().compute_loss_from_embeddings(embeddings, labels)
        dims = self.matryoshka_dims or (embeddings[0].shape[1],)
        weights = dict(zip(TERMS, (self.mean_weight, self.second_moment_weight), strict=True))
        return {
            name: weight
            * matryoshka_spread_out(
                embeddings,
                dims,
                weights=TERMS[name]._replace(aggregation=self.aggregation),
                dim_weights=self.matryoshka_weights,
                normalize=NORMALIZED[self.similarity_fct],
            ).loss
            for name, weight in weights.items()
            if weight
        }

    def get_config_dict(self) -> dict[str, Any]:
        own = dict(matryoshka_dims=self.matryoshka_dims, matryoshka_weights=self.matryoshka_weights)
        return super().get_config_dict() | (own if self.matryoshka_dims else {})
