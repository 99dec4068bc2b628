"""What stages cost over all shards."""

from __future__ import annotations

from collections.abc import Sequence

from mrl_fast.search.index.cost import Explanation, StageCost


def summed(shards: Sequence[Explanation]) -> Explanation:
    """The sums of all shards' costs, stage by stage. A shard with fewer stages, as it has no graph
    to walk, adds its cost to the last ones."""
    deepest = max(shards, key=lambda each: len(each.rows)).rows
    rows: list[StageCost] = []
    for i, stage in enumerate(reversed(deepest), 1):
        its = [each.rows[-i] for each in shards if i <= len(each.rows)]
        summed_row = stage._replace(
            rows=sum(row.rows for row in its),
            macs=sum(row.macs for row in its),
            read_bytes=sum(row.read_bytes for row in its),
        )
        rows.insert(0, summed_row)
    macs, read = sum(row.macs for row in rows), sum(row.read_bytes for row in rows)
    full_macs = sum(each.macs / each.macs_share for each in shards if each.macs_share)
    full_read = sum(each.read_bytes / each.read_share for each in shards if each.read_share)
    return Explanation((*rows,), macs, read, macs / max(1, full_macs), read / max(1, full_read))
