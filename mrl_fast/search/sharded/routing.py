"""Which shard takes which new row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mrl_fast.shared import memory


class Placing(NamedTuple):
    """How far rows were dealt to shards.

    Attributes:
        route: ``"turn"``: one row to each shard in turn; ``"id"``: to the shard that the id modulo
            the number of shards says.
        next_id: One more than the largest id so far.
        next_place: Of the next row, in the order of adding and replacing.
        dealt: Rows that were dealt in turn.
    """

    route: str
    next_id: int = 0
    next_place: int = 0
    dealt: int = 0

    def parts(self, ids: Tensor, shards: int) -> list[slice | Tensor]:
        """Which of these new rows each shard takes: of all rows, in their order."""
        if self.route == "turn":
            return [slice((s - self.dealt) % shards, None, shards) for s in range(shards)]
        return by_shard(ids % shards, shards)

    def places(self, count: int) -> Tensor:
        return memory.arange(self.next_place, self.next_place + count)

    def after(self, ids: Tensor, *, dealt: bool) -> Placing:
        """Once these rows were placed."""
        if not len(ids):
            return self
        next_id = max(self.next_id, int(ids.max()) + 1)
        return Placing(
            self.route,
            next_id,
            self.next_place + len(ids),
            self.dealt + len(ids) * dealt,
        )


def by_shard(owners: Tensor, shards: int) -> list[slice | Tensor]:
    """The rows of each shard, ascending, given each row's."""
    return [torch.nonzero(owners == s)[:, 0] for s in range(shards)]
