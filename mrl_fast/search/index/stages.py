"""Stages, checked against the index that they are of."""

from __future__ import annotations

from typing import Any

from mrl_fast.search.index.config import IndexConfig
from mrl_fast.shared.checks import check_int, check_stages
from mrl_fast.shared.types import Stage, Tuned

MANY = 1 << 62  # more than there are rows, and yet an int64


def checked_stages(
    x: Any, config: IndexConfig, k: int | None = None, width: int | None = None
) -> list[Stage]:
    """Stages by dims, and codes, of the index, the last of which keeps k where that is given; none
    goes past the queries' ``width`` where that is."""
    dims, code = config.dims, config.code
    checked = list(check_stages(x, code.bits if code.whole and config.device == "cpu" else ()))
    for i, (dim, *_) in enumerate(checked):
        if dim not in dims:
            raise ValueError(f"stages[{i}] dim: expected one of {tuple(dims)}, got {dim}")
        if width is not None and dim > width:
            raise ValueError(
                f"stages[{i}] dim: expected at most {width}, the queries' width, got {dim}"
            )
    dim, *bits = checked[0][:-1]
    if bits and bits[0] > 1 and dim < config.width:
        raise ValueError(
            f"stages[0] dim: expected {config.width} where {bits[0]} bits rank, got {dim}"
        )
    if k is None:
        return checked
    if checked[-1][1] < k:
        raise ValueError(f"stages: expected a last keep of at least k={k}, got {checked[-1][1]}")
    return [*checked[:-1], (checked[-1][0], k)]


def checked_tuned(x: Any, config: IndexConfig) -> Tuned:
    """The fields of a Tuned, as a manifest holds them."""
    if not isinstance(x, dict) or set(x) != set(Tuned._fields):
        raise ValueError(f"tuned: expected {', '.join(Tuned._fields)}, got {x!r:.80}")
    k, chosen = check_int(x["k"], "tuned k", 1, MANY), x["stages"]
    if chosen is not None:
        chosen = checked_stages(chosen, config, k)
        check_int(chosen[0][-1], "tuned keep", 1, MANY)
    return Tuned(chosen, k, check_int(x["rows"], "tuned rows", 0, MANY))
