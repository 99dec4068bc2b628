"""What stages cost a query, counted and not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mrl_fast.search.index.codes import CODES
from mrl_fast.search.index.config import DTYPES
from mrl_fast.shared.checks import check_int, check_stages


class StageCost(NamedTuple):
    """What one stage does for one query: rows scored, multiply-adds, bytes read of the vectors."""

    dim: int
    keep: int
    rows: int
    macs: int
    read_bytes: int


@dataclass(frozen=True)
class Explanation:
    """What stages do for one query; ``str`` is a table."""

    rows: tuple[StageCost, ...]
    macs: int  # in sum, as read_bytes
    read_bytes: int
    macs_share: float  # of a full-width scan's
    read_share: float

    def __str__(self) -> str:
        lines = [f"{'dim':>7} {'keep':>9} {'rows':>12} {'MACs a query':>15} {'bytes a query':>15}"]
        lines += [f"{r[0]:7,} {r[1]:9,} {r[2]:12,} {r[3]:15,} {r[4]:15,}" for r in self.rows]
        lines.append(f"{'total':>7} {self.macs:38,} {self.read_bytes:15,}")
        lines.append(f"{'of full':>7} {self.macs_share:38.2%} {self.read_share:15.2%}")
        return "\n".join(lines)


def explain(index: Any, stages: Sequence[tuple[int, int]], batch: int = 1) -> Explanation:
    """What each stage costs a query, counted and not measured.

    Args:
        index: A MatryoshkaIndex.
        stages: ``(dim, keep)`` pairs as in its ``search``.
        batch: Queries a call, at least 1; they share one read of what the first stage scans.

    Raises:
        ValueError, TypeError: Stages that do not fit the index.
    """
    checked = check_stages(stages)
    batch = check_int(batch, "batch", 1)
    for i, (dim, _) in enumerate(checked):
        if dim not in index.dims:
            raise ValueError(f"stages[{i}] dim: expected one of {index.dims}, got {dim}")
    first, width = index.dims[0], index.dims[-1]
    code, item = CODES[index.prefix_dtype], DTYPES[index.dtype].itemsize
    exact = first if code.exact else 0  # columns that lie in the code's array only
    by_codes = not code.exact and checked[0][0] == first and len(checked) > 1

    def row_bytes(begin: int, end: int) -> int:
        of_code = max(0, min(end, exact) - begin)
        return of_code * code.bits // 8 + item * (end - begin - of_code)

    rows: list[StageCost] = []
    count, begin = len(index), 0
    for dim, keep in checked:
        read = count * row_bytes(begin, dim)
        if not rows:
            read = -(-(count * dim * code.bits // 8 if by_codes else read) // batch)
        rows.append(StageCost(dim, keep, count, count * (dim - begin), read))
        begin = 0 if by_codes and len(rows) == 1 else dim  # a code's score is not carried on
        count = min(count, keep)
    macs, read = sum(row.macs for row in rows), sum(row.read_bytes for row in rows)
    scan = max(1, len(index))
    macs_share, read_share = macs / (scan * width), read * batch / (scan * row_bytes(0, width))
    return Explanation((*rows,), macs, read, macs_share, read_share)
