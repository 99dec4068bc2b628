"""Log-sums of parts of a row's or column's scores, merged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogSum(NamedTuple):
    """log Σ exp(y) as a maximum and a sum relative to it: near probability 1 their sum would leave
    no digits."""

    top: Tensor  # [G, n] fp64; −∞ where there is nothing to sum
    total: Tensor  # [G, n] fp64: Σ exp(y − top)

    @classmethod
    def from_fold(cls, top: Tensor, log: Tensor) -> LogSum:
        """Of a fold's maximum and log-sum, ``[G, n]`` each."""
        return cls(top.double(), torch.where(top == -torch.inf, 0.0, log.double().exp()))

    def merged(self, other: LogSum) -> LogSum:
        top = torch.maximum(self.top, other.top)
        shift = torch.where(top == -torch.inf, 0.0, top)
        return LogSum(top, sum_at(self, shift) + sum_at(other, shift))

    @property
    def log(self) -> Tensor:
        """log total, and 0 where nothing was summed, as of a fold."""
        return torch.where(self.total == 0, 0.0, self.total.log())


def sum_at(part: LogSum, shift: Tensor) -> Tensor:
    """Σ exp(y − shift)."""
    return part.total * (part.top - shift).exp()
