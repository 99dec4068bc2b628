"""How good nested vectors are, prefix by prefix; nothing here holds an N × N matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mrl_fast._types import SearchResult
from mrl_fast.modules import MatryoshkaCrossEntropyLoss, MRLLinear
from mrl_fast.retrieval import prefix_topk, rerank


def nearest_neighbour_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, dims: Sequence[int]
) -> list[float]:
    """Share of test vectors whose nearest training vector by a prefix's cosine has their label.

    Args:
        train: ``[N, D]``; train_labels: ``[N]`` int64.
        test: ``[M, D]``; test_labels: ``[M]`` int64.
        dims: Prefix widths, each in ``[1, D]``.

    Returns:
        One accuracy in ``[0, 1]`` a dim.
    """
    nearest = [prefix_topk(test, train, 1, dim=dim, metric="cosine").ids[:, 0] for dim in dims]
    return [(train_labels[ids] == test_labels).double().mean().item() for ids in nearest]


def linear_probe_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    dims: Sequence[int],
    *,
    steps: int = 600,
    batch: int = 1024,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Test accuracy of a linear classifier a prefix, all trained at once on frozen vectors.

    Columns are centred and divided by one scale. Adam with a falling rate, the same for every
    prefix.

    Args:
        train: ``[N, D]``; train_labels: ``[N]`` int64.
        test: ``[M, D]``; test_labels: ``[M]`` int64.
        dims: Prefix widths, strictly ascending.
        steps: Of the optimiser. batch: Rows a step. seed: Of the batches' order.
        on_step: Called after each step, for a progress bar.

    Returns:
        One accuracy in ``[0, 1]`` a dim.
    """
    mean, scale = train.mean(dim=0), train.std()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = MRLLinear(dims, int(train_labels.max()) + 1)
    loss_fn = MatryoshkaCrossEntropyLoss()
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(train), (min(batch, len(train)),), generator=generator)
        optimizer.zero_grad()
        loss_fn(heads, (train[rows] - mean) / scale, train_labels[rows]).backward()
        optimizer.step()
        schedule.step()
        on_step()
    with torch.no_grad():
        predicted = heads((test - mean) / scale).argmax(dim=2)  # [G, M]
    return (predicted == test_labels).double().mean(dim=1).tolist()


def recall_at_k(
    ids: Tensor, exact: SearchResult, queries: Tensor, database: Tensor, *, metric: str = "ip"
) -> float:
    """Share of the k best that a search found; a row that ties with the k-th counts as one of them.

    Args:
        ids: Rows found, ``[B, k]`` int64, −1 where none.
        exact: The k best at full width, by ``prefix_topk`` with this metric.
        queries: ``[B, D]``. database: ``[N, D]``.
        metric: ``"ip"``, ``"cosine"`` or ``"l2"``.

    Returns:
        A number in ``[0, 1]``.
    """
    k = ids.shape[1]
    found = rerank(queries, database, ids, k, metric=metric).scores  # bit for bit as exact's
    return (found >= exact.scores[:, k - 1 :]).double().mean().item()
