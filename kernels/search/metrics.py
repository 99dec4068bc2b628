"""What each metric makes of a prefix product, and how far a scan's score may be from the exact one.

A scan ranks by ⟨q, x⟩ (ip), by ⟨q, x⟩ / ‖x‖ (cosine) and by ⟨q, x⟩ − ‖x‖²/2 (l2): the part of a
score that depends on the query alone changes no order. A new metric needs an entry in each table
here, and a branch in the kernels ``_scan_kernel`` and ``pair_scores``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from mrl_fast.kernels.search.scan_shape import PROMOTED, promoted, scan_precision
from torch import Tensor

NUMBERS = {"ip": 0, "cosine": 1, "l2": 2, "linear": 3}  # METRIC and NORMS of the kernels
SAFE_NORM = 2.0**-40  # squares of smaller norms may leave fp32's normal range
ROUNDED = 1e-6  # relative error of a norm, by rounding of squares and of their sum
LOST = 1.1e-19  # error of a norm for each column, by squares that leave fp32's range


class SumTerms(NamedTuple):
    """What a scan makes a score of, beside a row's sum: sum · scale + term + factor · outer, and so
    on for each of up to three factors and outers: ``[F, B]`` and ``[F, N]``."""

    scale: Tensor | None = None  # [N] fp32, as the next two
    term: Tensor | None = None
    outer: Tensor | None = None
    factor: Tensor | None = None  # [B] fp32


class Margin(NamedTuple):
    """How far a scan's score may be from the canonical one: ``a + c·q² + d·q·x + e·x²``, where q is
    the query's norm and x the largest norm of a row, which is 1 under cosine.

    Both scores round every product, every sum (tensor cores by truncation) and the metric's terms:
    in all fewer than 2(dim + 16) roundings of numbers no larger than the norms' product."""

    bound: float  # relative error of a sum
    a: float
    c: float = 0.0
    d: float = 0.0
    e: float = 0.0

    def error(self, q: Tensor, x: Tensor) -> Tensor:
        """For the queries' norms ``[B]`` and the largest norm of a row ``[1]``."""
        return self.a + self.c * q * q + self.d * q * x + self.e * x * x

    @classmethod
    def from_rows(cls, x: Tensor, metric: str) -> "Margin":
        """In a scan's units: products with the unnormalised query under cosine, and
        ⟨q, x⟩ − ‖x‖²/2 under l2."""
        return _margin(x.dtype, x.shape[1], metric == "l2", scan_precision(x), promoted(x))


@functools.lru_cache(maxsize=4096)
def _margin(dtype: torch.dtype, dim: int, l2: bool, precision: str, promoted: bool) -> Margin:
    tf32 = 2.0**-9 if precision == "tf32" else 2.0**-18
    # Tensor cores add up so many products of float8 at a time, and cut each of them and the sum off
    # below 2^-13 of the largest one; somewhat above that where its factor is subnormal.
    added = PROMOTED if promoted else max(64, dim)
    coarse = {1: (added + 10) * 2.0**-13, 2: 0.0, 4: tf32}[dtype.itemsize]
    exact = dtype == torch.int8  # sums of integers, rounded at the end
    bound = 2 * (dim + 16) * 2.0**-24 + (0.0 if exact else coarse)
    tiny = dim * torch.finfo(torch.float32).tiny
    if l2:  # (q + x)²/2 <= q² + x²
        return Margin(bound, tiny, c=bound, e=bound)
    return Margin(bound, tiny, d=bound)


def upper(norms: Tensor, dim: int) -> Tensor:
    """Upper bounds of norms that are sums of ``dim`` squares, rounded or lost as may be."""
    return (norms + dim * LOST) * (1 + ROUNDED)


def row_norms(x: Tensor) -> Tensor:
    """``[N]`` fp32."""
    norm = torch.linalg.vector_norm
    if x.element_size() > 1:
        return norm(x, dim=1, dtype=torch.float32)
    return torch.cat([norm(part.float(), dim=1) for part in x.split(1 << 20)])


def row_terms(x: Tensor, metric: str) -> tuple[SumTerms, Tensor]:
    """The metric's terms of each row of ``x [N, dim]``, and the largest norm, ``[1]``: infinite
    where squares leave fp32's normal range, so that no bound holds."""
    norms = row_norms(x)
    largest = upper(norms.nan_to_num(0.0, torch.inf).max(), x.shape[1])
    terms, largest = TERMS[metric](norms, largest)
    return terms, largest.reshape(1)


def _ip(norms: Tensor, largest: Tensor) -> tuple[SumTerms, Tensor]:
    return SumTerms(), largest


def _cosine(norms: Tensor, largest: Tensor) -> tuple[SumTerms, Tensor]:
    smallest = torch.where(norms > 0, norms, torch.inf).min()
    largest = torch.where(smallest > SAFE_NORM, largest.clamp(1, 1), torch.inf)
    return SumTerms(scale=norms.reciprocal().where(norms != 0, 0.0)), largest


def _l2(norms: Tensor, largest: Tensor) -> tuple[SumTerms, Tensor]:
    return SumTerms(term=-0.5 * norms * norms), largest


# The rows' terms, by their norms and the largest of these.
TERMS: dict[str, Callable[[Tensor, Tensor], tuple[SumTerms, Tensor]]] = {
    "ip": _ip,
    "cosine": _cosine,
    "l2": _l2,
}
# No bound holds for queries whose norm is not above this.
LEAST_NORM = {"ip": -1.0, "cosine": SAFE_NORM, "l2": -1.0}
# The scan's score where the metric's score is θ, by the queries' norms; and the size of the numbers
# that it is a sum of.
GATES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ip": lambda theta, norms: (theta, theta.abs()),
    "cosine": lambda theta, norms: (theta * norms, (theta * norms).abs()),
    "l2": lambda theta, norms: ((theta + norms**2) / 2, ((theta + norms**2) / 2).abs() + norms**2),
}
