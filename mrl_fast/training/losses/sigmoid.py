"""SigLIP's pairwise sigmoid loss over nested prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.shared.dispatch import choose
from mrl_fast.shared.types import NestedLoss
from mrl_fast.training import reference
from mrl_fast.training.losses.embeddings import Side, check_pairs
from mrl_fast.training.losses.reductions import (
    check_dim_weights,
    check_scalar,
    check_scale,
    nested_loss,
)
from mrl_fast.training.ops import fold
from mrl_fast.training.ring.fold import around, ring_fold
from mrl_fast.training.ring.ranks import check_ranks, gather_rows
from mrl_fast.training.spec import FoldSpec


def matryoshka_sigmoid_loss(
    queries: Tensor,
    documents: Tensor,
    dims: Sequence[int],
    *,
    scale: Tensor | float,
    bias: Tensor | float,
    dim_weights: Tensor | Sequence[float] | None = None,
    group: Any = None,
    impl: str | None = None,
) -> NestedLoss:
    """SigLIP's loss of every nested prefix, summed, each prefix normalised on its own.

    Equals ``sum(c * -F.logsigmoid(sign * (scale * F.normalize(q[:, :d]) @ F.normalize(p[:, :d]).T +
    bias)).sum() / B for c, d in zip(dim_weights, dims))`` with ``sign`` 1 on the diagonal and −1
    elsewhere, and no score matrix in memory. fp32 sums for every input dtype. Differentiable once.

    Args:
        queries: ``[B, D]``, any row stride.
        documents: ``[C, D]`` with ``C >= B``, positives first; what is past them is negative.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        scale: Inverse temperature, > 0 (SigLIP starts at 10); one element may be learned.
        bias: Added to every score (SigLIP starts at −10); one element may be learned.
        dim_weights: c_g, ``[G]``; default all 1: a sum over prefixes, not a mean.
        group: A ``torch.distributed`` process group: the documents of other ranks are negatives.
            They travel from rank to rank, as those of ``matryoshka_info_nce``, and the same holds
            of gradients, of ranks' numbers of rows and of the call and its backward.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        NestedLoss: scalar ``loss`` and detached ``per_dim`` ``[G]``.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, algorithm 1.
    """
    if not isinstance(documents, Tensor):
        raise TypeError(f"documents: expected a torch.Tensor, got {type(documents).__name__}")
    queries, (block,), dims = check_pairs(queries, documents, dims)
    if len(block) < len(queries):
        raise ValueError(f"documents: expected at least {len(queries)} rows, got {len(block)}")
    scale = check_scale(scale, "scale", queries)
    bias = check_scalar(bias, "bias", queries)
    dim_weights = check_dim_weights(dim_weights, len(dims), queries)
    target = torch.arange(len(queries), dtype=torch.int64, device=queries.device)
    impl = choose(impl, queries, block)
    ranks = None
    if group is not None:
        options = dims, impl == "reference"
        ranks = check_ranks(group, queries, [block], *options, learned=[scale, bias])
    if impl == "reference":
        if ranks is not None:
            target = target + sum(ranks.documents[: ranks.rank])
            block = gather_rows(block, ranks.documents, ranks)
        rows = reference.sigmoid_rows(queries, block, dims, scale, bias, target)
    else:
        q, d = Side.from_embeddings(queries, dims), Side.from_embeddings(block, dims)
        spec = FoldSpec(
            q.x, d.x, dims, _row(bias, len(block) if ranks is None else 1, queries),
            row_scale=q.scaled(scale), col_scale=d.inverse, target=target, link="sigmoid",
            compute_dtype=q.compute_dtype,
        )  # fmt: skip
        if ranks is None:
            f = fold(spec, impl)
        else:
            f = ring_fold(spec, around(ranks, ranks.documents), impl)
        rows = f.row_log - f.hit
    count = len(queries) if ranks is None else ranks.mean_queries
    return nested_loss(rows, dim_weights, "mean", count)


def _row(bias: Tensor | float, size: int, like: Tensor) -> Tensor:  # [size] fp32
    if isinstance(bias, Tensor):
        return bias.float().expand(size)
    return torch.full((size,), bias, dtype=torch.float32, device=like.device)
