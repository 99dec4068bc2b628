"""What a metric keeps of each row on a device, and what a scan's score is made of: one row of the
table each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mrl_fast.kernels.search.metrics import SAFE_NORM, SumTerms


class DeviceMetric(NamedTuple):
    """One metric's terms.

    Attributes:
        factor: What is kept of a prefix, of the prefix's norms ``[n]``; None: nothing.
        unit: Rows count as divided by their norms, which the factor does. Else it is added.
        sum_terms: What a scan makes of a row's sum, of a prefix's factors and of a term that is
            −inf for rows that may not be found.
        largest: The norm that a scan's margin has to hold for, of the rows' largest and smallest.
    """

    factor: Callable[[Tensor], Tensor] | None
    unit: bool
    sum_terms: Callable[[Tensor | None, Tensor | None], SumTerms]
    largest: Callable[[Tensor, Tensor], Tensor]

    @property
    def added(self) -> Callable[[Tensor], Tensor] | None:
        """The factor, where it is added."""
        return None if self.unit else self.factor


def inverse(norms: Tensor) -> Tensor:
    """0 where the norm is."""
    return norms.reciprocal().where(norms > 0, 0.0)


def _ones(largest: Tensor, smallest: Tensor) -> Tensor:
    """Infinite where a norm is too small for the margin to hold."""
    return torch.where(smallest > SAFE_NORM, torch.ones_like(largest), torch.inf)


def _sum(term: Tensor | None, out: Tensor | None) -> Tensor | None:
    return term if out is None else out if term is None else term + out


def _scaled(scale: Tensor | None, out: Tensor | None) -> SumTerms:
    return SumTerms(scale=scale, term=out)


DEVICE_METRICS = {
    "ip": DeviceMetric(
        factor=None, unit=False,
        sum_terms=_scaled,
        largest=lambda largest, smallest: largest,
    ),
    "cosine": DeviceMetric(
        factor=inverse, unit=True,
        sum_terms=_scaled,
        largest=_ones,
    ),
    "l2": DeviceMetric(  # ⟨q, x⟩ − ‖x‖²/2
        factor=lambda norms: -0.5 * norms * norms, unit=False,
        sum_terms=lambda factor, out: SumTerms(term=_sum(factor, out)),
        largest=lambda largest, smallest: largest,
    ),
}  # fmt: skip
