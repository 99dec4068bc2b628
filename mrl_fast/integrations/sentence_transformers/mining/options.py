"""Which of the candidates become negatives, and what is made of them: options, checked."""

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import Any, NamedTuple

from mrl_fast.shared.checks import check_choice, check_int

SAMPLING = ("random", "top")
FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")


class Limits(NamedTuple):
    """What leaves a candidate out by its score; None leaves out nothing."""

    absolute_margin: float | None
    relative_margin: float | None
    max_score: float | None
    min_score: float | None

    @property
    def given(self) -> bool:
        return any(limit is not None for limit in self)

    @property
    def of_the_best(self) -> bool:
        """Those that leave out the best candidates."""
        return any(limit is not None for limit in self[:3])


class Window(NamedTuple):
    """Ranks in ``[first, last)`` of a query's candidates that are no positives of it."""

    first: int
    last: int
    positives: int  # rows of one query in the data set, at most

    @property
    def searched(self) -> int:
        """Candidates a query, with room for its positives."""
        return self.last + self.positives


class Choice(NamedTuple):
    """How negatives are chosen from a window."""

    number: int
    sampling: str
    include_positives: bool


class Output(NamedTuple):
    format: str
    scores: bool


def checked_limits(limits: Limits) -> Limits:
    for name, limit in zip(Limits._fields, limits, strict=True):
        if limit is None:
            continue
        if isinstance(limit, bool) or not isinstance(limit, Real):
            raise TypeError(f"{name}: expected a number or None, got {type(limit).__name__}")
        if math.isnan(limit):
            raise ValueError(f"{name}: expected a number or None, got {limit}")
    return limits


def checked_choice(count: Any, sampling: Any, include_positives: Any) -> Choice:
    return Choice(
        check_int(count, "num_negatives", 1),
        check_choice(sampling, "sampling_strategy", SAMPLING),
        bool(include_positives),
    )


def checked_output(output_format: Any, output_scores: Any, include_positives: bool) -> Output:
    """With positives among the negatives only an n-tuple keeps their order."""
    if output_format == "n-tuple-scores":
        new = "output_format='n-tuple', output_scores=True"
        deprecated("output_format='n-tuple-scores'", new, calls=1)
        output_format, output_scores = "n-tuple", True
    check_choice(output_format, "output_format", FORMATS)
    if include_positives and output_format != "n-tuple":
        warnings.warn(
            f"output_format: {output_format!r} is taken as 'n-tuple' with include_positives=True",
            stacklevel=3,
        )
        output_format = "n-tuple"
    return Output(output_format, bool(output_scores))


def deprecated(old: str, new: str, calls: int = 0) -> None:
    """``calls``: between this one and the public function."""
    warnings.warn(f"{old} is deprecated: pass {new}", FutureWarning, stacklevel=3 + calls)


def checked_window(first: Any, last: Any, count: int, positives: int, many: bool) -> Window:
    """``many``: limits may leave out the best candidates, so that more are looked at by default."""
    first = check_int(first, "range_min", 0)
    if last is None:
        last = first + count * (10 if many else 1) + positives
    last = check_int(last, "range_max", 1)
    if first >= last:
        raise ValueError(f"range_min: expected less than range_max={last}, got {first}")
    if count > last - first:
        raise ValueError(
            f"num_negatives: expected at most the {last - first} candidates of ranks {first} to "
            f"{last} (range_min, range_max), got {count}"
        )
    return Window(first, last, positives)
