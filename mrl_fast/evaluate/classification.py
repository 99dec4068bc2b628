"""How well a label is told from a prefix: by neighbours, by a linear probe, by a few examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast.evaluate.common import arange, checked_labels, checked_vectors, numbered
from mrl_fast.search.ops import prefix_topk
from mrl_fast.shared.arrays import as_integers
from mrl_fast.shared.checks import check_int
from mrl_fast.training.heads import MRLLinear, matryoshka_predict
from mrl_fast.training.modules import MatryoshkaCrossEntropyLoss

PREDICTED_ROWS = 1 << 14  # rows that are standardised and predicted at a time


def nearest_neighbour_accuracy(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    dims: Sequence[int],
    *,
    k: int = 1,
    metric: str = "cosine",
) -> list[float]:
    """Share of test vectors that most of their k nearest training vectors by a prefix agree with.

    Among labels of equally many neighbours the one of the nearest neighbour wins.

    Args:
        train: ``[N, D]``; train_labels: ``[N]``.
        test: ``[M, D]``; test_labels: ``[M]``; one that no training vector has is never hit.
        dims: Prefix widths, each in ``[1, D]``, in any order.
        k: Neighbours that vote, in ``[1, N]``.
        metric: As in ``prefix_topk``.

    Returns:
        One accuracy in ``[0, 1]`` a dim, in their order.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; no rows.
    """
    (train, train_labels, test, test_labels), dims = _checked_sets(
        train, train_labels, test, test_labels, dims
    )
    k = check_int(k, "k", 1, len(train))
    predicted = []
    for dim in dims:
        labels = train_labels[prefix_topk(test, train, k, dim=dim, metric=metric).ids]  # [M, k]
        votes = torch.zeros_like(labels)
        for neighbour in labels.unbind(1):
            votes += labels == neighbour[:, None]
        winner = votes.argmax(1, keepdim=True)  # the first of the best
        predicted.append(labels.gather(1, winner)[:, 0])
    return accuracy(torch.stack(predicted), test_labels)


def linear_probe_accuracy(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    dims: Sequence[int],
    *,
    steps: int = 600,
    batch: int = 1024,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Test accuracy of a linear classifier a prefix, all trained at once on frozen vectors.

    Columns are centred and divided by one scale. Adam with a falling rate, the same for every
    prefix; fp32, on the vectors' device.

    Args:
        train: ``[N, D]``; train_labels: ``[N]``, from 0 to below the number of classes, or
            strings.
        test: ``[M, D]``; test_labels: ``[M]``; one that no training vector has is never hit.
        dims: Prefix widths, each in ``[1, D]``, in any order.
        steps: Of the optimiser. batch: Rows a step. seed: Of the weights and the batches' order.
        on_step: Called after each step, for a progress bar.

    Returns:
        One accuracy in ``[0, 1]`` a dim, in their order.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; no rows.
    """
    (train, train_labels, test, test_labels), dims = _checked_sets(
        train, train_labels, test, test_labels, dims
    )
    steps, batch = check_int(steps, "steps", 1), check_int(batch, "batch", 1)
    ascending = tuple(sorted(dims))
    with (
        torch.inference_mode(False),  # whatever the caller evaluates under
        torch.enable_grad(),
        torch.device("cpu"),  # where Adam makes its counters
        torch.autocast(train.device.type, enabled=False),
    ):
        heads, standardised = _trained_probe(
            train.detach(), train_labels, ascending, steps, batch, seed, on_step
        )
    predicted = [
        matryoshka_predict(standardised(part), heads.weight, ascending, bias=heads.bias).labels
        for part in test.split(PREDICTED_ROWS)
    ]
    shares = accuracy(torch.cat(predicted, dim=1), test_labels)
    return [shares[ascending.index(dim)] for dim in dims]


def _trained_probe(
    train: Tensor,
    train_labels: Tensor,
    dims: Sequence[int],
    steps: int,
    batch: int,
    seed: int,
    on_step: Callable[[], object],
) -> tuple[MRLLinear, Callable[[Tensor], Tensor]]:
    """A linear classifier a prefix, and what makes its inputs of vectors."""
    mean = train.mean(dim=0, dtype=torch.float32)
    variance = (train.float() - mean).square().mean()
    scale = variance.sqrt().clamp_min(torch.finfo(torch.float32).tiny)

    def standardised(x: Tensor) -> Tensor:
        return (x.float() - mean) / scale

    generator = torch.Generator("cpu").manual_seed(seed)  # the same batches on every device
    classes = int(train_labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        heads = MRLLinear(dims, classes, device="cpu", dtype=torch.float32).to(train.device)
    loss_fn = MatryoshkaCrossEntropyLoss()
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(
            len(train),
            (min(batch, len(train)),),
            generator=generator,
            dtype=torch.int64,
            device="cpu",
        ).to(train.device)
        optimizer.zero_grad()
        loss_fn(heads, standardised(train[rows]), train_labels[rows]).backward()
        optimizer.step()
        schedule.step()
        on_step()
    return heads, standardised


def few_shot_accuracy(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    dims: Sequence[int],
    *,
    shots: int = 5,
    episodes: int = 10,
    seed: int = 0,
) -> list[float]:
    """Test accuracy of the nearest class mean of a few training vectors a class.

    Prefixes are normalised, averaged by class, and compared by cosine; equally near means are in
    the order of labels. Every episode draws other training vectors, the same for every dim.

    Args:
        train: ``[N, D]``; train_labels: ``[N]``, at least ``shots`` of each label.
        test: ``[M, D]``; test_labels: ``[M]``; one that no training vector has is never hit.
        dims: Prefix widths, each in ``[1, D]``, in any order.
        shots: Training vectors a class. episodes: Draws that are averaged. seed: Of the draws.

    Returns:
        One accuracy in ``[0, 1]`` a dim, in their order.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; no rows; a
            class of fewer rows than ``shots``.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 5.1.
    """
    given = train_labels
    (train, train_labels, test, test_labels), dims = _checked_sets(
        train, train_labels, test, test_labels, dims
    )
    shots, episodes = check_int(shots, "shots", 1), check_int(episodes, "episodes", 1)
    labels, inverse, counts = train_labels.unique(return_inverse=True, return_counts=True)  # [C]
    if counts.min() < shots:
        label, count = _given(given, inverse == counts.argmin()), int(counts.min())
        raise ValueError(
            f"shots: expected at most the rows of every class, got {shots}, "
            f"and {count} of label {label} in train_labels"
        )
    first = counts.cumsum(0) - counts
    places = first[:, None] + arange(0, shots, train)  # [C, shots]
    generator = torch.Generator("cpu").manual_seed(seed)  # the same draws on every device
    sums = [0.0] * len(dims)
    for _ in range(episodes):
        shuffled = torch.randperm(
            len(train), generator=generator, dtype=torch.int64, device="cpu"
        ).to(train.device)
        by_class = shuffled[inverse[shuffled].argsort(stable=True)]
        few = train[by_class[places]].float()  # [C, shots, D]
        predicted = []
        for dim in dims:
            means = F.normalize(few[..., :dim], dim=2).mean(dim=1).to(test.dtype)
            nearest = prefix_topk(test, means, 1, dim=dim, metric="cosine").ids[:, 0]
            predicted.append(labels[nearest])
        shares = accuracy(torch.stack(predicted), test_labels)
        sums = [total + share for total, share in zip(sums, shares, strict=True)]
    return [total / episodes for total in sums]


def _given(labels: Any, rows: Tensor) -> Any:
    """The label of the first of some rows ``[N]`` bool, as it was given."""
    row = int(rows.nonzero()[0])
    return int(labels[row]) if isinstance(labels, Tensor) else np.asarray(labels)[row]


def accuracy(predicted: Any, labels: Any) -> list[float]:
    """Share of rows that each prefix predicts right.

    Args:
        predicted: ``[G, M]``: ``matryoshka_predict(x, head.weight, head.dims,
            bias=head.bias).labels``, or any labels.
        labels: ``[M]``.
    """
    return _right(predicted, labels).double().mean(dim=1).tolist()


def oracle_accuracy(predicted: Any, labels: Any) -> float:
    """Share of rows that any prefix predicts right: a bound for every way to choose among them.

    Args:
        predicted: ``[G, M]``, as in ``accuracy``. labels: ``[M]``.
    """
    return _right(predicted, labels).any(dim=0).double().mean().item()


def superclass_accuracy(predicted: Any, labels: Any, superclass: Any) -> list[float]:
    """Share of rows for which each prefix predicts a class of the right superclass.

    Args:
        predicted: ``[G, M]`` integers, as in ``accuracy``. labels: ``[M]`` integers.
        superclass: ``[V]``, of each class.
    """
    rows, right = _checked_predictions(predicted, labels)
    (superclass,) = numbered({"superclass": superclass})
    of_class = checked_labels(superclass, "superclass", None, right)
    classes = len(of_class)
    for x, name in ((rows, "predicted"), (right, "labels")):
        if (wrong := x[(x < 0) | (x >= classes)]).numel():
            raise ValueError(
                f"{name}: expected classes in [0, {classes}) as in superclass, got {int(wrong[0])}"
            )
    return accuracy(of_class[rows], of_class[right])


Sets = tuple[Tensor, Tensor, Tensor, Tensor]


def _checked_sets(
    train: Any, train_labels: Any, test: Any, test_labels: Any, dims: Sequence[int]
) -> tuple[Sets, tuple[int, ...]]:
    x, y, dims = checked_vectors(train, test, dims, names=("train", "test"))
    of_x, of_y = numbered({"train_labels": train_labels, "test_labels": test_labels})
    of_x = checked_labels(of_x, "train_labels", len(x), x)
    return (x, of_x, y, checked_labels(of_y, "test_labels", len(y), y)), dims


def _right(predicted: Any, labels: Any) -> Tensor:  # [G, M]
    predicted, labels = numbered({"predicted": predicted, "labels": labels})
    rows, right = _checked_predictions(predicted, labels)
    return rows == right


def _checked_predictions(predicted: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """``[G, M]`` and ``[M]`` int64."""
    rows = as_integers(predicted, "predicted")
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(
            f"predicted: expected shape [G, M], neither of them 0, got {list(rows.shape)}"
        )
    return rows, checked_labels(labels, "labels", rows.shape[1], rows)
