"""Pieces of every rank's rows on their way around the ranks, and what comes home with them.

A rank holds its own rows, the piece that it works on, and the one that is arriving. A tour takes
one piece of each rank through all others: at every step a rank sends the piece on to the next while
it computes with it. What it adds to a piece (gradients, statistics of columns) follows one step
behind, and the last step of a tour brings it to the rank that the piece came from.

Every wait ends with the group's timeout: a rank that is gone, or late by more than that, is an
error on its neighbours, and theirs on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Of a piece, of which a rank holds seven at most. On a CPU 256 rows of 1024 columns in fp32, which
# make deep enough products; on a GPU what hides the launches.
PIECE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
LEAST_ROWS = 64  # of a piece, however wide


class Piece(NamedTuple):
    """A range of one rank's rows."""

    rows: slice  # of that rank's, its blocks laid end to end
    columns: slice  # of all ranks' rows, block by block


class Route:
    """The order in which pieces of all ranks' rows visit this rank.

    Args:
        group: The process group, or its name.
        counts: Rows of each rank; none is as many on each as here.
        rows: This rank's.
        blocks: Parts of equal size that a rank's rows consist of; no piece lies in two.
        carried: What travels, ``[rows, …]`` each.
    """

    def __init__(
        self, group: Any, counts: Sequence[int], rows: int, blocks: int, carried: Sequence[Tensor]
    ):
        if isinstance(group, str):
            from torch._C._distributed_c10d import _resolve_process_group  # not on every platform

            group = _resolve_process_group(cast(Any, group))
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        counts = list(counts) or [rows] * self.ranks
        self.blocks, self.sizes = blocks, [count // blocks for count in counts]
        row_bytes = sum(t.shape[1:].numel() * t.element_size() for t in carried)
        kind = carried[0].device.type
        self.step = max(LEAST_ROWS, PIECE_BYTES.get(kind, PIECE_BYTES["cpu"]) // max(1, row_bytes))
        self.tours = blocks * -(-max(self.sizes) // self.step)

    def piece(self, rank: int, tour: int) -> Piece:
        """What ``rank`` sends on a tour; ranks with fewer rows may have none left."""
        rank %= self.ranks
        size = self.sizes[rank]
        block, part = divmod(tour, self.tours // self.blocks)
        begin, end = (min(size, at * self.step) for at in (part, part + 1))
        first = block * sum(self.sizes) + sum(self.sizes[:rank])
        return Piece(
            slice(block * size + begin, block * size + end), slice(first + begin, first + end)
        )

    def own_columns(self) -> list[slice]:
        """Of all ranks' rows, this rank's: one range a block."""
        first, total = sum(self.sizes[: self.rank]), sum(self.sizes)
        size = self.sizes[self.rank]
        return [slice(b * total + first, b * total + first + size) for b in range(self.blocks)]

    def blank(self, like: Sequence[Tensor], rank: int, tour: int) -> list[Tensor]:
        rows = self.piece(rank, tour).rows
        return [t.new_empty(rows.stop - rows.start, *t.shape[1:]) for t in like]

    def swap(self, out: Sequence[Tensor], into: Sequence[Tensor]) -> Transfer:
        """Sends ``out`` to the next rank, receives ``into`` from the one before."""
        ends = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        pairs = [(dist.isend, t, ends[0]) for t in out] + [(dist.irecv, t, ends[1]) for t in into]
        ops = [
            dist.P2POp(call, t, group=self.group, group_peer=peer)
            for call, t, peer in pairs
            if t.numel()
        ]
        return Transfer(dist.batch_isend_irecv(ops) if ops else [], out, into)


class Transfer(NamedTuple):
    """A swap under way, with the tensors that it reads and writes."""

    works: Sequence[Any]
    out: Sequence[Tensor]
    into: Sequence[Tensor]

    def wait(self) -> Sequence[Tensor]:
        """What has arrived.

        Raises:
            RuntimeError: The next or the previous rank is gone, or late by the group's timeout.
        """
        for work in self.works:
            work.wait()
        return self.into


Visit = Callable[[Piece, Sequence[Tensor]], Sequence[Tensor]]
Merge = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


def circulate(
    route: Route,
    carried: Sequence[Tensor],
    visit: Visit,
    home: Sequence[Tensor] = (),
    merge: Merge | None = None,
) -> None:
    """Shows every other rank's rows to ``visit``, piece by piece, none of no rows; collective.

    Args:
        route: The same on every rank.
        carried: ``[C, …]`` each: this rank's rows, which visit the others.
        visit: Is given a piece of another rank and the tensors carried with it, not to be changed;
            returns what is to be merged into that rank's ``home``, ``[n, …]`` each.
        home: ``[C, …]`` each: where what others found of this rank's rows is merged.
        merge: Continues the first tensors with the second, in place.
    """
    for tour in range(route.tours if route.ranks > 1 else 0):
        mine = route.piece(route.rank, tour).rows
        held: Sequence[Tensor] = [t[mine].contiguous() for t in carried]
        coming = route.swap(held, route.blank(carried, route.rank - 1, tour))
        behind = None  # what was found of the piece that comes next, on its way here
        for step in range(1, route.ranks):
            held = coming.wait()
            if step + 1 < route.ranks:
                coming = route.swap(held, route.blank(carried, route.rank - step - 1, tour))
            piece = route.piece(route.rank - step, tour)
            if piece.rows.start < piece.rows.stop:
                found = visit(piece, held)
            else:
                found = route.blank(home, route.rank - step, tour)
            if merge is None:
                continue
            if behind is not None:
                merge(found, behind.wait())
            behind = route.swap(found, route.blank(home, route.rank - step - 1, tour))
        if merge is not None and behind is not None:
            merge([t[mine] for t in home], behind.wait())


def added(into: Sequence[Tensor], more: Sequence[Tensor]) -> None:
    """The merging of gradients."""
    for a, b in zip(into, more, strict=True):
        torch.add(a, b, out=a)
