"""Thresholds of a cascade: chosen on a holdout, applied to confidences, reported on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PRICES = 64  # of a dim, that calibration with a tolerance tries


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


@dataclass(frozen=True)
class AdaptiveReport:
    """What a cascade does on the holdout that it was calibrated on; ``print`` it for a table.

    Attributes:
        dims: G prefix widths.
        thresholds: G − 1 of them.
        shares: Of rows, those that end at each dim.
        accuracies: Of the rows that end at each dim; NaN where there are none.
        prefix_accuracies: Of each prefix on all rows, by itself.
        rows: Of the holdout.
        accuracy: Of the cascade on all rows.
        expected_dims: Mean width of the prefix that a row ends at.
        standard_error: Of ``accuracy − full_accuracy``, as an estimate of that difference on rows
            like these: √(variance of a row's difference / rows). It does not count that the
            thresholds were chosen on these rows. 0 where no row differs, which alone leaves a loss
            of up to 3 / rows (at 95 %).
    """

    dims: tuple[int, ...]
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    accuracies: tuple[float, ...]
    prefix_accuracies: tuple[float, ...]
    rows: int
    accuracy: float
    expected_dims: float
    standard_error: float

    @property
    def full_accuracy(self) -> float:
        """Of the full width on all rows."""
        return self.prefix_accuracies[-1]

    def __str__(self) -> str:
        lines = ["   dim  threshold  rows ended  accuracy  if all did"]
        columns = self.dims, self.shares, self.accuracies, self.prefix_accuracies
        for g, (dim, share, accuracy, alone) in enumerate(zip(*columns, strict=True)):
            threshold = f"{self.thresholds[g]:.4f}" if g < len(self.thresholds) else ""
            ended = f"{accuracy:.4f}" if share else "–"
            lines.append(f"{dim:6} {threshold:>10} {share:11.2%} {ended:>9} {alone:11.4f}")
        total = f"accuracy {self.accuracy:.4f} at {self.expected_dims:.1f} dims a row"
        full = f"{self.full_accuracy:.4f} at {self.dims[-1]}"
        error = f"standard error of the difference: {self.standard_error:.4f}"
        return "\n".join([*lines, f"{self.rows} rows: {total}; the full width: {full}; {error}"])


def first_sure(
    labels: Tensor, confidence: Tensor, thresholds: Tensor, dims: Sequence[int]
) -> AdaptivePrediction:
    """Each row's first prefix that is sure of it, else the last; labels and confidence are of every
    prefix, ``[G, B]``. No data decide what is computed, so that an export can hold it."""
    last = torch.full_like(labels[-1], dims[-1], dtype=torch.int64)
    chosen = labels[-1], confidence[-1], last
    for g in reversed(range(len(dims) - 1)):
        sure = confidence[g] > thresholds[g]
        here = labels[g], confidence[g], torch.full_like(last, dims[g])
        chosen = tuple(torch.where(sure, a, b) for a, b in zip(here, chosen, strict=True))
    return AdaptivePrediction(*chosen)


def report_on(
    right: Tensor, confidence: Tensor, thresholds: Tensor, dims: Sequence[int]
) -> AdaptiveReport:
    """Of a holdout, by whether each prefix is right, and how sure: ``[G, M]``."""
    end = first_sure(right, confidence, thresholds, dims)
    widths = torch.tensor(dims, dtype=torch.int64, device=right.device)
    ended = end.dims == widths[:, None]  # [G, M]
    hits = (ended & end.labels).sum(1).double()
    differences = end.labels.double() - right[-1].double()  # [M], each −1, 0 or 1
    return AdaptiveReport(
        dims=tuple(dims),
        thresholds=tuple(thresholds.tolist()),
        shares=tuple(ended.double().mean(1).tolist()),
        accuracies=tuple((hits / ended.sum(1)).tolist()),
        prefix_accuracies=tuple(right.double().mean(1).tolist()),
        rows=right.shape[1],
        accuracy=end.labels.double().mean().item(),
        expected_dims=end.dims.double().mean().item(),
        standard_error=differences.std(correction=0).item() / math.sqrt(right.shape[1]),
    )


def first_level(confidence: Tensor, levels: Tensor) -> Tensor:
    """The first level that a row's confidence is not above: from it the row goes on. NaN is above
    none."""
    return torch.searchsorted(levels.to(confidence.dtype), confidence.nan_to_num(0.0))


def smallest_best(first: Tensor, gain: Tensor, grid: int) -> Tensor:
    """The level at which the gains ``[M]`` of the rows that go on sum to the most."""
    return gain.new_zeros(grid).index_add_(0, first, gain).cumsum(0).argmax()  # the first of equals


def cheapest(
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
            chosen.insert(0, smallest_best(first[g], ahead - here, grid))
            stops = first[g] > chosen[0]
            ahead, end = here.where(stops, ahead), end.masked_fill(stops, g)
        if int(right.gather(0, end[None]).sum()) >= enough:
            found.append((int(widths[end].sum()), chosen))
    return min(found, key=lambda cascade: cascade[0])[1]
