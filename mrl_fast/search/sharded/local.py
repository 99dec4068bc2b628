"""Shards in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from mrl_fast.search.sharded.protocol import Arguments, T
from mrl_fast.search.sharded.shard import IndexShard
from mrl_fast.shared import native
from mrl_fast.shared.threads import get_num_threads

SEARCHES = ("search", "range_search")


class LocalShards:
    """Shards that are searched side by side, each by its share of a call's threads: results do not
    depend on it.

    What is asked sees the shards as one change left them all, whatever is changed meanwhile.
    """

    def __init__(self, shards: Sequence[IndexShard]):
        self.shards = list(shards)
        self._pool: tuple[int, int, ThreadPoolExecutor] | None = None  # process, workers
        self._publish()

    def __len__(self) -> int:
        return len(self.shards)

    def ask(self, method: str, arguments: Sequence[Arguments]) -> list[Any]:
        calls = [
            partial(getattr(state, method), *given)
            for state, given in zip(self._states, arguments, strict=True)
        ]
        workers = min(len(calls), get_num_threads())
        on_host = self.shards[0].index.device == "cpu"
        # Where some would wait for the last ones, each has all threads.
        beside = workers > 1 and len(calls) % workers == 0
        if method not in SEARCHES or not on_host or not beside:
            return [call() for call in calls]
        share = get_num_threads() // workers
        pool, found = self._workers(workers - 1), []
        later = [pool.submit(_shared, call, share) for call in calls[1:]]
        try:
            found.append(_shared(calls[0], share))  # this thread works, too
        finally:
            done = [each.exception() for each in later]
        for error in filter(None, done):
            raise error
        return [*found, *(each.result() for each in later)]

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

    def _workers(self, count: int) -> ThreadPoolExecutor:
        """Threads of this process: a fork has none of its parent's."""
        pool, here = self._pool, os.getpid()
        if pool is None or pool[:2] != (here, count):
            pool = here, count, ThreadPoolExecutor(count, "mrl_fast-shard")
            self._pool = pool
        return pool[2]


def _shared(call: Callable[[], T], threads: int) -> T:
    with native.sharing(threads):
        return call()
