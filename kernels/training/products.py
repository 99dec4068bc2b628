"""dx, dw and db from the gradients of nested scores: two matrix products a slab.

Column j of x counts in every prefix wider than j, so with A_g the gradient of prefix g's scores and
T_g = Σ_{h >= g} A_h: dX[:, slab g] = T_g · W[:, slab g], dW[:, slab g] = T_gᵀ · X[:, slab g] and
db = colsum(T_0). All prefixes cost what the widest one does. Chunks of rows × classes bound the
memory that T takes; sums over chunks are fp32.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from mrl_fast.kernels.shared.tiling import chunk_steps, chunks, product, slabs, whole_tiles
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor | None]  # dx [B, D], dw [V, W], db [V] fp32


class Wanted(NamedTuple):
    """The dtypes of dx and dw, and whether there is a db."""

    dx: torch.dtype
    dw: torch.dtype
    db: bool


def nested_gradients(
    x: Tensor,
    weight: Tensor,
    dims: Sequence[int],
    bytes_a_score: int,
    suffix_sums: Callable[[slice, slice], Iterable[Tensor]],
    scale: Tensor,
    wanted: Wanted,
) -> Gradients:
    """``suffix_sums(rows, classes)`` gives T_g / scale, ``[rows, classes]``, from the widest prefix
    down; ``scale`` is an fp32 scalar on the device."""
    row_step, class_step = chunk_steps(len(x), whole_tiles(len(weight)), bytes_a_score)
    whole = row_step >= len(x)  # every element of dw is then made once
    dx = torch.zeros_like(x, dtype=wanted.dx)
    dw = torch.zeros_like(weight, dtype=wanted.dw if whole else torch.float32)
    fp32 = dict(dtype=torch.float32, device=x.device)
    db = torch.zeros(len(weight), **fp32) if wanted.db else None
    for rows in chunks(len(x), row_step):
        dx_rows = torch.zeros(rows.stop - rows.start, dims[-1], **fp32)
        for classes in chunks(len(weight), class_step):
            for slab, suffix in zip(reversed(slabs(dims)), suffix_sums(rows, classes), strict=True):
                rounded = suffix.to(x.dtype)
                dx_rows[:, slab].addcmul_(product(rounded, weight[classes, slab]), scale)
                dw[classes, slab].addcmul_(product(rounded.T, x[rows, slab]), scale)
                if db is not None and slab.start == 0:
                    db[classes].addcmul_(suffix.sum(0, dtype=torch.float32), scale)
        dx[rows, : dims[-1]] = dx_rows
    return dx, dw.to(wanted.dw), db
