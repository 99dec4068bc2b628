"""One set and one seed: eight encoders, and everything that the report says of them.

A cell is a dict that JSON can hold; accuracies and mAP are shares in ``[0, 1]``, one a dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mrl_fast.evaluate import (
    Retrieval,
    accuracy,
    few_shot_accuracy,
    linear_probe_accuracy,
    nearest_neighbour_accuracy,
    oracle_accuracy,
    retrieval,
    retrieval_of,
    superclass_accuracy,
)
from mrl_fast.experiments.demo.report import machine
from mrl_fast.experiments.demo.train import encode, principal_components, train_encoder
from mrl_fast.experiments.reproduce.data import PARTS, Task
from mrl_fast.search.ops import funnel_search, prefix_topk
from mrl_fast.training.cascade import AdaptiveClassifier
from mrl_fast.training.heads import MRLLinear, matryoshka_predict

K = 10
SHORTLIST = 200
SHOTS = (1, 3, 5, 7, 9)
EPISODES = 10
TOLERANCE = 0.001  # of the holdout, for the cascade that is calibrated for cost
TIMED_QUERIES, REPETITIONS = 1000, 5
PROBES = 4  # linear probes a cell
MAPPED = ("FF", "MRL", "SVD", "truncated FF")  # whose mAP the report has

Vectors = dict[str, Tensor]  # by part


def steps_of(task: Task) -> int:
    """How often ``on_step`` is called for a cell."""
    return (2 + len(task.dims)) * task.epochs + PROBES + 1


def measure(
    task: Task, seed: int, *, probe_steps: int, on_step: Callable[[str], object]
) -> dict[str, Any]:
    """Trains MRL, MRL-E and an ordinary net FF-k for each of the task's dims, and measures them.

    Args:
        task: The set; one of its random draws.
        seed: Of the encoders, the probes' batches and the few shots.
        probe_steps: Of a linear probe's optimiser.
        on_step: Called with what was done, ``steps_of(task)`` times.
    """
    dims, width = task.dims, task.dims[-1]
    labels, train_labels, test_labels = task.labels, task.labels["train"], task.labels["test"]

    def trained(name: str, dims: Sequence[int], *, tied: bool = False) -> tuple[Vectors, MRLLinear]:
        encoder, head = train_encoder(
            task.inputs["train"],
            train_labels,
            dims,
            epochs=task.epochs,
            seed=seed,
            tied=tied,
            on_epoch=lambda note: on_step(name),
        )
        return {part: encode(encoder, task.inputs[part]) for part in PARTS}, head

    mrl, mrl_head = trained("MRL", dims)
    mrl_e, mrl_e_head = trained("MRL-E", dims, tied=True)
    fixed = [trained(f"FF-{dim}", (dim,)) for dim in dims]
    full, full_head = fixed[-1]

    columns = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    rotated = dict(
        zip(("train", "test"), principal_components(full["train"], full["test"]), strict=True)
    )
    svd_basis = torch.linalg.svd(full["train"], full_matrices=False).Vh.T  # [D, D]
    frozen = {
        "MRL-LP": full,
        "Rand-LP": {part: x[:, columns] for part, x in full.items()},
        "PCA": rotated,
    }
    svd = {part: full[part] @ svd_basis for part in ("train", "test")}

    def sets(vectors: Vectors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return vectors["train"], train_labels, vectors["test"], test_labels

    def probe(vectors: Vectors, dims: Sequence[int], name: str) -> list[float]:
        found = linear_probe_accuracy(*sets(vectors), dims, steps=probe_steps, seed=seed)
        on_step(f"probe of {name}")
        return found

    predicted = labels_of(mrl["test"], mrl_head)  # [G, M]
    fixed_predicted = torch.cat([labels_of(x["test"], head) for x, head in fixed])
    linear = {
        "MRL": accuracy(predicted, test_labels),
        "MRL-E": accuracy(labels_of(mrl_e["test"], mrl_e_head), test_labels),
        "FF": accuracy(fixed_predicted, test_labels),
        "SVD": accuracy(labels_by_rank(svd["test"], svd_basis, full_head, dims), test_labels),
    }
    linear |= {name: probe(vectors, dims, name) for name, vectors in frozen.items()}

    def retrieved(vectors: Vectors, dims: Sequence[int]) -> list[Retrieval]:
        return retrieval(vectors["test"], test_labels, vectors["train"], train_labels, dims, k=K)

    by_prefix = {
        "MRL": mrl,
        "MRL-E": mrl_e,
        "SVD": svd,
        "PCA": rotated,
        "truncated FF": full,
        "random columns": frozen["Rand-LP"],
    }
    found = {name: retrieved(vectors, dims) for name, vectors in by_prefix.items()}
    found["FF"] = [retrieved(x, (d,))[0] for d, (x, _) in zip(dims, fixed, strict=True)]

    few = {
        name: {
            str(shots): few_shot_accuracy(
                *sets(by_prefix[name]), dims, shots=shots, episodes=EPISODES, seed=seed
            )
            for shots in SHOTS
        }
        for name in ("MRL", "truncated FF", "SVD")
    }
    everything = sorted({*dims, *between_dims(dims)})
    cell = {
        "task": task.name,
        "seed": seed,
        "dims": list(dims),
        "classes": mrl_head.num_classes,
        "machine": machine(),
        "rows": {part: len(labels[part]) for part in PARTS},
        "linear": linear,
        "nearest": {name: [each.top1 for each in by_dim] for name, by_dim in found.items()},
        "map": {name: [each.map for each in found[name]] for name in MAPPED},
        "few_shot": few,
        "adaptive": adaptive(mrl, mrl_head, labels),
        "oracle": oracle_accuracy(predicted, test_labels),
        "interpolated": {
            "dims": everything,
            "nearest": nearest_neighbour_accuracy(*sets(mrl), everything),
            "linear": probe(mrl, everything, "dims in between"),
        },
        "searches": searches(mrl, labels, dims),
    }
    if task.superclass is not None:
        others = torch.bincount(task.superclass)[task.superclass] - 1  # [V], of its superclass
        chance = others[test_labels].double().mean().item() / (len(others) - 1)
        cell["superclass"] = {
            "MRL": superclass_accuracy(predicted, test_labels, task.superclass),
            "FF": superclass_accuracy(fixed_predicted, test_labels, task.superclass),
            "chance": chance,  # that an error at random stays within the superclass
        }
    on_step("search")
    return cell


def labels_of(x: Tensor, head: MRLLinear) -> Tensor:
    """``[G, M]`` int64."""
    return matryoshka_predict(x, head.weight, head.dims, bias=head.bias).labels


def labels_by_rank(rotated: Tensor, basis: Tensor, head: MRLLinear, dims: Sequence[int]) -> Tensor:
    """What an ordinary head predicts from the first singular directions of its features alone."""
    weight = head.heads[0].get_parameter("weight").detach() @ basis  # [V, D], of the rotated
    bias = head.heads[0].get_parameter("bias").detach()
    return matryoshka_predict(rotated, weight, dims, bias=bias).labels


def between_dims(dims: Sequence[int]) -> list[int]:
    """Widths that nothing was trained for, halfway between two that were, by ratio."""
    return [round((a * b) ** 0.5) for a, b in zip(dims, dims[1:], strict=False)]


def adaptive(vectors: Vectors, head: MRLLinear, labels: dict[str, Tensor]) -> dict[str, Any]:
    """The cascade by the paper's thresholds and by ours, and a curve of one threshold for all."""
    cascade = AdaptiveClassifier(head)
    x, y = vectors["test"], labels["test"]
    found: dict[str, Any] = {}
    for name, tolerance in (("paper", None), ("cheapest", TOLERANCE)):
        cascade.calibrate(vectors["holdout"], labels["holdout"], tolerance=tolerance)
        found[name] = {"thresholds": cascade.thresholds.tolist(), **judged(cascade, x, y)}
    found["curve"] = []
    for threshold in torch.linspace(0, 1, 21).tolist():
        cascade.thresholds.fill_(threshold)
        found["curve"].append(judged(cascade, x, y))
    return found


def judged(cascade: AdaptiveClassifier, x: Tensor, y: Tensor) -> dict[str, float]:
    prediction = cascade.predict(x)
    cost = cascade.cost(prediction)
    right = (prediction.labels == y).double().mean().item()
    return {"accuracy": right, "dims": cost.dims, "evaluated_dims": cost.evaluated_dims}


def searches(
    vectors: Vectors, labels: dict[str, Tensor], dims: Sequence[int]
) -> list[dict[str, Any]]:
    """Single-shot at each dim, adaptive retrieval from each shorter one, and funnels.

    ``macs`` is multiply-adds a query; ``ms`` the median time of a call with ``TIMED_QUERIES``, the
    searches taking turns.
    """
    database, queries = vectors["train"], vectors["test"]
    rows, width = len(database), dims[-1]
    kinds: list[tuple[str, list[tuple[int, int]]]] = [("single", [(d, K)]) for d in dims]
    kinds += [("adaptive", [(d, SHORTLIST), (width, K)]) for d in dims[:-1]]
    for i, first in enumerate(dims[:-2]):
        middle = dims[i + 1 : -1]
        keeps = [max(K, SHORTLIST // 2 ** (j + 1)) for j in range(len(middle))]
        stages = [(first, SHORTLIST), *zip(middle, keeps, strict=True), (width, K)]
        kinds.append(("funnel", stages))

    def search(stages: list[tuple[int, int]], q: Tensor) -> Tensor:
        if len(stages) == 1:
            return prefix_topk(q, database, K, dim=stages[0][0], metric="cosine").ids
        return funnel_search(q, database, stages, metric="cosine").ids

    times: list[list[float]] = [[] for _ in kinds]
    for repetition in range(-1, REPETITIONS):  # the first is not counted
        for (_, stages), taken in zip(kinds, times, strict=True):
            begin = time.perf_counter()
            search(stages, queries[:TIMED_QUERIES])
            if repetition >= 0:
                taken.append(1e3 * (time.perf_counter() - begin))
    found = []
    for (kind, stages), taken in zip(kinds, times, strict=True):
        macs = rows * stages[0][0]
        macs += sum(keep * dim for (_, keep), (dim, _) in zip(stages, stages[1:], strict=False))
        judged_by_label = retrieval_of(search(stages, queries), labels["test"], labels["train"])
        found.append(
            {
                "kind": kind,
                "stages": stages,
                "map": judged_by_label.map,
                "top1": judged_by_label.top1,
                "macs": macs,
                "ms": median(taken),
            }
        )
    return found
