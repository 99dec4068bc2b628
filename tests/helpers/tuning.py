"""Clustered vectors to tune to, and a clock that says what each search is to take."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.index import timing
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.cost import explain
from mrl_fast.search.index.tuning import Sample

DIMS = (8, 16, 32, 64)
TICK_MS = 1e3 / (1 << 30)  # so that sums and differences of ticks are exact


class Shape:
    """What ``explain`` and the lists that ``tune`` tries read of an index."""

    def __init__(self, rows, dims, dtype="float32", prefix_dtype="float32"):
        self.rows, self.dims, self.device = rows, dims, "cpu"
        self.config = IndexConfig(dims, "ip", dtype, prefix_dtype)
        self.has_graph = self.on_disk = False
        self._rows = SimpleNamespace(snapshot=SimpleNamespace(graph=None, size=rows, count=rows))

    def __len__(self):
        return self.rows

    def explain(self, stages, *, batch=1):
        return explain(self, stages, batch)


def clustered(rows=1000, queries=2600, prefix_dtype="float32") -> tuple[MatryoshkaIndex, Tensor]:
    """An index of clustered vectors whose variance falls along the columns, and queries."""
    generator = torch.Generator().manual_seed(0)

    def noise(n):
        return torch.randn(n, 64, generator=generator) / (1 + torch.arange(64) / 4).sqrt()

    def pick(x, n):
        return x[torch.randint(len(x), (n,), generator=generator)]

    x = pick(noise(100), rows) + 0.6 * noise(rows)
    index = MatryoshkaIndex(DIMS, prefix_dtype=prefix_dtype)
    index.add(x)
    return index, pick(x, queries) + 0.3 * noise(queries)


def cost(stages: Any) -> int:
    """Ticks of a query: its first stage's columns and kept rows; exact search takes most."""
    return 4000 if stages is None else stages[0][0] + stages[0][1]


class Clock:
    """Stands in for the time that ``tune`` reads: only searches take any.

    Attributes:
        work: The ticks of a query of these stages.
        calls: The stages and the number of queries of each search.
    """

    def __init__(self, patch: pytest.MonkeyPatch, work: Callable[[Any], int] = cost):
        self.ticks, self.work = 0, work
        self.calls: list[tuple[Any, int]] = []
        search = Sample.search

        def timed(sample: Sample, part: Tensor, stages: Any) -> Any:
            self.calls.append((stages, len(part)))
            self.ticks += len(part) * self.work(stages)
            return search(sample, part, stages)

        patch.setattr(Sample, "search", timed)
        patch.setattr(timing, "clock", lambda: self.seconds)

    @property
    def seconds(self) -> float:
        return self.ticks * TICK_MS / 1e3
