"""Queries, checked against the index that they are for, and the prefix that they are searched by.

A search by a prefix is a search of an index of shorter dims: everything beyond is as if it were not
there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.shared.arrays import as_vectors
from mrl_fast.shared.checks import check_int


def checked_queries(x: Any, config: IndexConfig, dim: int | None) -> tuple[Tensor, int]:
    """``[B, d]``, floating point, and the dim to search by, at most d: ``dim``, or d itself.

    ``d`` is the index's width or that of a prefix. Without a rotation, which needs all columns of
    a query, those beyond the dim are gone. A single query ``[d]`` becomes ``[1, d]``.
    """
    q, dims = inputs.valued(as_vectors(x, "queries", one=True), "queries"), config.dims
    width = q.shape[1]
    if width not in dims:
        prefix = f", or of a prefix in {dims[:-1]}" if dims[1:] else ""
        fitting = [d for d in dims if d < width]
        hint = f": cut them to it, queries[:, :{fitting[-1]}]" if fitting else ""
        raise ValueError(f"queries: expected width {config.width}{prefix}, got {width}{hint}")
    if width < config.width and config.rotation is not None:
        raise ValueError(
            f"queries: expected width {config.width} with rotation={config.rotation!r}, which "
            f"mixes all columns, got {width}: pass whole queries, and dim={width}"
        )
    if dim is not None and check_int(dim, "dim", 1) not in dims:
        raise ValueError(f"dim: expected one of {dims}, got {dim}")
    dim = width if dim is None else int(dim)
    if dim > width:
        raise ValueError(f"dim: expected at most {width}, the queries' width, got {dim}")
    return (q if dim == width or config.rotation else q[:, :dim]), dim
