"""Shapes and random inputs of ``kernels`` and ``losses``, and what errors are measured by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.measure import DEVICE, generator


class Sizes(NamedTuple):
    """Shapes, ragged in every axis. Tiles are at most 256 on a side, the interpreter's 16 to 64."""

    B: int  # of a loss, as the next two
    V: int
    dims: tuple[int, ...]
    queries: tuple[int, ...]  # of every shape of tiles
    rows: int
    k: int
    low: tuple[tuple[int, int], ...]  # queries and columns
    metrics: tuple[str, ...] = ("ip", "cosine", "l2")
    interpreted: bool = False  # cases that differ on a device only are left out


SIZES = {
    "full": Sizes(
        135, 300, (5, 16, 75), (70, 50, 20, 1), 20_011, 7,
        tuple((b, d) for b in (70, 200) for d in (16, 32, 64, 256)),
    ),
    "small": Sizes(  # under a sanitizer
        70, 140, (5, 16, 75), (70, 1), 2_011, 7,
        tuple((b, d) for b in (70, 200) for d in (16, 32, 64, 256)), ("l2",),
    ),
    "tiny": Sizes(18, 20, (5, 16, 21), (2,), 301, 4, ((2, 16),), interpreted=True),
    "least": Sizes(18, 20, (5, 16, 21), (2,), 301, 4, ((2, 16),), ("l2",), True),
}  # fmt: skip


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A slice of something wider, so that strides are real; integers to ±127 for eight bits."""
    *rest, last = shape
    wide = torch.randn(*rest, last + 3, generator=generator(seed), device=DEVICE)
    if dtype.itemsize == 1:
        wide = (40 * wide).round().clamp(-127, 127)
    return wide.to(dtype)[..., :last]


def worst(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest deviation, as a part of the largest value of the same tensor."""
    found = [
        ((a.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-30)).item()
        for a, e in zip(ours, expected, strict=True)
    ]
    return max(found, key=lambda error: (error != error, error))  # NaN is worst
