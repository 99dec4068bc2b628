"""What shards are asked and what they answer, wherever they are.

A sharded index knows its shards by ``Shards`` alone: threads of this process (``LocalShards``),
ranks of a torch.distributed group (``GroupShards``), or actors elsewhere. Each of them holds one
``IndexShard``; a transport calls that one's methods by name, of all shards at once, and returns
what they answer. Arguments and answers are tensors on the CPU, numbers and NamedTuples of them, so
that they can be pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")
Arguments = tuple[Any, ...]


class ShardFound(NamedTuple):
    """The best rows of a shard.

    Attributes:
        scores: ``[B, k]`` fp32, best first; −inf where missing. k may be smaller than was asked
            for, where the shard holds fewer rows.
        ids: ``[B, k]`` int64, −1 where missing.
        ranks: ``[B, k]`` fp32 or fp64, what rows are ranked by; −inf where missing.
        places: ``[B, k]`` int64, in the order of adding to the whole index; ``NOWHERE`` where
            missing.
        touched: ``[B]`` int64, as of an ExactResult; None of a search by stages.
    """

    scores: Tensor
    ids: Tensor
    ranks: Tensor
    places: Tensor
    touched: Tensor | None


class ShardFoundRange(NamedTuple):
    """The rows of a shard that reach a threshold: ``lims`` ``[B + 1]`` and, of all queries one
    after the other, scores, ids, ranks and places as of ShardFound."""

    lims: Tensor
    scores: Tensor
    ids: Tensor
    ranks: Tensor
    places: Tensor


class ShardInfo(NamedTuple):
    """What a shard holds.

    Attributes:
        size, rows: Vectors, and those with the removed ones that still take room.
        nbytes: Of vectors, codes, norms and ids.
        next_id: One more than the largest id so far.
        has_graph, on_disk: As of a MatryoshkaIndex.
    """

    size: int
    rows: int
    nbytes: int
    next_id: int
    has_graph: bool
    on_disk: bool


class Shards(Protocol):
    """The shards of an index, and the way to them. At least one."""

    def __len__(self) -> int: ...

    def ask(self, method: str, arguments: Sequence[Arguments]) -> list[Any]:
        """Calls a reading method of ``ShardState`` on every shard and waits for all answers.

        Args:
            method: ``"search"``, ``"range_search"``, ``"info"``, ``"ids"``, ``"contains"``,
                ``"vectors"`` or ``"explain"``.
            arguments: Of each shard, in the order of shards.

        Returns:
            The answers in the order of shards. All are of the index as one change left it.

        Raises:
            What a shard raised; of several the first in the order of shards.
        """
        ...

    def change(self, method: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        """Calls a changing method of ``IndexShard`` on every shard that has arguments; where one
        raises, all that succeeded are undone before that is raised again. What is asked afterwards
        sees all changes."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """What a call of the index is checked and answered in: where it is made in several places
        at once, an error in one of them is raised in all."""
        ...

    def lead(self, call: Callable[[], T], asked: Arguments) -> T:
        """What a call returns that asks many times, and what by the time that answers took: where
        it is made in several places at once, all of them with the arguments ``asked``, one of
        them decides for all."""
        ...
