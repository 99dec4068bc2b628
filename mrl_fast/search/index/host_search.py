"""The backend on the host, by C++ kernels; ``device_search`` offers the same functions."""

from __future__ import annotations

import torch
from torch import Tensor

from mrl_fast.search.cpp import (
    exact_search,
    range_search,
    ranked_exact_search,
    ranked_range_search,
    search_rows,
)
from mrl_fast.search.index.blocks import Layout
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.rotation import Rotation
from mrl_fast.search.index.snapshot import Snapshot, restricted
from mrl_fast.search.index.store import RowStore
from mrl_fast.shared import memory
from mrl_fast.shared.memory import address
from mrl_fast.shared.native import Rows

__all__ = [
    "exact_search",
    "name",
    "new_store",
    "numbered",
    "queries",
    "range_search",
    "ranked_exact_search",
    "ranked_range_search",
    "restricted",
    "rotated",
    "search_rows",
]


def new_store(layout: Layout, config: IndexConfig) -> RowStore:
    return RowStore(layout)


def queries(q: Tensor, config: IndexConfig) -> Tensor:
    """``[B, D]`` fp32; the kernels check that they are finite."""
    return q.to(memory.HOST, torch.float32)


def rotated(queries: Tensor, rotation: Rotation) -> Tensor:
    return rotation.apply(queries)


def numbered(rows: Rows) -> Rows:
    """The same rows, named in results by their numbers."""
    return rows.numbered()


def name(now: Snapshot, numbers: Tensor) -> Tensor:
    """The ids of rows by their numbers, −1 of −1; of any shape, int64."""
    numbers = numbers.contiguous()
    ids = memory.empty(*numbers.shape, dtype=torch.int64)
    now.rows.name(address(numbers, torch.int64), numbers.numel(), address(ids, torch.int64))
    return ids
