"""What an index must answer: a dict of vectors by id in their order, and scores by fp64 sums."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.testing import assert_same_topk
from tests.helpers.search import brute_force, held

# How many times as long random tests run as in the test suite; `make fuzz` sets it.
TIMES = int(os.environ.get("MRL_FAST_FUZZ", "1"))
ROOT = Path(__file__).parents[2]
DIMS = (5, 20)


@pytest.fixture(autouse=True)
def one_thread():
    """Where there is little to compute, threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vectors(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


class Model:
    """The vectors of an index, by id in the order of rows, as they were given."""

    def __init__(self, width: int):
        self.width, self.next_id = width, 0
        self.vectors: dict[int, Tensor] = {}

    def copy(self) -> Model:
        copy = Model(self.width)
        copy.next_id, copy.vectors = self.next_id, dict(self.vectors)
        return copy

    @property
    def ids(self) -> list[int]:
        return list(self.vectors)

    @property
    def matrix(self) -> Tensor:
        return torch.stack([*self.vectors.values(), torch.empty(self.width)])[:-1]

    def add(self, x: Tensor, ids: list[int] | None = None) -> None:
        for i, row in zip(range(self.next_id, self.next_id + len(x)) if ids is None else ids, x):  # noqa: B905
            assert i not in self.vectors
            self.vectors[i] = row
            self.next_id = max(self.next_id, i + 1)

    def update(self, ids: list[int], x: Tensor) -> None:
        self.remove(ids)
        for i, row in zip(ids, x, strict=True):
            self.vectors[i] = row

    def remove(self, ids: list[int]) -> None:
        for i in set(ids):
            del self.vectors[i]


class Answers:
    """What an index must answer to queries, of all vectors or of those that are allowed."""

    def __init__(
        self, index: MatryoshkaIndex, model: Model, q: Tensor, among: set[int] | None = None
    ):
        x = model.matrix
        rotation = index._rows.rotation
        if rotation is not None and len(x):  # exact means by the vectors as stored
            x, q = rotation.apply(x), rotation.apply(q)
        self.ids = torch.tensor(model.ids, dtype=torch.int64)
        self.scores = brute_force(q, held(x, index.dtype), index.metric)  # [B, N]
        if among is not None:
            out = torch.tensor([i not in among for i in model.ids], dtype=torch.bool)
            self.scores[:, out] = -torch.inf

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Scores and ids, equal scores in the order of rows, −inf and −1 where missing."""
        missing = torch.full((len(self.scores), k), -torch.inf, dtype=torch.float64)
        scores = torch.cat([self.scores, missing], dim=1)
        order = scores.sort(dim=1, descending=True, stable=True)
        ids = torch.cat([self.ids, torch.full((k,), -1)])[order.indices]
        ids[order.values == -torch.inf] = -1
        return order.values[:, :k], ids[:, :k]

    def check_exact(self, result: Any) -> None:
        scores, ids = self.top(result.ids.shape[1])
        assert torch.equal(result.ids, ids)
        torch.testing.assert_close(result.scores, scores.float(), rtol=2e-7, atol=1e-30)

    def check_staged(self, result: Any) -> None:
        """Checks a search by stages that keep every row. It ranks by fp32 scores, so close ones may
        change places."""
        rows = {i: row for row, i in enumerate(self.ids.tolist())}
        rows[-1] = -1
        assert set(result.ids.ravel().tolist()) <= set(rows)
        found = torch.tensor([[rows[i] for i in mine] for mine in result.ids.tolist()])
        finite = self.scores[self.scores > -torch.inf].abs()
        tolerance = 1e-5 * max(1.0, float(finite.max()) if len(finite) else 1.0)
        assert_same_topk(
            (result.scores, found.reshape(result.ids.shape)),
            self.scores,
            name="staged",
            tolerance=tolerance,
        )

    def check_range(self, result: Any, everything: Any, threshold: float) -> None:
        """``everything``: an exact search for all vectors, checked before."""
        assert result.lims[0] == 0 and result.lims[-1] == len(result.ids) == len(result.scores)
        for b, (scores, ids) in enumerate(zip(*everything, strict=True)):
            mine = slice(int(result.lims[b]), int(result.lims[b + 1]))
            reach = (scores >= threshold) & (ids >= 0)
            assert torch.equal(result.ids[mine], ids[reach])
            assert torch.equal(result.scores[mine], scores[reach])


def assert_same(index: MatryoshkaIndex, model: Model, seed: int = 0) -> None:
    """Compares ids, vectors and a few exact answers; and that a graph, if there is one, leads to
    every row."""
    assert len(index) == len(model.vectors) and index.ids.tolist() == model.ids
    back = index.reconstruct(index.ids)
    if index.rotation is None:
        assert torch.equal(back, held(model.matrix, index.dtype))
    else:
        rounding = 1e-5 if index.dtype == "float32" else 0.05
        torch.testing.assert_close(back, model.matrix, atol=rounding, rtol=rounding)
    q = vectors(2, index.width, seed)
    for k in (3, len(index) + 2):
        Answers(index, model, q).check_exact(index.search(q, k, exact=True))
    if index._rows.snapshot.graph is not None and (n := len(index)):
        found = index.search(q, n, stages=[("graph", 2 * n, n), (index.width, n)])
        assert found.ids.sort(dim=1).values.tolist() == [sorted(model.ids)] * 2


def build(rows: int = 150, seed: int = 0, **options: Any) -> tuple[MatryoshkaIndex, Model]:
    index, model = MatryoshkaIndex(DIMS, **options), Model(DIMS[-1])
    for target in (index, model):
        target.add(vectors(rows, DIMS[-1], seed))
    return index, model


def change(index: MatryoshkaIndex, model: Model, seed: int = 5) -> None:
    """Adds, removes and replaces."""
    x = vectors(75, DIMS[-1], seed)
    gone, replaced = model.ids[3:40:3], model.ids[1:40:9]
    index.add(x[:70])
    model.add(x[:70])
    index.remove(torch.tensor(gone))
    model.remove(gone)
    index.update(torch.tensor(replaced), x[70:])
    model.update(replaced, x[70:])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Saves do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def strays(folder: Path, *known: str) -> list[str]:
    """Files in an index's folder that do not belong to it."""
    manifest = json.loads((folder / manifests.FILE).read_text())
    return sorted(set(names(folder)) - manifests.files_of(manifest) - {manifests.FILE, *known})
