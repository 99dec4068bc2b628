"""An index of several, its shards: in one folder, in one process, or over the ranks of a group."""

from mrl_fast.search.sharded.index import ShardedIndex
from mrl_fast.search.sharded.persistence import register

__all__ = ["ShardedIndex"]

register(ShardedIndex.load)
