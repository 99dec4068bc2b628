"""Shards in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mrl_fast.search.sharded.protocol import Arguments, T
from mrl_fast.search.sharded.shard import IndexShard


class LocalShards:
    """Shards that are asked one after the other, each with all threads: results depend on neither.

    What is asked sees the shards as one change left them all, whatever is changed meanwhile.
    """

    def __init__(self, shards: Sequence[IndexShard]):
        self.shards = list(shards)
        self._publish()

    def __len__(self) -> int:
        return len(self.shards)

    def ask(self, method: str, arguments: Sequence[Arguments]) -> list[Any]:
        states = self._states
        return [
            getattr(state, method)(*given) for state, given in zip(states, arguments, strict=True)
        ]

    def change(self, method: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        answers: list[Any] = []
        changed: list[IndexShard] = []
        try:
            for shard, given in zip(self.shards, arguments, strict=True):
                before = shard.state
                try:
                    answers.append(None if given is None else getattr(shard, method)(*given))
                finally:
                    if shard.state is not before:
                        changed.append(shard)
        except BaseException:
            for shard in changed:
                shard.undo()
            raise
        self._publish()
        return answers

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def lead(self, call: Callable[[], T], asked: Arguments) -> T:
        return call()

    def _publish(self) -> None:
        self._states = [shard.state for shard in self.shards]
