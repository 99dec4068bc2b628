"""Which names the encoder learns from, and which are held out to be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mrl_fast.experiments.corpus import Entry

DIMS = (16, 32, 64, 128, 256)
HELD = 6144
FEWEST = 1536  # names; of fewer, too few would be held out to choose stages by


class Pairs(NamedTuple):
    """Documented names, of which some are held out.

    Attributes:
        entries: All; their sentences are distinct.
        taught: Places of those that the encoder learns from, ascending.
        held_out: Places of the others, in random order. The first third is reported; stages are
            chosen by the rest.
    """

    entries: list[Entry]
    taught: list[int]
    held_out: list[int]

    @property
    def sentences(self) -> list[str]:
        return [entry.sentence for entry in self.entries]

    @property
    def asked(self) -> list[str]:
        """The names that are held out."""
        return [self.entries[i].name for i in self.held_out]

    @property
    def reported(self) -> int:
        return len(self.held_out) // 3

    def trained(self) -> tuple[list[str], list[str]]:
        """The names and the sentences that the encoder learns from."""
        chosen = [self.entries[i] for i in self.taught]
        return [entry.name for entry in chosen], [entry.sentence for entry in chosen]


def split(entries: Sequence[Entry], *, seed: int = 0) -> Pairs:
    """Holds out 6,144 names, or a quarter where that is less.

    Raises:
        ValueError: Too few entries.
    """
    if len(entries) < FEWEST:
        raise ValueError(
            f"packages: expected at least {FEWEST:,} documented names, got {len(entries):,}"
        )
    held = min(HELD, len(entries) // 4)
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed)).tolist()
    return Pairs(list(entries), sorted(order[held:]), order[:held])
