"""What the functional ops return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class NestedLoss(NamedTuple):
    """A loss over G nested prefixes.

    Attributes:
        loss: ``Σ_g dim_weights[g] · ℓ_g``, differentiable; scalar, or ``[B]`` with
            ``reduction="none"``. fp32.
        per_dim: Detached ``ℓ_g`` by position, in the order of dims, which ascend: ``[G]``, or
            ``[G, B]`` with ``reduction="none"``. fp32. Losses as modules keep the same tensor.
    """

    loss: Tensor
    per_dim: Tensor


class SpreadOut(NamedTuple):
    """Weights of the spread-out regulariser's terms, and how columns of embeddings are combined.

    Attributes:
        mean: Of the squared mean similarity, >= 0.
        second_moment: Of what the mean squared similarity exceeds 1/d by, >= 0.
        aggregation: ``"mean"`` or ``"sum"`` over columns.
    """

    mean: float = 1.0
    second_moment: float = 1.0
    aggregation: str = "mean"


class Prediction(NamedTuple):
    """What every nested prefix predicts.

    Attributes:
        labels: ``[G, B]`` int64, the first best class.
        confidence: ``[G, B]``, its softmax probability.
    """

    labels: Tensor
    confidence: Tensor


class SearchResult(NamedTuple):
    """The k best rows of each query, best first; equal scores in the order of rows.

    Attributes:
        scores: ``[B, k]`` fp32, larger is better (l2: −squared distance); −inf where there is no
            neighbour.
        ids: ``[B, k]`` int64; −1 where there is no neighbour.
    """

    scores: Any  # a tensor or an array: the kind of the queries
    ids: Any


Stage = tuple[Any, ...]  # (dim, keep), (dim, bits, keep) or ("graph", beam, keep)


def shown(stages: Sequence[Stage] | None) -> str:
    return " ".join(":".join(map(str, stage)) for stage in stages) if stages else "exact search"


class Tuned(NamedTuple):
    """What ``tune`` chose; ``str`` is a sentence.

    Attributes:
        stages: None is exact search.
        k: Plain searches for at most so many neighbours use them.
        rows: Vectors that the index held then.
        recall: Of the k best, that was asked for; None in a folder that was saved without it.
        in_force: Whether searches use them: until more than a tenth of the vectors were added.
    """

    stages: list[Stage] | None
    k: int
    rows: int
    recall: float | None = None
    in_force: bool = True

    @property
    def fields(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {name: getattr(self, name) for name in ("stages", "k", "rows", "recall")}

    def __str__(self) -> str:
        at = "" if self.recall is None else f" at recall {self.recall:g}"
        lapsed = "; lapsed, as more than a tenth were added since: searches are exact"
        return (
            f"{shown(self.stages)} for k up to {self.k}{at}, tuned with {self.rows:,} vectors"
            + ("" if self.in_force or not self.stages else lapsed)
        )


class RangeResult(NamedTuple):
    """The rows that reach a threshold, each query's best first; equal scores in the order of rows.

    Attributes:
        lims: ``[B + 1]`` int64; query b's are ``scores[lims[b]:lims[b + 1]]``.
        scores: ``[lims[-1]]`` fp32.
        ids: ``[lims[-1]]`` int64.
    """

    lims: Any  # tensors or arrays: the kind of the queries
    scores: Any
    ids: Any


class StagedResult(SearchResult):
    """The k best rows of each query that a search by stages found.

    Attributes:
        stages: By which, as ``MatryoshkaIndex.search`` takes them.
    """

    stages: list[Stage]


class ExactResult(SearchResult):
    """The k best rows of each query, certified.

    Attributes:
        stages: None: by no stages.
        rows_touched: ``[B]`` int64, rows whose columns beyond the prefix were read; all of them
            where bounds would not have paid.
    """

    stages: None = None
    rows_touched: Any


class ApproxResult(SearchResult):
    """The best rows of each query but for those that share a bucket with a better one.

    Attributes:
        expected_recall: The share of the k best that is found on average, were the rows shuffled.
    """

    expected_recall: float
