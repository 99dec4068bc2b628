"""Adaptive classification: a longer prefix only for the rows that a shorter one is unsure of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mrl_fast.shared.checks import (
    check_dims,
    check_finite,
    check_int,
    check_matrix,
    check_number,
    check_vector,
)
from mrl_fast.shared.dispatch import exporting
from mrl_fast.shared.types import Prediction
from mrl_fast.training.heads import Biases, MRLLinear, Weights, is_fusible, matryoshka_predict

PRICES = 64  # of a dim, that calibration with a tolerance tries


class NestedHead(Protocol):
    """What a cascade reads of a head: an ``MRLLinear``, or anything with the same three."""

    @property
    def weight(self) -> Weights: ...
    @property
    def bias(self) -> Biases: ...
    @property
    def dims(self) -> Sequence[int]: ...


class AdaptivePrediction(NamedTuple):
    """What a cascade predicts.

    Attributes:
        labels: ``[B]`` int64, by the prefix that each row ended at.
        confidence: ``[B]``, its largest softmax.
        dims: ``[B]`` int64, the width of that prefix.
    """

    labels: Tensor
    confidence: Tensor
    dims: Tensor


class AdaptiveCost(NamedTuple):
    """Means over rows.

    Attributes:
        dims: Width of the last prefix: what has to be stored or computed of a vector.
        evaluated_dims: Widths of all prefixes that were evaluated, summed.
        multiply_adds: That ``predict`` makes: classes · evaluated_dims, tied or separate.
        tied_multiply_adds: Classes · dims: what a tied head would need if the sums of a row's
            shorter prefix were kept, ``[B, V]`` of them, and only its new columns added.
    """

    dims: float
    evaluated_dims: float
    multiply_adds: float
    tied_multiply_adds: float


class AdaptiveClassifier(nn.Module):
    """The paper's cascade: each row goes on from ``dims[i]`` to ``dims[i + 1]`` while its largest
    softmax is not above ``thresholds[i]``.

    A longer prefix is computed only for the rows that go on. Each prefix is evaluated alone, of a
    tied head too: with dims that double, at most twice the products of adding its new columns to
    kept sums, and nothing of size ``[B, V]`` is kept. A row's result does not depend on the others
    (on a CPU; float64, which BLAS multiplies, in its last bits).

    An ``MRLLinear`` whose forward is more than the product with its weights (LoRA, hooks, pruning,
    quantization) is called for all prefixes of all rows, and each row's prefix chosen afterwards;
    ``cost`` then counts what plain layers would need.

    Args:
        head: An ``MRLLinear``, or anything with its ``weight``, ``bias`` and ``dims``.

    Attributes:
        thresholds: ``[G − 1]`` buffer, NaN until ``calibrate``. It is saved with the state.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 4.2.
    """

    def __init__(self, head: NestedHead):
        super().__init__()
        if not isinstance(head, MRLLinear):
            for name in ("weight", "bias", "dims"):
                if not hasattr(head, name):
                    got = f"{type(head).__name__} with no {name}"
                    raise TypeError(f"head: expected weight, bias and dims, got {got}")
        self.head = head
        self.dims = check_dims(head.dims)
        self.thresholds: Tensor
        with torch.inference_mode(False):  # calibrate writes to it later
            empty = torch.full(
                (len(self.dims) - 1,), torch.nan, dtype=torch.float32, device=_device(head)
            )
        self.register_buffer("thresholds", empty)

    def calibrate(
        self, x: Tensor, y: Tensor, *, grid: int = 100, tolerance: float | None = None
    ) -> AdaptiveClassifier:
        """Sets the thresholds on a holdout, which must not be the training set.

        The paper's rule: each t_i is the smallest of ``torch.linspace(0, 1, grid)`` at which
        stopping at ``dims[i]`` where the largest softmax is above t_i, and else at ``dims[i + 1]``,
        is right most often. It knows no cost, and none of the prefixes after the next.

        With a tolerance: thresholds of few expected dims that are right on the holdout as often as
        the full width, but for this share of rows. For each of many prices of a dim, t_i is chosen
        from the last to the first, as above, where going on is worth what the rest of the cascade
        then gets (1 where it is right, less the price of its width); of the cascades within the
        tolerance the cheapest is taken.

        Args:
            x: ``[M, D]``, as in ``predict``, at least one row.
            y: ``[M]`` int64, the right classes.
            grid: Thresholds to choose from, at least 2: 0 (no row goes on) to 1 (all do).
            tolerance: None is the paper's rule; else in ``[0, 1]``.

        Returns:
            Itself.

        Raises:
            ValueError, TypeError: An argument of the wrong shape, dtype, device or range.
        """
        check_int(grid, "grid", 2)
        if tolerance is not None:
            check_number(tolerance, "tolerance", high=1.0)
        check_finite(check_matrix(x, "x"), "x")
        if not len(x):
            raise ValueError("x: expected at least one row, got none")
        check_vector(y, "y", len(x), x, dtype=torch.int64)
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= self._classes:
            wrong = low if low < 0 else high
            raise ValueError(f"y: expected classes in [0, {self._classes}), got {wrong}")
        predict = self._stages(x)
        found = [predict(slice(None), g) for g in range(len(self.dims))]
        labels, confidence = zip(*found, strict=True)
        right, confidence = torch.stack(labels) == y, torch.stack(confidence)  # [G, M]
        levels = torch.linspace(0, 1, grid, dtype=torch.float32, device=x.device)
        first = _first_level(confidence[:-1], levels)  # [G - 1, M]
        if tolerance is None:
            gains = right.long().diff(dim=0)
            chosen = [_smallest_best(f, gain, grid) for f, gain in zip(first, gains, strict=True)]
        else:
            chosen = _cheapest(right, first, self.dims, grid, tolerance)
        for g, level in enumerate(chosen):
            self.thresholds[g] = levels[level]
        return self

    def predict(self, x: Tensor) -> AdaptivePrediction:
        """The class of each row, by the shortest prefix that is sure of it.

        Args:
            x: ``[B, D]``, any row stride, as ``matryoshka_predict`` takes it.

        Raises:
            RuntimeError: Before ``calibrate``.
            ValueError, TypeError: x of the wrong shape, dtype or device.
        """
        if exporting():
            raise RuntimeError(
                "AdaptiveClassifier.predict: the data decide which prefixes are computed, which an "
                "export or trace cannot hold; expected its head to be exported instead"
            )
        if self.thresholds.isnan().any():
            raise RuntimeError("thresholds: expected calibrate before predict, got none")
        check_dims(self.dims, check_matrix(x, "x").shape[1])
        predict = self._stages(x)
        labels, confidence = predict(slice(None), 0)
        stages = torch.zeros_like(labels)
        rows = torch.arange(len(labels), dtype=torch.int64, device=labels.device)
        for g, threshold in enumerate(self.thresholds, start=1):
            rows = rows[~(confidence[rows] > threshold)]
            if not len(rows):
                break
            labels[rows], confidence[rows] = predict(rows, g)
            stages[rows] = g
        return AdaptivePrediction(labels, confidence, stages.new_tensor(self.dims)[stages])

    forward = predict

    def cost(self, prediction: AdaptivePrediction) -> AdaptiveCost:
        """What ``predict`` spent on these rows.

        Args:
            prediction: Of at least one row.
        """
        widths = torch.tensor(self.dims, dtype=torch.int64, device=prediction.dims.device)
        if not len(prediction.dims) or not torch.isin(prediction.dims, widths).all():
            raise ValueError(f"prediction: expected rows that ended at one of {list(self.dims)}")
        evaluated = widths.cumsum(0)[torch.searchsorted(widths, prediction.dims)]
        last, spent = prediction.dims.double().mean().item(), evaluated.double().mean().item()
        return AdaptiveCost(last, spent, self._classes * spent, self._classes * last)

    @property
    def _classes(self) -> int:
        if isinstance(self.head, MRLLinear):
            return self.head.num_classes
        weight = self.head.weight
        return len(weight if isinstance(weight, Tensor) else weight[0])

    @torch.no_grad()
    def _stages(self, x: Tensor) -> Callable[[Tensor | slice, int], tuple[Tensor, Tensor]]:
        """Labels and confidences ``[rows]`` of some of x's rows by one prefix."""
        if isinstance(self.head, MRLLinear) and not is_fusible(self.head):
            logits = self.head(x)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            confidence, labels = logits.softmax(-1).max(-1)  # [G, B]
            return lambda rows, g: (labels[g, rows].clone(), confidence[g, rows].clone())

        def predict(rows: Tensor | slice, g: int) -> tuple[Tensor, Tensor]:
            found = self._predict(x[:, : self.dims[g]][rows], g)
            return found.labels[0], found.confidence[0]

        return predict

    def _predict(self, x: Tensor, g: int) -> Prediction:
        """By prefix g alone: ``[1, B]`` each."""
        weight, bias, dim = self.head.weight, self.head.bias, self.dims[g]
        if not isinstance(weight, Tensor):
            weight = weight[g]
            bias = None if bias is None else bias[g]
        return matryoshka_predict(x, weight, (dim,), bias=bias)


def _device(head: NestedHead) -> torch.device:
    if isinstance(head, MRLLinear):  # quantized layers have no parameters
        return next((p.device for p in head.parameters()), torch.device("cpu"))
    return (head.weight if isinstance(head.weight, Tensor) else head.weight[0]).device


def _first_level(confidence: Tensor, levels: Tensor) -> Tensor:
    """The first level that a row's confidence is not above: from it the row goes on. NaN is above
    none."""
    return torch.searchsorted(levels.to(confidence.dtype), confidence.nan_to_num(0.0))


def _smallest_best(first: Tensor, gain: Tensor, grid: int) -> Tensor:
    """The level at which the gains ``[M]`` of the rows that go on sum to the most."""
    return gain.new_zeros(grid).index_add_(0, first, gain).cumsum(0).argmax()  # the first of equals


def _cheapest(
    right: Tensor, first: Tensor, dims: Sequence[int], grid: int, tolerance: float
) -> list[Tensor]:
    """Levels of the cheapest cascade that is right as often as the last prefix, but for a share
    ``tolerance`` of rows; ``right`` ``[G, M]``, ``first`` ``[G - 1, M]``.

    At price 0 no step loses to going on always, so that one cascade is within any tolerance.
    """
    last, rows = len(dims) - 1, right.shape[1]
    worth = right.double()
    widths = torch.tensor(dims, dtype=torch.int64, device=right.device)
    enough = int(right[-1].sum()) - tolerance * rows
    # of a dim: from nothing and a row in all at full width to as much as a right answer
    lowest = -math.log10(rows * dims[-1])
    prices = torch.logspace(lowest, 0, PRICES, dtype=torch.float32, device="cpu").tolist()
    found = []
    for price in (0.0, *prices):
        ahead = worth[-1] - price * dims[-1]  # [M], what the rest of the cascade gets
        end = torch.full_like(right[0], last, dtype=torch.int64)  # the prefix that a row ends at
        chosen: list[Tensor] = []
        for g in reversed(range(last)):
            here = worth[g] - price * dims[g]
            chosen.insert(0, _smallest_best(first[g], ahead - here, grid))
            stops = first[g] > chosen[0]
            ahead, end = here.where(stops, ahead), end.masked_fill(stops, g)
        if int(right.gather(0, end[None]).sum()) >= enough:
            found.append((int(widths[end].sum()), chosen))
    return min(found, key=lambda cascade: cascade[0])[1]
