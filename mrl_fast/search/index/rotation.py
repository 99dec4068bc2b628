"""An orthogonal rotation that puts vectors' energy first, so that prefixes can be searched."""

from __future__ import annotations

import torch
from torch import Tensor

from mrl_fast.shared import memory
from mrl_fast.shared.native import product

FIT_ROWS = 1 << 16  # vectors that a fit reads at most
CHUNK_ROWS = 1 << 12


class Rotation:
    """Axes in descending order of the mean square along them.

    Second moments, not covariances: without centring, inner products keep their values.

    Attributes:
        axes: ``[D, D]`` fp32, orthonormal rows; None before ``fit``.
    """

    def __init__(self, width: int):
        self.width = width
        self.axes: Tensor | None = None
        self._copy: tuple[Tensor, Tensor] | None = None  # axes, and the same on a device

    def fit(self, vectors: Tensor) -> Rotation:
        """Fits the axes to vectors ``[n, D]``: all, or evenly spread ones of very many."""
        samples = vectors[:: -(-len(vectors) // FIT_ROWS)]
        moments = memory.zeros(self.width, self.width, dtype=torch.float64)
        for part in samples.split(CHUNK_ROWS):
            moments += part.double().T @ part.double()
        values, axes = torch.linalg.eigh(moments)
        axes = axes.T.flip(0)  # [D, D], the largest eigenvalue first
        # An eigenvector's sign is arbitrary: its largest entry is made positive.
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        self.axes = (axes * largest.sign()).float().contiguous()
        return self

    def on(self, device: torch.device) -> Tensor:
        """The axes on a device, carried there once."""
        assert self.axes is not None, "fit comes first"
        if self._copy is None or self._copy[0] is not self.axes or self._copy[1].device != device:
            self._copy = self.axes, self.axes.to(device)
        return self._copy[1]

    def apply(self, vectors: Tensor) -> Tensor:
        """``vectors @ axes.T``, ``[n, D]`` fp32; a row's bits do not depend on the others."""
        return self._times(vectors, self.axes)

    def undo(self, vectors: Tensor) -> Tensor:
        return self._times(vectors, None if self.axes is None else self.axes.T.contiguous())

    def _times(self, vectors: Tensor, matrix: Tensor | None) -> Tensor:
        assert matrix is not None, "fit comes first"
        return product(vectors, matrix)
