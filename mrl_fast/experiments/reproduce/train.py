"""Encoders of images: trained at every prefix, or at full width only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mrl_fast.training.heads import MRLLinear
from mrl_fast.training.modules import MatryoshkaCrossEntropyLoss


def train_encoder(
    x: Tensor,
    labels: Tensor,
    dims: Sequence[int],
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[str], object],
    tied: bool = False,
) -> tuple[nn.Module, MRLLinear]:
    """An encoder ``[n, inputs] → [n, dims[-1]]`` and its head, trained by each prefix's
    cross-entropy.

    With ``dims=(D,)`` this is ordinary training; everything else is the same.
    """
    torch.manual_seed(seed)
    width = dims[-1]
    encoder = nn.Sequential(
        nn.Linear(x.shape[1], 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, width)
    )
    head, loss_fn = MRLLinear(dims, int(labels.max()) + 1, tied=tied), MatryoshkaCrossEntropyLoss()
    parameters = [*encoder.parameters(), *head.parameters()]
    batch = 256 if len(x) > 10_000 else 64
    steps = epochs * -(-len(x) // batch)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        total = torch.zeros(len(dims))
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            loss_fn(head, encoder(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
            if loss_fn.per_dim is not None:
                total += loss_fn.per_dim * len(rows) / len(x)
        on_epoch(f"loss at {dims[0]}: {total[0]:.3f}, at {width}: {total[-1]:.3f}")
    return encoder.eval(), head


@torch.no_grad()
def encode(encoder: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([encoder(part) for part in x.split(4096)])
