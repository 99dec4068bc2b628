"""How well a label is told from a prefix: by neighbours, by a linear probe, by a few examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast.evaluate.common import arange, check_labels, check_vectors, kind
from mrl_fast.search.ops import prefix_topk
from mrl_fast.shared.checks import check_int
from mrl_fast.training.heads import MRLLinear, matryoshka_predict
from mrl_fast.training.modules import MatryoshkaCrossEntropyLoss

PREDICTED_ROWS = 1 << 14  # rows that are standardised and predicted at a time


def nearest_neighbour_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    dims: Sequence[int],
    *,
    k: int = 1,
    metric: str = "cosine",
) -> list[float]:
    """Share of test vectors that most of their k nearest training vectors by a prefix agree with.

    Among labels of equally many neighbours the one of the nearest neighbour wins.

    Args:
        train: ``[N, D]``; train_labels: ``[N]`` int64.
        test: ``[M, D]``; test_labels: ``[M]`` int64.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        k: Neighbours that vote, in ``[1, N]``.
        metric: As in ``prefix_topk``.

    Returns:
        One accuracy in ``[0, 1]`` a dim.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; no rows.
    """
    dims = _check_sets(train, train_labels, test, test_labels, dims)
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
    prefix; fp32, on the vectors' device.

    Args:
        train: ``[N, D]``; train_labels: ``[N]`` int64, from 0 to the number of classes.
        test: ``[M, D]``; test_labels: ``[M]`` int64.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        steps: Of the optimiser. batch: Rows a step. seed: Of the weights and the batches' order.
        on_step: Called after each step, for a progress bar.

    Returns:
        One accuracy in ``[0, 1]`` a dim.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; no rows.
    """
    dims = _check_sets(train, train_labels, test, test_labels, dims)
    steps, batch = check_int(steps, "steps", 1), check_int(batch, "batch", 1)
    with (
        torch.inference_mode(False),  # whatever the caller evaluates under
        torch.enable_grad(),
        torch.device("cpu"),  # where Adam makes its counters
        torch.autocast(train.device.type, enabled=False),
    ):
        heads, standardised = _trained_probe(
            train.detach(), train_labels, dims, steps, batch, seed, on_step
        )
    predicted = [
        matryoshka_predict(standardised(part), heads.weight, dims, bias=heads.bias).labels
        for part in test.split(PREDICTED_ROWS)
    ]
    return accuracy(torch.cat(predicted, dim=1), test_labels)


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
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
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
        train: ``[N, D]``; train_labels: ``[N]`` int64, at least ``shots`` of each label.
        test: ``[M, D]``; test_labels: ``[M]`` int64; one that no training vector has is never hit.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        shots: Training vectors a class. episodes: Draws that are averaged. seed: Of the draws.

    Returns:
        One accuracy in ``[0, 1]`` a dim.

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range; no rows; a
            class of fewer rows than ``shots``.

    Source: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, section 5.1.
    """
    dims = _check_sets(train, train_labels, test, test_labels, dims)
    shots, episodes = check_int(shots, "shots", 1), check_int(episodes, "episodes", 1)
    labels, inverse, counts = train_labels.unique(return_inverse=True, return_counts=True)  # [C]
    if counts.min() < shots:
        label, count = int(labels[counts.argmin()]), int(counts.min())
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


def accuracy(predicted: Tensor, labels: Tensor) -> list[float]:
    """Share of rows that each prefix predicts right.

    Args:
        predicted: ``[G, M]`` int64: ``matryoshka_predict(x, head.weight, head.dims,
            bias=head.bias).labels``.
        labels: ``[M]`` int64.
    """
    return _right(predicted, labels).double().mean(dim=1).tolist()


def oracle_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of rows that any prefix predicts right: a bound for every way to choose among them.

    Args:
        predicted: ``[G, M]`` int64, as in ``accuracy``. labels: ``[M]`` int64.
    """
    return _right(predicted, labels).any(dim=0).double().mean().item()


def superclass_accuracy(predicted: Tensor, labels: Tensor, superclass: Tensor) -> list[float]:
    """Share of rows for which each prefix predicts a class of the right superclass.

    Args:
        predicted: ``[G, M]`` int64, as in ``accuracy``. labels: ``[M]`` int64.
        superclass: ``[V]`` int64, of each class.
    """
    _right(predicted, labels)
    classes = check_labels(superclass, "superclass", None, labels)
    for x, name in ((predicted, "predicted"), (labels, "labels")):
        if (wrong := x[(x < 0) | (x >= classes)]).numel():
            raise ValueError(
                f"{name}: expected classes in [0, {classes}) as in superclass, got {int(wrong[0])}"
            )
    return accuracy(superclass[predicted], superclass[labels])


def _check_sets(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, dims: Sequence[int]
) -> tuple[int, ...]:
    dims = check_vectors(train, test, dims, names=("train", "test"))
    check_labels(train_labels, "train_labels", len(train), train)
    check_labels(test_labels, "test_labels", len(test), test)
    return dims


def _right(predicted: Tensor, labels: Tensor) -> Tensor:  # [G, M]
    if not isinstance(predicted, Tensor) or predicted.dtype != torch.int64:
        raise TypeError(f"predicted: expected an int64 tensor, got {kind(predicted)}")
    if predicted.ndim != 2 or not predicted.numel():
        raise ValueError(
            f"predicted: expected shape [G, M], neither of them 0, got {list(predicted.shape)}"
        )
    check_labels(labels, "labels", predicted.shape[1], predicted)
    return predicted == labels
