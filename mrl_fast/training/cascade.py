"""Adaptive classification: a longer prefix only for the rows that a shorter one is unsure of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from mrl_fast.shared.checks import (
    check_dims,
    check_finite,
    check_int,
    check_number,
    check_vector,
)
from mrl_fast.shared.dispatch import exporting
from mrl_fast.training.heads import (
    Biases,
    MRLLinear,
    Weights,
    head_of_linears,
    is_fusible,
    matryoshka_predict,
)
from mrl_fast.training.layers import check_width
from mrl_fast.training.thresholds import (
    AdaptivePrediction,
    AdaptiveReport,
    cheapest,
    first_level,
    first_sure,
    report_on,
    smallest_best,
)

LOSS = 0.01  # share of rows that thresholds may lose before calibration warns


class NestedHead(Protocol):
    """What a cascade reads of a head: an ``MRLLinear``, or anything with the same three."""

    @property
    def weight(self) -> Weights: ...
    @property
    def bias(self) -> Biases: ...
    @property
    def dims(self) -> Sequence[int]: ...


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
    kept sums, and nothing of size ``[B, V]`` is kept. On a CPU a row's result does not depend
    on the others, except for the last bits of float64, which BLAS multiplies.

    An ``MRLLinear`` whose forward is more than the product with its weights (LoRA, hooks, pruning,
    quantization) is called for all prefixes of all rows, and each row's prefix chosen afterwards;
    ``cost`` then counts what plain layers would need. So does an export or trace, which returns
    the plain tuple ``(labels, confidence, dims)`` and needs no mrl_fast where it runs.

    Args:
        head: An ``MRLLinear``, RAIVNLab/MRL's layer, a sequence of ``nn.Linear`` (one a prefix,
            ascending ``in_features``; shared, not copied), or anything with an ``MRLLinear``'s
            ``weight``, ``bias`` and ``dims``.

    Attributes:
        head: The head; of a layer of RAIVNLab/MRL or a sequence, an ``MRLLinear`` of its layers.
        thresholds: ``[G − 1]`` fp32 buffer, NaN until ``calibrate`` or ``set_thresholds`` (an
            export made before sends every row to the full width). Saved with the state. What is
            assigned is checked as by ``set_thresholds``.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 4.2.
    """

    def __init__(self, head: NestedHead | nn.Module | Sequence[Any]):
        super().__init__()
        if isinstance(head, list | tuple | nn.ModuleList):
            head = head_of_linears(head, "head")
        elif hasattr(head, "nesting_list"):
            head = MRLLinear.from_raivn(head)
        elif not isinstance(head, MRLLinear):
            for name in ("weight", "bias", "dims"):
                if not hasattr(head, name):
                    raise TypeError(
                        "head: expected an MRLLinear, RAIVNLab/MRL's layer, a sequence of "
                        "nn.Linear, or weight, bias and dims, got "
                        f"{type(head).__name__} with no {name}"
                    )
        head = cast(NestedHead, head)
        self.head = head
        self.dims = check_dims(head.dims)
        self.thresholds: Tensor
        with torch.inference_mode(False):  # calibrate writes to it later
            empty = torch.full(
                (len(self.dims) - 1,), torch.nan, dtype=torch.float32, device=_device(head)
            )
        self.register_buffer("thresholds", empty)
        self._report: AdaptiveReport | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "thresholds" and name in self._buffers and not self._is_state(value):
            numbers = self._checked(value)
            device = (value if isinstance(value, Tensor) else self.thresholds).device
            with torch.inference_mode(False):  # as in the constructor
                value = torch.tensor(numbers, dtype=torch.float32, device=device)
        super().__setattr__(name, value)

    def _is_state(self, value: Any) -> bool:
        """Whether these are thresholds that were never set, or have no values to check: what
        ``load_state_dict(assign=True)`` may assign."""
        alike = isinstance(value, Tensor) and value.shape == self.thresholds.shape
        return alike and (value.is_meta or bool(value.isnan().all()))

    @property
    def report(self) -> AdaptiveReport | None:
        """What ``calibrate`` found on its holdout, with the weights that the head had; None before,
        and where the thresholds are others by now. Once the weights change, by training or
        ``load_state_dict``, it no longer holds: calibrate again. It is pickled and copied, and no
        part of the state."""
        found = self._report
        return found if found and found.thresholds == tuple(self.thresholds.tolist()) else None

    def set_thresholds(self, thresholds: Sequence[float] | Tensor) -> AdaptiveClassifier:
        """Sets the thresholds by hand, instead of ``calibrate``.

        Args:
            thresholds: One for each dim but the last, in ``[0, 1]``: a row ends at ``dims[i]``
                where its largest softmax is above ``thresholds[i]``. At 1 no row does.

        Returns:
            Itself.

        Raises:
            ValueError, TypeError: Another number of them, or one that is not in ``[0, 1]``.
        """
        numbers = self._checked(thresholds)
        self.thresholds.copy_(torch.tensor(numbers, dtype=torch.float32, device="cpu"))
        return self

    def _checked(self, thresholds: Any) -> list[float]:
        count = len(self.dims) - 1
        expected = f"thresholds: expected {count} numbers, one for each dim but the last"
        if getattr(thresholds, "ndim", 1) > 1:
            raise ValueError(f"{expected}, got shape {list(thresholds.shape)}")
        values = thresholds.tolist() if hasattr(thresholds, "tolist") else thresholds
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{expected}, got {type(thresholds).__name__}")
        if len(values) != count:
            raise ValueError(f"{expected}, got {len(values)}")
        return [check_number(t, f"thresholds[{i}]", high=1.0) for i, t in enumerate(values)]

    def calibrate(
        self, x: Tensor, y: Tensor, *, grid: int = 100, tolerance: float | None = None
    ) -> AdaptiveClassifier:
        """Sets the thresholds on a holdout, which must not be the training set.

        The paper's rule: each t_i is the smallest of ``torch.linspace(0, 1, grid)`` at which
        stopping at ``dims[i]`` where the largest softmax is above t_i, and else at ``dims[i + 1]``,
        is right most often. It weighs no cost and looks no further than the next prefix.

        With a tolerance: thresholds of few expected dims that are right on the holdout as often as
        the full width, but for this share of rows. For each of many prices of a dim, t_i is chosen
        from the last to the first, as above, where going on is worth what the rest of the cascade
        then gets (1 where it is right, less the price of its width); of the cascades within the
        tolerance the cheapest is taken.

        ``print(classifier.report)`` tells what they do on the holdout. Other rows lose more or
        less: ``report.standard_error`` says how far a holdout of this size tells. The paper's
        thresholds of a head that is not trained to the end may be right far less often than its
        full width: where it is more than a point, a ``UserWarning`` says so.

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
        check_width(x, self.dims)
        check_finite(x.detach(), "x")
        if not len(x):
            raise ValueError("x: expected at least one row, got none")
        check_vector(y, "y", len(x), x, dtype=torch.int64)
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= self._classes:
            wrong = low if low < 0 else high
            raise ValueError(f"y: expected classes in [0, {self._classes}), got {wrong}")
        with torch.no_grad():
            labels, confidence = self._every_prefix(x)
        right = labels == y  # [G, M]
        levels = torch.linspace(0, 1, grid, dtype=torch.float32, device=x.device)
        first = first_level(confidence[:-1], levels)  # [G - 1, M]
        if tolerance is None:
            gains = right.long().diff(dim=0)
            chosen = [smallest_best(f, gain, grid) for f, gain in zip(first, gains, strict=True)]
        else:
            chosen = cheapest(right, first, self.dims, grid, tolerance)
        for g, level in enumerate(chosen):
            self.thresholds[g] = levels[level]
        self._report = report = report_on(right, confidence, self.thresholds, self.dims)
        if tolerance is None and report.accuracy < report.full_accuracy - LOSS:
            warnings.warn(
                f"AdaptiveClassifier.calibrate: by the paper's thresholds {report.accuracy:.3f} of "
                f"the holdout is right, where the full width has {report.full_accuracy:.3f}; "
                f"calibrate(x, y, tolerance={LOSS}) keeps this loss on the holdout within "
                f"{LOSS} (on other rows it may be more, the more so the smaller the holdout), and "
                "print(classifier.report) shows each dim",
                stacklevel=2,
            )
        return self

    def predict(self, x: Tensor) -> AdaptivePrediction:
        """The class of each row, by the shortest prefix that is sure of it.

        Args:
            x: ``[B, D]``, any row stride, as ``matryoshka_predict`` takes it; columns after
                ``dims[-1]`` do not count.

        Returns:
            AdaptivePrediction: ``labels`` ``[B]`` int64; ``confidence`` ``[B]``, the largest
                softmax (fp32; fp64 for fp64); ``dims`` ``[B]`` int64, the width each row ended at.

        Raises:
            RuntimeError: Before ``calibrate`` or ``set_thresholds``.
            ValueError, TypeError: x of the wrong shape, dtype or device.
        """
        if exporting():
            chosen = first_sure(*self._every_prefix(x), self.thresholds, self.dims)
            return cast(AdaptivePrediction, tuple(chosen))  # a type that is known elsewhere
        if self.thresholds.isnan().any():
            raise RuntimeError(
                "thresholds: none are set; call calibrate or set_thresholds before predict"
            )
        check_width(x, self.dims)
        if self._is_called:
            with torch.no_grad():
                found = self._every_prefix(x)
            return first_sure(*found, self.thresholds, self.dims)
        labels, confidence = self._predict(x, 0)
        stages = torch.zeros_like(labels)
        rows = torch.arange(len(labels), dtype=torch.int64, device=labels.device)
        for g, threshold in enumerate(self.thresholds, start=1):
            rows = rows[~(confidence[rows] > threshold)]
            if not len(rows):
                break
            labels[rows], confidence[rows] = self._predict(x, g, rows)
            stages[rows] = g
        return AdaptivePrediction(labels, confidence, stages.new_tensor(self.dims)[stages])

    forward = predict

    def cost(self, prediction: AdaptivePrediction) -> AdaptiveCost:
        """What ``predict`` spent on these rows.

        Args:
            prediction: What ``predict`` returned, of at least one row.

        Returns:
            AdaptiveCost: Four numbers, each a mean over the rows.

        Raises:
            ValueError, TypeError: Not such a prediction, or of no row.
        """
        if not isinstance(prediction, AdaptivePrediction):
            got = type(prediction).__name__
            raise TypeError(f"prediction: expected what predict returned, got {got}")
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

    @property
    def _is_called(self) -> bool:
        """Whether the head's weights are not all that its call uses."""
        return isinstance(self.head, MRLLinear) and not is_fusible(self.head)

    def _every_prefix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and confidences ``[G, B]`` of all rows by all prefixes."""
        if self._is_called:
            logits = cast(MRLLinear, self.head)(x).detach()
            logits = logits if logits.dtype == torch.float64 else logits.float()
            confidence, labels = logits.softmax(-1).max(-1)
            return labels, confidence
        if exporting():
            return matryoshka_predict(x, self.head.weight, self.dims, bias=self.head.bias)
        found = [self._predict(x, g) for g in range(len(self.dims))]
        labels, confidence = zip(*found, strict=True)
        return torch.stack(labels), torch.stack(confidence)

    def _predict(
        self, x: Tensor, g: int, rows: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Labels and confidences ``[rows]`` of some of x's rows by prefix g alone."""
        weight, bias, dim = self.head.weight, self.head.bias, self.dims[g]
        if not isinstance(weight, Tensor):
            weight = weight[g]
            bias = None if bias is None else bias[g]
        found = matryoshka_predict(x[:, :dim][rows], weight, (dim,), bias=bias)
        return found.labels[0], found.confidence[0]


def _device(head: NestedHead) -> torch.device:
    if isinstance(head, MRLLinear):  # quantized layers have no parameters
        return next((p.device for p in head.parameters()), torch.device("cpu"))
    return (head.weight if isinstance(head.weight, Tensor) else head.weight[0]).device
