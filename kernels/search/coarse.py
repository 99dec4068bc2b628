"""Forms of the rows that are cheaper to scan than the rows, and what bounds a score by them.

A prefix of the columns leaves a suffix: ⟨q, x⟩ <= S + ‖q_tail‖·‖x_tail‖ (Cauchy and Schwarz). Codes
of eight bits, q = q̂ + e_q and x = x̂ + e_x, leave two errors:
⟨q, x⟩ = ⟨q̂, x̂⟩ + ⟨q̂, e_x⟩ + ⟨e_q, x⟩ <= S + ‖q̂‖·‖e_x‖ + ‖e_q‖·‖x‖. Each form says how its rows are
ranked, for a shortlist, and how their scores are bounded.
"""

from typing import NamedTuple

import torch
from mrl_fast.kernels.search.metrics import (
    LEAST_NORM,
    LOST,
    ROUNDED,
    Margin,
    SumTerms,
    row_norms,
    row_terms,
    upper,
)
from mrl_fast.kernels.search.plan import KnownRows
from mrl_fast.kernels.search.queries import NormBound, ScanQueries, scan_queries
from torch import Tensor

LEAST_SCALE = 2.0**-100  # of codes
ALIGNMENT = 16  # columns that are read at a time
# Codes' sums are exact. At most eight roundings follow, of numbers up to 7·‖q‖·‖x‖, as ‖q̂‖ <= 2·‖q‖
# and ‖x̂‖ <= 2·‖x‖; norms are rounded by themselves.
CODE_ERROR = 56 * 2.0**-24 + 4 * ROUNDED


class Int8(NamedTuple):
    """Vectors in eight bits: about ``scale · codes``.

    Attributes:
        codes: ``[n, columns]`` int8; columns beyond the vectors' are 0.
        scale: ``[n]`` fp32.
    """

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Int8":
        """Of ``x [n, D]``, to the nearest; a code of 127 is the largest column."""
        x = x.float()
        scale = x.abs().amax(dim=1, keepdim=True) / 127
        scale = torch.where(scale > LEAST_SCALE, scale, 1.0)  # of zeros, or of as good as nothing
        codes, more = (x / scale).round().to(torch.int8), -x.shape[1] % ALIGNMENT
        return cls(torch.nn.functional.pad(codes, (0, more)) if more else codes, scale[:, 0])

    def lacking(self, x: Tensor) -> Tensor:
        """``[n]`` fp32, norms of what the codes lack of ``x [n, D]``, rounded up."""
        x, D = x.float(), x.shape[1]
        left = row_norms(x - self.codes[:, :D] * self.scale[:, None])
        # Where a code is not 0 its column is at least half the scale: a product and a difference
        # are off by less than 2^-22 of the column.
        return upper(left + 2.0**-22 * row_norms(x), D)


class Bounds(NamedTuple):
    """What a scan needs so that no row's score is above its own, but for ``error``.

    Attributes:
        q: The queries as the scan reads them.
        terms: What makes a bound of a sum.
        error: ``[B]`` fp32, in the metric's unit: how much too low a bound may be.
        unit: ``[B]`` fp32, what a scan's score is in, in the metric's; None: 1.
    """

    q: ScanQueries
    terms: SumTerms
    error: Tensor
    unit: Tensor | None = None


class Prefix(NamedTuple):
    """The rows' first columns.

    Attributes:
        x: ``[N, dim]``.
        shortlist: Known rows of these columns.
        bounds: Known rows at full width; ``outer`` is the suffix's norm, rounded up.
    """

    x: Tensor
    shortlist: KnownRows
    bounds: KnownRows

    @property
    def norm(self) -> Tensor | None:
        return self.bounds.norm

    def ranking(self, q: Tensor, metric: str) -> tuple[Tensor, str, KnownRows]:
        """Queries, metric and known rows of a search of ``x`` for a shortlist."""
        return q[:, : self.x.shape[1]], metric, self.shortlist

    def bounding(self, q: Tensor, metric: str) -> Bounds:
        """For queries at full width, ``[B, D]``."""
        dim, (terms, norm) = self.x.shape[1], self.bounds[:2]
        coarse = scan_queries(q[:, :dim], self.x, metric)
        assert terms is not None and norm is not None
        norms = torch.maximum(upper(row_norms(q), q.shape[1]), coarse.upper_norms())
        error = coarse.margin.error(norms, norm)  # at full width, as the bounds' rows
        if coarse.errors is not None:
            error = error + coarse.errors * norm
        if dim < q.shape[1]:
            terms = terms._replace(factor=upper(row_norms(q[:, dim:]), q.shape[1]))
        return Bounds(coarse, terms, error)


class Codes(NamedTuple):
    """Codes of the rows, or of a prefix of them by which they can be ranked only.

    Attributes:
        x: ``[N, dim]`` int8, of which a row is about ``scale`` times; divided by the row's norm, as
            all below, where the metric counts rows as unit vectors.
        scale: ``[N]`` fp32.
        norm: ``[1]`` fp32: no row's is larger. Infinite: no bound holds.
        linear: ``[N]`` fp32, the metric's term of a row; None: it has none.
        outers: ``[2, N]`` fp32, norms of what the codes lack and of the rows, rounded up; with
            ``linear``, the last, ``[3, N]``. None: rows are not bounded.
        term: ``[N]`` fp32, −inf for rows that may not be found, else 0; None: all may.
        allowed: ``[N]`` uint8, 0 for these.
    """

    x: Tensor
    scale: Tensor
    norm: Tensor
    linear: Tensor | None = None
    outers: Tensor | None = None
    term: Tensor | None = None
    allowed: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, metric: str) -> "Codes":
        """Of all columns of the rows ``x [N, D]``."""
        coded, (terms, largest) = Int8.of(x), row_terms(x, metric)
        codes, scale = coded
        outers = torch.stack([coded.lacking(x), upper(row_norms(x), x.shape[1])])
        if terms.scale is not None:
            scale, outers = scale * terms.scale, outers * terms.scale * (1 + ROUNDED) ** 2
        if terms.term is not None:
            outers = torch.cat([outers, terms.term[None]])
        return cls(codes, scale, largest, terms.term, outers)

    def ranking(self, q: Tensor, metric: str) -> tuple[Tensor, str, KnownRows]:
        """Queries in eight bits, and what turns sums of products of codes into scores in the unit
        of the query's scale, as only their order counts."""
        codes, scale = Int8.of(q)
        terms = SumTerms(self.scale, self.term)
        # The margin is a shortlist's: no sum times its scale is larger than 127 · 127 · dim · norm.
        norm = 2 * self.norm
        if self.linear is not None:
            terms = terms._replace(outer=self.linear, factor=scale.reciprocal())
            norm = norm + norm * norm
        codes = codes[:, : self.x.shape[1]]
        return codes, "ip", KnownRows(terms, norm, self.allowed, linear=True)

    def bounding(self, q: Tensor, metric: str) -> Bounds:
        """For queries at full width, ``[B, D]``; scores are in the unit of the query's scale."""
        assert self.outers is not None
        coded, dim = Int8.of(q), q.shape[1]
        codes, scale = coded
        margin = Margin(CODE_ERROR, dim * torch.finfo(torch.float32).tiny, d=CODE_ERROR)
        if metric == "l2":
            margin = margin._replace(c=CODE_ERROR, d=0.0, e=CODE_ERROR)
        bound = NormBound(LEAST_NORM[metric], dim * LOST, 1 + ROUNDED)
        coarse = ScanQueries(codes, None, row_norms(q), None, margin, bound)
        lengths = upper(row_norms(codes), dim)
        left = coded.lacking(q) / scale * (1 + ROUNDED)
        factor = torch.stack([lengths, left, scale.reciprocal()])
        terms = SumTerms(self.scale, self.term, self.outers, factor[: len(self.outers)])
        error = margin.error(coarse.upper_norms(), self.norm)
        return Bounds(coarse, terms, error, scale)
