"""What stages cost a query, counted and not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mrl_fast.search.index import scaled
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.graph import walks
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.search.index.stages import checked_stages
from mrl_fast.shared.checks import check_int
from mrl_fast.shared.types import Stage


class StageCost(NamedTuple):
    """What one stage does for one query: rows scored, multiply-adds, bytes read of the vectors, or
    of codes of so many bits a column (0: of the vectors)."""

    dim: int
    keep: int
    rows: int
    macs: int
    read_bytes: int
    bits: int


@dataclass(frozen=True)
class Explanation:
    """What stages do for one query; ``str`` is a table."""

    rows: tuple[StageCost, ...]
    macs: int  # in sum, as read_bytes
    read_bytes: int
    macs_share: float  # of a full-width scan's
    read_share: float

    def __str__(self) -> str:
        lines = [
            f"{'dim':>7} {'bits':>4} {'keep':>9} {'rows':>12} {'MACs a query':>15} "
            f"{'bytes a query':>15}"
        ]
        lines += [
            f"{r.dim:7,} {r.bits or '':4} {r.keep:9,} {r.rows:12,} {r.macs:15,} {r.read_bytes:15,}"
            for r in self.rows
        ]
        lines.append(f"{'total':>7} {self.macs:43,} {self.read_bytes:15,}")
        lines.append(f"{'of full':>7} {self.macs_share:43.2%} {self.read_share:15.2%}")
        return "\n".join(lines)


def explain(index: Any, stages: Sequence[Stage], batch: int = 1) -> Explanation:
    """What each stage costs a query, counted and not measured.

    Args:
        index: A MatryoshkaIndex.
        stages: As in its ``search``.
        batch: Queries a call, at least 1; they share one read of what the first stage scans.

    Raises:
        ValueError, TypeError: Stages that do not fit the index.
    """
    if stages is None:
        raise ValueError(
            "stages: expected a list, got None: how much an exact search reads depends on the "
            "vectors and is not counted beforehand; its result.rows_touched says it"
        )
    return explained(index.config, index._rows.snapshot, stages, batch)


def explained(
    config: IndexConfig, now: Snapshot, stages: Sequence[Stage], batch: int = 1
) -> Explanation:
    """As ``explain``, of a state of an index."""
    checked = checked_stages(stages, config)
    batch = check_int(batch, "batch", 1)
    code, width, item = config.code, config.width, config.stored_dtype.itemsize
    head = scaled.header(config.stored_dtype)  # elements that are read with any columns
    exact = config.coded if code.exact else 0  # columns that lie in the code's array only

    def row_bytes(begin: int, end: int) -> int:
        of_code = max(0, min(end, exact) - begin)
        return of_code * code.bits[0] // 8 + item * (head + end - begin - of_code)

    rows: list[StageCost] = []
    count, begin, known = now.size, 0, 0  # known: bits of a column that the stage before read
    if walks(checked):
        graph = now.graph
        if graph is None:
            raise ValueError("stages[0]: expected a graph: build_graph() first, got none")
        _, beam, keep = checked.pop(0)
        seen, read = graph.reads(beam)
        later = max(0, now.count - graph.rows)  # scanned beside it
        scanned = later * width // 8 if code.whole else later * row_bytes(0, width)
        read += -(-scanned // batch)
        seen += later
        rows.append(StageCost(width, keep, seen, seen * width, read, 1))
        count = min(count, keep + min(later, keep))
    for dim, *named, keep in checked:
        bits = named[0] if named else 0
        if not rows and len(checked) > 1 and not (code.exact or code.whole) and dim == config.coded:
            bits = code.bits[0]  # of a first prefix
        by_codes = bits > 0
        # The first four bits are carried on; signs, which lie apart, are not.
        more = bits - known if known > 1 else bits
        read = count * dim * more // 8 if by_codes else count * row_bytes(begin, dim)
        read = read if rows else -(-read // batch)
        rows.append(StageCost(dim, keep, count, count * (dim - begin), read, bits))
        begin, known = (0, bits) if by_codes else (dim, 0)  # columns begin anew after codes
        count = min(count, keep)
    macs, read = sum(row.macs for row in rows), sum(row.read_bytes for row in rows)
    scan = max(1, now.size)
    macs_share, read_share = macs / (scan * width), read * batch / (scan * row_bytes(0, width))
    return Explanation((*rows,), macs, read, macs_share, read_share)
