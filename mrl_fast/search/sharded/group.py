"""Shards that are the ranks of a torch.distributed group: each holds its own rows, and all are
asked by all at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.sharded.order import RowOrder
from mrl_fast.search.sharded.protocol import Arguments
from mrl_fast.search.sharded.shard import ShardState

T = TypeVar("T")
RANK_PLACES = 1 << 40  # rows that a rank may hold
DONE = "done"  # what the leader says at the end


class GroupShards:
    """The indexes of a group's ranks, as one rank sees them. Each call is collective.

    Rows come in the order of ranks, and within a rank in that of its index.
    """

    def __init__(self, index: MatryoshkaIndex, group: Any = None):
        self.index = index
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank, self._size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group: expected one that this rank belongs to, got another")
        self._order = RowOrder.from_place(self.rank * RANK_PLACES)
        self._leads = self._told = False

    def __len__(self) -> int:
        return self._size

    def ask(self, method: str, arguments: Sequence[Arguments]) -> list[Any]:
        if self._leads:
            self._said([method, arguments])
        rows = self.index._rows
        state = ShardState(rows, rows.snapshot, self._order, rows.next_id)
        answer, error = None, None
        try:
            answer = getattr(state, method)(*arguments[self.rank])
        except Exception as raised:  # the others wait for this rank
            error = raised
        return self.gathered(fingerprint(method, arguments), answer, error)

    def change(self, method: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        raise ValueError(
            f"{method}: expected each rank to change its own index, got a sharded index of a group"
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error in an argument of one rank is raised in all."""
        self._told = False
        try:
            yield
        except Exception as error:
            if not self._told and not self._leads:
                self.gathered("", None, error)
            raise

    def lead(self, call: Callable[[], T], asked: Arguments) -> T:
        """What the first rank's call returns, in every rank: the others answer what it asks."""
        self.gathered(fingerprint(asked), None, None)
        if self.rank == 0:
            result: Any = None
            self._leads = True
            try:
                result = call()
            except Exception as error:
                result = error
            finally:
                self._leads = False
                self._said([DONE, result])
        else:
            while (said := self._said([None, None]))[0] != DONE:
                try:
                    self.ask(*said)
                except Exception:
                    if not self._told:  # else the first rank has it, too, and says what follows
                        raise
            result = said[1]
        if isinstance(result, Exception):
            self._told = True
            raise result
        return result

    def gathered(self, asked: str, answer: Any, error: Exception | None) -> list[Any]:
        """The answers of all ranks.

        Raises:
            ValueError: Ranks ask for different things.
            RuntimeError: A rank is gone, or does not answer within the group's timeout.
            What a rank raised, in all of them.
        """
        answers: list[Any] = [None] * self._size
        said = _described(error) if error else None
        try:
            dist.all_gather_object(answers, (asked, answer, said), group=self.group)
        except RuntimeError as lost:
            self._told = True
            raise RuntimeError(
                f"group: expected an answer of each of {self._size} ranks, got: {lost}"
            ) from lost
        self._told = True
        if error is not None:
            raise error
        for rank, (_, _, its) in enumerate(answers):
            if its is not None:
                kind, text = its
                raise kind(f"rank {rank}: {text}")
        if len({asked for asked, _, _ in answers}) > 1:
            differ = [rank for rank, (its, _, _) in enumerate(answers) if its != answers[0][0]]
            raise ValueError(
                "group: expected the same call with the same arguments in every rank, got others "
                f"in {', '.join(map(str, differ))} than in 0"
            )
        return [answer for _, answer, _ in answers]

    def _said(self, said: list[Any]) -> list[Any]:
        """What the first rank says, in every rank."""
        try:
            first = dist.get_global_rank(self.group, 0)
            dist.broadcast_object_list(said, src=first, group=self.group)
        except RuntimeError as lost:
            self._told = True
            raise RuntimeError(f"group: expected rank 0 to lead, got: {lost}") from lost
        return said


def _described(error: Exception) -> tuple[type[Exception], str]:
    """An error as another rank raises it."""
    kind = type(error) if type(error) in (ValueError, TypeError) else RuntimeError
    return kind, str(error)


def fingerprint(*values: Any) -> str:
    """Of numbers, texts, tensors and tuples of them: the same for equal ones."""
    digest, seen = hashlib.sha256(), set[int]()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            if id(value) not in seen:  # shards are often asked the same
                seen.add(id(value))
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, (tuple, list)):
            digest.update(f"({len(value)}".encode())
            for each in value:
                add(each)
        else:
            digest.update(f"{type(value).__name__}{value!r}".encode())

    add(values)
    return digest.hexdigest()


def checked_shards(index: MatryoshkaIndex, group: Any) -> GroupShards:
    """The group's shards, once all ranks know that they fit together.

    Raises:
        TypeError: No MatryoshkaIndex.
        ValueError: Ranks whose indexes have other options, another rotation, or an id in common.
    """
    if not isinstance(index, MatryoshkaIndex):
        raise TypeError(f"index: expected a MatryoshkaIndex, got {type(index).__name__}")
    shards = GroupShards(index, group)
    ids, axes = index.ids, index.rotation
    ends = [int(ids.min()), int(ids.max())] if len(ids) else None
    mine = index.config.fields, None if axes is None else fingerprint(axes), ends
    fields, rotations, ranges = zip(*shards.gathered("", mine, None), strict=True)
    for rank, its in enumerate(fields):
        if its != fields[0]:
            name = next(name for name in its if its[name] != fields[0][name])
            raise ValueError(
                f"index: expected {name}={fields[0][name]!r} as in rank 0, got "
                f"{its[name]!r} in rank {rank}"
            )
    if len({its for its in rotations if its is not None}) > 1:
        raise ValueError(
            "index: expected one rotation in all ranks, got several: fit each index to the same "
            "samples"
        )
    held = sorted(each for each in ranges if each is not None)
    if any(before[1] >= after[0] for before, after in zip(held, held[1:], strict=False)):
        values, counts = torch.cat(shards.gathered("", ids, None)).unique(return_counts=True)
        if bool((counts > 1).any()):
            raise ValueError(
                f"ids: expected none in two ranks, got {int(values[counts > 1][0])} again: give "
                "ids where vectors are added"
            )
    return shards
