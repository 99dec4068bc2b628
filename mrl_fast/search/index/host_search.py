"""The backend on the host, by C++ kernels; ``device_search`` offers the same functions."""

from __future__ import annotations

import torch
from torch import Tensor

from mrl_fast.search.cpp import exact_search, range_search, search_rows
from mrl_fast.search.index.blocks import Layout
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.rotation import Rotation
from mrl_fast.search.index.snapshot import restricted
from mrl_fast.search.index.store import RowStore
from mrl_fast.shared import memory

__all__ = [
    "exact_search",
    "new_store",
    "queries",
    "range_search",
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
