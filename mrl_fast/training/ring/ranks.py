"""The ranks of a group as a loss sees them: how many rows each has, and where its own begin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Ranks(NamedTuple):
    """What ``check_ranks`` found. In a compiled graph, where nothing is exchanged, ``queries`` and
    ``documents`` are this rank's number of rows once for every rank."""

    group: Any
    rank: int
    queries: list[int]  # rows of each rank
    documents: list[int]  # rows of each rank's blocks, all of one size

    @property
    def mean_queries(self) -> float:
        """What a rank's mean divides by: the mean of all ranks' means is that of all queries."""
        return sum(self.queries) / len(self.queries)


def check_ranks(
    group: Any,
    queries: Tensor,
    blocks: Sequence[Tensor],
    *options: Any,
    learned: Sequence[Any] = (),
) -> Ranks:
    """The rows of every rank; raises on every rank where one's tensors or options do not fit the
    others', with which the exchange that follows would hang.

    They are compared on the host, which waits for a GPU and cannot be compiled; a compiled loss
    takes them, and the numbers of rows, to be equal.

    Args:
        group: A process group that this process belongs to.
        queries: ``[B, D]``; B may differ between ranks, and be 0.
        blocks: Documents ``[C, D]`` each; C may differ between ranks.
        options: What has to be the same on every rank, compared by its ``repr``.
        learned: Scale and bias, which may be tensors.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group: expected a group that this process belongs to")
    if torch.compiler.is_compiling():
        return Ranks(group, rank, [len(queries)] * size, [len(blocks[0])] * size)
    differentiated = [
        torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in some)
        for some in ([queries], blocks, learned)
    ]
    digest = hashlib.blake2b(repr(options).encode(), digest_size=7).digest()
    same = {
        "queries: expected the same width": queries.shape[1],
        "queries: expected the same dtype": _number(queries.dtype),
        "documents: expected as many blocks": len(blocks),
        "dims: expected the same dims and options": int.from_bytes(digest, "big"),
        "queries: expected gradients to be wanted, or not,": int(differentiated[0]),
        "documents: expected gradients to be wanted, or not,": int(differentiated[1]),
        "scale: expected gradients to be wanted, or not,": int(differentiated[2]),
    }
    mine = [len(queries), len(blocks[0]), *same.values()]
    sent = torch.tensor(mine, dtype=torch.int64, device=queries.device)
    ranks = [torch.empty_like(sent) for _ in range(size)]
    dist.all_gather(ranks, sent, group=group)
    rows, documents, *compared = torch.stack(ranks, dim=1).tolist()
    for what, found in zip(same, compared, strict=True):
        if len(set(found)) > 1:
            shown = "" if "dims" in what or "dtype" in what else f", got {found}"
            raise ValueError(f"{what} on every rank{shown}")
    return Ranks(group, rank, rows, documents)


def _number(dtype: torch.dtype) -> int:
    return int.from_bytes(hashlib.blake2b(str(dtype).encode(), digest_size=7).digest(), "big")


class _Gather(torch.autograd.Function):
    """Rows of all ranks, end to end; each rank's rows get the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x, counts, rank, group):
        ctx.group, ctx.rows = group, slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        padded = x.new_zeros(max(counts), x.shape[1])  # ranks send the same number of rows
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone(memory_format=torch.contiguous_format)  # reduced in place
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.rows], None, None, None


def gather_rows(x: Tensor, counts: Sequence[int], ranks: Ranks) -> Tensor:
    """Rows of all ranks, ``[Σ counts, D]``, in memory on each: for the reference, whose score
    matrices are in memory anyhow."""
    return _Gather.apply(x, counts, ranks.rank, ranks.group)  # pyright: ignore[reportReturnType]
