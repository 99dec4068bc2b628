"""Second moments of a batch's prefixes: ``[d, d]`` Gram matrices for ``[B, B]`` similarities.

The similarities of a column of embeddings U = scale · x[:, :d] with itself sum to ‖Σ_i u_i‖², and
their squares to ‖UᵀU‖²: B·d² multiply-adds a prefix, forward and again backward, whatever the
number of pairs. Custom ops, which save x and make U again, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from mrl_fast.shared import native
from mrl_fast.training.differentiation import differentiable, differentiated

PART = 1 << 19  # elements of U that are made at a time: they stay in the cache


class Grams(NamedTuple):
    """Of each prefix g, in fp32."""

    sums: Tensor  # [Σ d]: Σ_i u_i, one prefix after the other
    grams: Tensor  # [Σ d²]: UᵀU, likewise
    squares: Tensor  # [G, B]: ‖u_i‖²

    def of_prefixes(self, dims: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        sums = self.sums.split(list(dims))
        grams = self.grams.split([d * d for d in dims])
        yield from zip(sums, grams, strict=True)


def prefix_grams(x: Tensor, scale: Tensor, dims: Sequence[int], impl: str) -> Grams:
    """Sums and Gram matrices of every prefix; differentiable once, in x and scale.

    Args:
        x: ``[B, D]`` fp32, any row stride.
        scale: ``[G, B]`` fp32, of a prefix's rows.
        dims: Prefix widths, checked.
        impl: ``"cpp"``, whose bits depend on no thread, or ``"triton"``, PyTorch's products.
    """
    return Grams(*_grams_once(x, scale, list(dims), impl))


def _product(x: Tensor, w: Tensor, impl: str) -> Tensor:  # [n, k], [m, k] -> [n, m]
    return native.product(x, w) if impl == "cpp" else x @ w.T


def _parts(x: Tensor, dim: int) -> Iterator[slice]:
    step = max(1, PART // dim)
    for begin in range(0, len(x), step):
        yield slice(begin, begin + step)


@custom_op("mrl_fast::prefix_grams", mutates_args=())
def _grams(
    x: Tensor, scale: Tensor, dims: Sequence[int], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    out = _empty(x, dims)
    out.sums.zero_()
    out.grams.zero_()
    with torch.autocast(x.device.type, enabled=False):
        for d, s, squares, (sums, gram) in zip(
            dims, scale, out.squares, out.of_prefixes(dims), strict=True
        ):
            for part in _parts(x, d):
                columns = (x[part, :d] * s[part, None]).T.contiguous()  # [d, n]
                sums += columns.sum(1)
                torch.sum(columns.square(), 0, out=squares[part])
                gram += _product(columns, columns, impl).view(-1)
    return out.sums, out.grams, out.squares


def _empty(x: Tensor, dims: Sequence[int]) -> Grams:
    return Grams(
        x.new_empty(sum(dims), dtype=torch.float32),
        x.new_empty(sum(d * d for d in dims), dtype=torch.float32),
        x.new_empty((len(dims), x.shape[0]), dtype=torch.float32),
    )


@_grams.register_fake
def _(x, scale, dims, impl):
    return tuple(_empty(x, dims))


@custom_op("mrl_fast::prefix_grams_backward", mutates_args=())
def _grams_backward(
    x: Tensor,
    scale: Tensor,
    d_sums: Tensor,
    d_grams: Tensor,
    d_squares: Tensor,
    dims: Sequence[int],
    impl: str,
) -> tuple[Tensor, Tensor]:
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dscale = torch.empty_like(scale, memory_format=torch.contiguous_format)
    given = Grams(d_sums, d_grams, d_squares)
    with torch.autocast(x.device.type, enabled=False):
        for g, (d, (sums, gram)) in enumerate(zip(dims, given.of_prefixes(dims), strict=True)):
            both = gram.view(d, d) + gram.view(d, d).T
            for part in _parts(x, d):
                rows, s = x[part, :d], scale[g, part, None]
                units = rows * s
                du = _product(units, both, impl).add_(sums)  # [n, d]
                du += units.mul_(2 * d_squares[g, part, None])
                torch.sum(du * rows, 1, out=dscale[g, part])
                dx[part, :d] += du.mul_(s)
    return dx, dscale


@_grams_backward.register_fake
def _(x, scale, d_sums, d_grams, d_squares, dims, impl):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(
        scale, memory_format=torch.contiguous_format
    )


def _save(ctx, inputs, output) -> None:
    x, scale, ctx.dims, ctx.impl = inputs
    ctx.save_for_backward(x, scale)


def _gradients(ctx, *gradients):
    found = _grams_backward_once(*ctx.saved_tensors, *gradients, ctx.dims, ctx.impl)
    return *found, None, None


_grams_backward_once = differentiated(_grams_backward)
_grams_once = differentiable(_grams, _save, _gradients)
