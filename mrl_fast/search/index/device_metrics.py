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
        unit: Rows count as divided by their norms.
        sum_terms: What a scan makes of a row's sum, of a prefix's factors and of a term that is
            −inf for rows that may not be found.
        code_sum_terms: The same for a scan of codes, of the codes' scales, the term, the factors
            and the scales of the queries' codes.
        largest: The norm that a scan's margin has to hold for, of the rows' largest and smallest.
        code_largest: The same for a scan of codes, of the rows' largest.
    """

    factor: Callable[[Tensor], Tensor] | None
    unit: bool
    sum_terms: Callable[[Tensor | None, Tensor | None], SumTerms]
    code_sum_terms: Callable[[Tensor | None, Tensor | None, Tensor | None, Tensor], SumTerms]
    largest: Callable[[Tensor, Tensor], Tensor]
    code_largest: Callable[[Tensor], Tensor]


def inverse(norms: Tensor) -> Tensor:
    """0 where the norm is."""
    return norms.reciprocal().where(norms > 0, 0.0)


def _ones(largest: Tensor, smallest: Tensor) -> Tensor:
    """Infinite where a norm is too small for the margin to hold."""
    return torch.where(smallest > SAFE_NORM, torch.ones_like(largest), torch.inf)


def _sum(term: Tensor | None, out: Tensor | None) -> Tensor | None:
    return term if out is None else out if term is None else term + out


def _scaled(scale: Tensor | None, out: Tensor | None, *_: Tensor | None) -> SumTerms:
    return SumTerms(scale=scale, term=out)


DEVICE_METRICS = {
    "ip": DeviceMetric(
        factor=None, unit=False,
        sum_terms=_scaled,
        code_sum_terms=_scaled,
        largest=lambda largest, smallest: largest,
        code_largest=lambda largest: 2 * largest,
    ),
    "cosine": DeviceMetric(
        factor=inverse, unit=True,
        sum_terms=_scaled,
        code_sum_terms=_scaled,
        largest=_ones,
        code_largest=lambda largest: 2 * torch.ones_like(largest),
    ),
    "l2": DeviceMetric(  # ⟨q, x⟩ − ‖x‖²/2; by codes in the unit of the query's
        factor=lambda norms: -0.5 * norms * norms, unit=False,
        sum_terms=lambda factor, out: SumTerms(term=_sum(factor, out)),
        code_sum_terms=lambda scale, out, factor, query: SumTerms(
            scale=scale, term=out, outer=factor, factor=query.reciprocal()
        ),
        largest=lambda largest, smallest: largest,
        code_largest=lambda largest: 2 * largest + (2 * largest) * (2 * largest),
    ),
}  # fmt: skip
