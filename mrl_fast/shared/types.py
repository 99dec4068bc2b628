"""What the functional ops return."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class NestedLoss(NamedTuple):
    """A loss over G nested prefixes.

    Attributes:
        loss: ``Σ_g dim_weights[g] · ℓ_g``, differentiable; scalar, or ``[B]`` with
            ``reduction="none"``. fp32.
        per_dim: Detached ``ℓ_g``: ``[G]``, or ``[G, B]`` with ``reduction="none"``. fp32.
    """

    loss: Tensor
    per_dim: Tensor


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


Stage = tuple[int, ...]  # (dim, keep) or (dim, bits, keep)


class Tuned(NamedTuple):
    """The stages that ``tune`` chose for up to k neighbours, None for exact search; and how many
    vectors the index held."""

    stages: list[Stage] | None
    k: int
    rows: int


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


class ExactResult(SearchResult):
    """The k best rows of each query, certified.

    Attributes:
        rows_touched: ``[B]`` int64, rows whose columns beyond the prefix were read; all of them
            where bounds would not have paid.
    """

    rows_touched: Any


class ApproxResult(SearchResult):
    """The best rows of each query but for those that share a bucket with a better one.

    Attributes:
        expected_recall: The share of the k best that is found on average, were the rows shuffled.
    """

    expected_recall: float
