"""An index on a CUDA device: the host's rows, and a copy of them that the kernels search."""

from mrl_fast.gpu.search import exact_search, range_search, restricted, rotated, search_rows
from mrl_fast.gpu.storage import Store

__all__ = ["Store", "exact_search", "range_search", "restricted", "rotated", "search_rows"]
