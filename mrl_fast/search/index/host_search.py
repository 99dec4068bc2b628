"""Search of an index's rows on the host, by C++ kernels; ``device_search`` offers the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mrl_fast.search.cpp import exact_search, range_search, search_rows
from mrl_fast.search.index.rotation import Rotation
from mrl_fast.search.index.snapshot import restricted

__all__ = ["exact_search", "range_search", "restricted", "rotated", "search_rows"]


def rotated(queries: Tensor, rotation: Rotation) -> Any:
    return rotation.apply(queries)
