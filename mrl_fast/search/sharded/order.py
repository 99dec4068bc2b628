"""Where each row of a shard stands in the order in which rows were added to the whole index."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NOWHERE = 1 << 62  # the place of a missing row, after all others


class RowOrder:
    """The places of a shard's rows, which ascend: runs of them are the same step apart.

    Rows that are dealt out in turn make one run, whatever their number; a run takes 24 bytes.

    Attributes:
        runs: ``[runs, 3]`` int64: a run's first row, that row's place, and the step.
        count: How many rows there are.
    """

    def __init__(self, runs: np.ndarray, count: int):
        self.runs, self.count = runs, count

    @classmethod
    def of(cls, places: np.ndarray) -> RowOrder:
        """Of places ``[n]`` int64, ascending."""
        return cls(_encoded(places, 0), len(places))

    @classmethod
    def checked(cls, runs: np.ndarray, count: int, end: int) -> RowOrder:
        """Of runs that were read from a file.

        Raises:
            ValueError: They are not of ``count`` rows with ascending places in [0, end).
        """
        firsts, places, steps = runs.T
        sizes = np.diff(firsts, append=count)
        starts = not len(runs) or firsts[0] == 0
        if not starts or len(runs) > count or (sizes < 1).any():
            raise ValueError(f"expected runs of {count} rows, got others")
        # In fp64 first, as a product of damaged numbers may be beyond int64.
        lasts = places + (sizes - 1) * np.where(sizes > 1, steps, 0).astype(np.float64)
        ascending = (places >= 0).all() and ((steps > 0) | (sizes == 1)).all()
        if not ascending or not (lasts < end).all() or (places[1:] <= lasts[:-1]).any():
            raise ValueError(f"expected ascending places below {end}, got others")
        return cls(runs, count)

    @classmethod
    def from_place(cls, place: int) -> RowOrder:
        """Rows without end, one after the other."""
        return cls(np.array([[0, place, 1]], np.int64), NOWHERE)

    def at(self, rows: Tensor) -> Tensor:
        """The places of rows by their numbers, ``NOWHERE`` of −1; of any shape, int64."""
        numbers = rows.numpy()
        if not len(self.runs):
            return torch.full_like(rows, NOWHERE)
        run = 0
        if len(self.runs) > 1:
            run = np.searchsorted(self.runs[:, 0], numbers, side="right") - 1
        first, place, step = (self.runs[run, i] for i in range(3))
        places = place + step * (numbers - first)
        return torch.from_numpy(np.where(numbers < 0, NOWHERE, places))

    def extended(self, places: np.ndarray) -> RowOrder:
        """With these, ``[n]`` int64, ascending and beyond all so far, at its end."""
        if not len(places):
            return self
        runs, new = self.runs, _encoded(places, self.count)
        if len(runs):
            first, place, step = runs[-1].tolist()
            rows = self.count - first
            last = place + step * (rows - 1)
            gap = int(places[0]) - last
            if rows == 1:
                step = gap
            alone = len(new) > 1 and new[1, 0] == self.count + 1 or len(places) == 1
            if gap == step and (alone or new[0, 2] == step):
                runs = np.concatenate([runs[:-1], [[first, place, step]]])
                new = new[1:]
        return RowOrder(np.concatenate([runs, new]), self.count + len(places))


def _encoded(places: np.ndarray, first: int) -> np.ndarray:
    """Runs of places of the rows from ``first`` on."""
    if not len(places):
        return np.empty((0, 3), np.int64)
    gaps = np.diff(places)
    begins = np.concatenate([[0], np.flatnonzero(gaps[1:] != gaps[:-1]) + 2]).astype(np.int64)
    follows = np.minimum(begins, max(len(gaps) - 1, 0))
    steps = gaps[follows] if len(gaps) else np.ones_like(begins)
    return np.stack([begins + first, places[begins], steps], axis=1)
