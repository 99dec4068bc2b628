"""The spread-out regulariser (GOR): similarities in a batch as small as of random directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mrl_fast.shared.checks import check_choice, check_number
from mrl_fast.shared.dispatch import choose
from mrl_fast.shared.types import NestedLoss, SpreadOut
from mrl_fast.training import reference
from mrl_fast.training.grams import prefix_grams
from mrl_fast.training.losses.embeddings import Side, check_pairs
from mrl_fast.training.losses.reductions import check_dim_weights, weighted_sum
from mrl_fast.training.ring.ranks import Ranks, check_ranks, gather_rows

AGGREGATIONS = ("mean", "sum")


class RowsOfRanks(NamedTuple):
    """How many rows of a column each rank has."""

    ranks: Ranks
    counts: list[int]


def matryoshka_spread_out(
    embeddings: Tensor | Sequence[Tensor],
    dims: Sequence[int],
    *,
    weights: SpreadOut | Sequence[Any] = SpreadOut(),  # noqa: B008  # it is immutable
    dim_weights: Tensor | Sequence[float] | None = None,
    normalize: bool = True,
    group: Any = None,
    impl: str | None = None,
) -> NestedLoss:
    """Penalises similarities of unlike embeddings in a batch, of every nested prefix, summed.

    Of one column of embeddings and one prefix it equals ``mean * m1**2 + second_moment *
    relu(m2 - 1 / d)`` with ``m1`` and ``m2`` the means of s and of s² over all i ≠ j, s =
    ``F.normalize(x[:, :d]) @ F.normalize(x[:, :d]).T``: random directions have m1 = 0 and m2 = 1/d.
    No matrix of similarities is made: m2 is that of a ``[d, d]`` Gram matrix. Beside a loss that
    pulls pairs together it spreads embeddings over all directions, so that their signs tell more.
    Saves x; fp32 sums for every input dtype. Differentiable once.

    Args:
        embeddings: A column ``[B, D]``, any row stride, or several of the same width, each of which
            is compared with itself alone.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        weights: A SpreadOut, or its values.
        dim_weights: c_g, ``[G]``; default all 1.
        normalize: False takes raw dot products.
        group: A ``torch.distributed`` process group: moments are those of all ranks' rows, the same
            on each, of which ranks may have different numbers; gradients are scaled as DDP, which
            averages them, needs it. None takes this rank's.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        NestedLoss: scalar ``loss`` and detached ``per_dim`` ``[G]``; 0 for a single row.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; both weights
            0.

    Source: Zhang et al., Learning Spread-out Local Feature Descriptors, ICCV 2017, equation 9.
    """
    columns = [embeddings] if isinstance(embeddings, Tensor) else list(embeddings)
    if not columns:
        raise ValueError("embeddings: expected at least one column, got an empty sequence")
    checked = [check_pairs(x, x, dims, "embeddings", "embeddings")[0] for x in columns]
    first, _, widths = check_pairs(columns[0], columns[0], dims, "embeddings", "embeddings")
    for i, x in enumerate(columns):
        if x.shape[1] != first.shape[1] or x.device != first.device:
            raise ValueError(
                f"embeddings[{i}]: expected width {first.shape[1]} on {first.device} as "
                f"embeddings[0], got {x.shape[1]} on {x.device}"
            )
    c = check_dim_weights(dim_weights, len(widths), first)
    options = check_spread_out(weights, "weights")
    impl = choose(impl, *checked)
    held = None
    if group is not None:
        said = len(checked), widths, options, normalize, impl == "reference"
        held = [
            RowsOfRanks(found, found.queries)
            for found in (check_ranks(group, x, [x], *said) for x in checked)
        ]
    per_dim = spread_out_terms(checked, widths, options, normalize, held, impl)[:, 0]
    return NestedLoss(weighted_sum(c, per_dim), per_dim.detach())


def check_spread_out(value: Any, name: str) -> SpreadOut:
    """As a SpreadOut, of which a tuple has the first values."""
    if not isinstance(value, tuple | list) or not 1 <= len(value) <= 3:
        raise TypeError(f"{name}: expected a SpreadOut or its values, got {value!r}")
    options = SpreadOut(*value)
    check_number(options.mean, f"{name}: mean")
    check_number(options.second_moment, f"{name}: second_moment")
    check_choice(options.aggregation, f"{name}: aggregation", AGGREGATIONS)
    if not options.mean and not options.second_moment:
        raise ValueError(f"{name}: expected a weight above 0, got {options}")
    return options


def spread_out_terms(
    columns: Sequence[Tensor],
    dims: tuple[int, ...],
    options: SpreadOut,
    normalize: bool,
    held: Sequence[RowsOfRanks] | None,
    impl: str,
) -> Tensor:  # [G, 1]
    """Of checked columns ``[B, D]``; ``held`` of each column where its rows are of all ranks."""
    widths = columns[0].new_tensor(dims, dtype=torch.float64)
    terms = []
    for x, its in zip(columns, held or [None] * len(columns), strict=True):
        if impl == "reference":
            rows = x if its is None else gather_rows(x, its.counts, its.ranks)
            moments = reference.off_diagonal_moments(rows, dims, normalize)
        else:
            moments = _moments(Side.from_embeddings(x, dims, normalize), dims, its, impl)
        first, second = moments.unbind(1)
        excess = (second - (1 / widths).to(second.dtype)).relu()
        terms.append(options.mean * first.square() + options.second_moment * excess)
    total = torch.stack(terms).sum(0)[:, None]
    return total / len(terms) if options.aggregation == "mean" else total


def _moments(
    side: Side, dims: tuple[int, ...], held: RowsOfRanks | None, impl: str
) -> Tensor:  # [G, 2] fp32
    """Means of s and s² over all pairs of different rows: those of all less the diagonal's."""
    found = prefix_grams(side.x, side.inverse, dims, impl)
    diagonal = torch.stack([found.squares.sum(1), found.squares.square().sum(1)], 1)  # [G, 2]
    rows = len(side.x) if held is None else sum(held.counts)
    share = 1 / (rows * (rows - 1)) if rows > 1 else 0.0
    if held is not None:
        flat = torch.cat([found.sums, found.grams, diagonal.reshape(-1)])
        sizes = [len(found.sums), len(found.grams), diagonal.numel()]
        summed = _Total.apply(flat, held.ranks.group)
        sums, grams, own = summed.split(sizes)  # pyright: ignore
        found, diagonal = found._replace(sums=sums, grams=grams), own.reshape(diagonal.shape)
    every = torch.stack(
        [
            torch.stack([part.square().sum(dtype=torch.float64) for part in parts])
            for parts in found.of_prefixes(dims)
        ]
    )  # [G, 2]
    return ((every - diagonal) * share).float()


class _Total(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
