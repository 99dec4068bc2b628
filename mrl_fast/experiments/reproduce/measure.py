"""One set and one seed: its encoders, and everything that the report says of them.

The result, a cell, is a dict that JSON can hold; accuracies and mAP are shares in ``[0, 1]``, one a
dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

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
from mrl_fast.experiments.common import machine, principal_components
from mrl_fast.experiments.reproduce.data import PARTS, Task
from mrl_fast.experiments.reproduce.train import encode, train_encoder
from mrl_fast.search.ops import funnel_search, prefix_topk
from mrl_fast.training.cascade import AdaptiveClassifier
from mrl_fast.training.heads import MRLLinear, matryoshka_predict

K = 10
SHORTLIST = 200
SHOTS = (1, 3, 5, 7, 9)
EPISODES = 10
TOLERANCE = 0.001  # accuracy on the holdout that the cascade may lose, calibrated for cost
TIMED_QUERIES, REPETITIONS = 1000, 5
PROBES = 4  # linear probes a cell
MAPPED = ("FF", "MRL", "SVD", "truncated FF")  # whose mAP the report has

Vectors = dict[str, Tensor]  # by part
Sets = tuple[Tensor, Tensor, Tensor, Tensor]  # train, its labels, test, its labels


def steps_of(task: Task) -> int:
    """How often ``on_step`` is called for a cell."""
    return (2 + len(task.dims)) * task.epochs + PROBES + 1


class Nets(NamedTuple):
    """Encoders' vectors by part, each with its head."""

    mrl: tuple[Vectors, MRLLinear]
    mrl_e: tuple[Vectors, MRLLinear]
    fixed: list[tuple[Vectors, MRLLinear]]  # FF-k, one of each dim

    @classmethod
    def trained(cls, task: Task, seed: int, on_step: Callable[[str], object]) -> Nets:
        def train(name: str, dims: Sequence[int], *, tied: bool = False):
            encoder, head = train_encoder(
                task.inputs["train"], task.labels["train"], dims, epochs=task.epochs, seed=seed,
                tied=tied, on_epoch=lambda note: on_step(name),
            )  # fmt: skip
            return {part: encode(encoder, task.inputs[part]) for part in PARTS}, head

        return cls(
            train("MRL", task.dims),
            train("MRL-E", task.dims, tied=True),
            [train(f"FF-{dim}", (dim,)) for dim in task.dims],
        )


def measure(
    task: Task, seed: int, *, probe_steps: int, on_step: Callable[[str], object]
) -> dict[str, Any]:
    """Trains MRL, MRL-E and an ordinary net FF-k for each of the task's dims, and measures them.

    Args:
        task: The set, as this seed draws or splits it.
        seed: Seeds the encoders, the probes' batches and the few shots.
        probe_steps: Steps of a linear probe's optimiser.
        on_step: Called with what was done, ``steps_of(task)`` times.
    """
    dims, labels = task.dims, task.labels
    nets = Nets.trained(task, seed, on_step)
    (mrl, mrl_head), (full, full_head) = nets.mrl, nets.fixed[-1]
    columns = torch.randperm(dims[-1], generator=torch.Generator().manual_seed(seed))
    pca = principal_components(full["train"], full["test"])
    svd_basis = torch.linalg.svd(full["train"], full_matrices=False).Vh.T  # [D, D]
    by_prefix = {
        "MRL": mrl,
        "MRL-E": nets.mrl_e[0],
        "SVD": {part: full[part] @ svd_basis for part in ("train", "test")},
        "PCA": dict(zip(("train", "test"), pca, strict=True)),
        "truncated FF": full,
        "random columns": {part: x[:, columns] for part, x in full.items()},
    }

    def sets(vectors: Vectors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return vectors["train"], labels["train"], vectors["test"], labels["test"]

    def probe(vectors: Vectors, dims: Sequence[int], name: str) -> list[float]:
        found = linear_probe_accuracy(*sets(vectors), dims, steps=probe_steps, seed=seed)
        on_step(f"probe of {name}")
        return found

    predicted = {  # [G, M]
        "MRL": labels_of(mrl["test"], mrl_head),
        "MRL-E": labels_of(nets.mrl_e[0]["test"], nets.mrl_e[1]),
        "FF": torch.cat([labels_of(x["test"], head) for x, head in nets.fixed]),
        "SVD": labels_by_rank(by_prefix["SVD"]["test"], svd_basis, full_head, dims),
    }
    linear = {name: accuracy(found, labels["test"]) for name, found in predicted.items()}
    frozen = {"MRL-LP": "truncated FF", "Rand-LP": "random columns", "PCA": "PCA"}
    linear |= {name: probe(by_prefix[of], dims, name) for name, of in frozen.items()}
    shot = ("MRL", "truncated FF", "SVD")
    everything = sorted({*dims, *between_dims(dims)})
    cell = {
        "task": task.name,
        "seed": seed,
        "dims": list(dims),
        "classes": mrl_head.num_classes,
        "machine": machine(),
        "rows": {part: len(labels[part]) for part in PARTS},
        "linear": linear,
        **retrieved({name: sets(x) for name, x in by_prefix.items()}, nets, sets, dims),
        "few_shot": {name: few_shots(sets(by_prefix[name]), dims, seed) for name in shot},
        "adaptive": adaptive(mrl, mrl_head, labels),
        "oracle": oracle_accuracy(predicted["MRL"], labels["test"]),
        "interpolated": {
            "dims": everything,
            "nearest": nearest_neighbour_accuracy(*sets(mrl), everything),
            "linear": probe(mrl, everything, "dims in between"),
        },
        "searches": searches(mrl, labels, dims),
    }
    if task.superclass is not None:
        cell["superclass"] = superclasses(predicted, labels["test"], task.superclass)
    on_step("search")
    return cell


def retrieved(
    by_prefix: dict[str, Sets], nets: Nets, sets: Callable[[Vectors], Sets], dims: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """1-NN accuracy of all vectors, and mAP of those in MAPPED, one a dim."""

    def of(vectors: Sets, dims: Sequence[int]) -> list[Retrieval]:
        x, y, q, target = vectors
        return retrieval(q, target, x, y, dims, k=K)

    found = {name: of(vectors, dims) for name, vectors in by_prefix.items()}
    found["FF"] = [of(sets(x), (d,))[0] for d, (x, _) in zip(dims, nets.fixed, strict=True)]
    return {
        "nearest": {name: [each.top1 for each in by_dim] for name, by_dim in found.items()},
        "map": {name: [each.map for each in found[name]] for name in MAPPED},
    }


def few_shots(sets: Sets, dims: Sequence[int], seed: int) -> dict[str, list[float]]:
    """Accuracies by the number of shots, one a dim."""
    return {
        str(shots): few_shot_accuracy(*sets, dims, shots=shots, episodes=EPISODES, seed=seed)
        for shots in SHOTS
    }


def superclasses(
    predicted: dict[str, Tensor], target: Tensor, superclass: Tensor
) -> dict[str, Any]:
    others = torch.bincount(superclass)[superclass] - 1  # [V]: other classes of its superclass
    return {
        "MRL": superclass_accuracy(predicted["MRL"], target, superclass),
        "FF": superclass_accuracy(predicted["FF"], target, superclass),
        # the probability that a random error stays within the superclass
        "chance": others[target].double().mean().item() / (len(others) - 1),
    }


def labels_of(x: Tensor, head: MRLLinear) -> Tensor:
    """``[G, M]`` int64."""
    return matryoshka_predict(x, head.weight, head.dims, bias=head.bias).labels


def labels_by_rank(rotated: Tensor, basis: Tensor, head: MRLLinear, dims: Sequence[int]) -> Tensor:
    """What an ordinary head predicts from only the first singular directions of its features."""
    weight = head.heads[0].get_parameter("weight").detach() @ basis  # [V, D], rotated like x
    bias = head.heads[0].get_parameter("bias").detach()
    return matryoshka_predict(rotated, weight, dims, bias=bias).labels


def between_dims(dims: Sequence[int]) -> list[int]:
    """Widths that nothing was trained for: the geometric means of neighbouring dims."""
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
        cascade.set_thresholds([threshold] * (len(cascade.dims) - 1))
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
