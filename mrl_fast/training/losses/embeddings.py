"""Two sides of embeddings to be compared: checked, normalised prefix by prefix, gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mrl_fast.shared.checks import check_dims, check_matrix, check_same_device
from mrl_fast.training.ops import inverse_norms


class Side(NamedTuple):
    """Embeddings in fp32 with the inverse norm of each prefix.

    A gradient is the sum of two, through the vector and through its norms. They are added in fp32:
    in half precision most digits of their sum would be lost.
    """

    x: Tensor  # [B, D] fp32
    inverse_norms: Tensor  # [G, B] fp64
    compute_dtype: torch.dtype | None  # of the products

    @classmethod
    def from_embeddings(cls, x: Tensor, dims: tuple[int, ...], normalize: bool = True) -> Side:
        wide = x.float()
        if normalize:
            inverse = inverse_norms(wide, dims)
        else:
            inverse = x.new_ones((len(dims), len(x)), dtype=torch.float64)
        return cls(wide, inverse, None if x.dtype == torch.float32 else x.dtype)

    def scaled(self, scale: Tensor | float) -> Tensor:  # [G, B] fp32, rounded once
        return (self.inverse_norms * scale).float()

    @property
    def inverse(self) -> Tensor:
        return self.inverse_norms.float()


def check_pairs(
    queries: Tensor,
    documents: Tensor | Sequence[Tensor],
    dims: Sequence[int],
    left: str = "queries",
    right: str = "documents",
) -> tuple[Tensor, list[Tensor], tuple[int, ...]]:
    """Queries, a list of document blocks and dims, in the dtype of the products; errors name
    ``left`` and ``right``."""
    check_matrix(queries, left)
    single = isinstance(documents, Tensor)
    if not single and not isinstance(documents, Sequence):
        raise TypeError(f"{right}: expected a tensor or a sequence, got {type(documents).__name__}")
    blocks: list[Tensor] = [documents] if isinstance(documents, Tensor) else list(documents)
    if not blocks:
        raise ValueError(f"{right}: expected at least the positives, got an empty sequence")
    autocast = torch.is_autocast_enabled(queries.device.type) and queries.dtype != torch.float64
    dtype = torch.get_autocast_dtype(queries.device.type) if autocast else queries.dtype
    for i, block in enumerate(blocks):
        name = right if single else f"{right}[{i}]"
        check_same_device(check_matrix(block, name), name, queries)
        if block.shape[1] != queries.shape[1]:
            raise ValueError(
                f"{name}: expected width {queries.shape[1]} as {left}, got {block.shape[1]}"
            )
        if not single and len(block) != len(queries):
            raise ValueError(f"{name}: expected {len(queries)} rows, got {len(block)}")
        if block.dtype != queries.dtype and not autocast:
            raise TypeError(f"{name}: expected {queries.dtype} as {left}, got {block.dtype}")
    return (
        queries.to(dtype),
        [block.to(dtype) for block in blocks],
        check_dims(dims, queries.shape[1]),
    )


class _Gather(torch.autograd.Function):
    """Rows of all ranks, end to end; each rank's rows get the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, len(x)
        out = x.new_empty(dist.get_world_size(group) * len(x), x.shape[1])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone(memory_format=torch.contiguous_format)  # reduced in place
        dist.all_reduce(grad, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.rows
        return grad[first : first + ctx.rows], None


def check_ranks(group: Any, queries: Tensor, blocks: Sequence[Tensor]) -> None:
    """Raises on every rank where one has other shapes, on which gathering would hang or abort.

    Shapes are compared on the host, which waits for a GPU and cannot be compiled; a compiled loss
    takes them to be equal.
    """
    if group is None or torch.compiler.is_compiling():
        return
    mine = {
        "queries: expected as many rows": len(queries),
        "queries: expected the same width": queries.shape[1],
        "documents: expected as many blocks": len(blocks),
        "documents: expected as many rows": len(blocks[0]),
    }
    counts = torch.tensor(list(mine.values()), dtype=torch.int64, device=queries.device)
    ranks = [torch.empty_like(counts) for _ in range(ranks_of(group))]
    dist.all_gather(ranks, counts, group=group)
    for what, found in zip(mine, torch.stack(ranks, dim=1).tolist(), strict=True):
        if len(set(found)) > 1:
            raise ValueError(f"{what} on every rank, got {found}")


def gather_rows(x: Tensor, group: Any) -> Tensor:
    """Rows of all ranks, after ``check_ranks``; x itself without a group."""
    return x if group is None else _Gather.apply(x, group)  # pyright: ignore[reportReturnType]


def rank_of(group: Any) -> int:
    return 0 if group is None else dist.get_rank(group)


def ranks_of(group: Any) -> int:
    return 1 if group is None else dist.get_world_size(group)
