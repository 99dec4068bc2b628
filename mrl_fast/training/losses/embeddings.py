"""Two sides of embeddings to be compared: checked, and normalised prefix by prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
