"""Adding, replacing, removing, saving and loading in any order, against a dict and fp64 sums."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.disk import folder
from mrl_fast.search.index import store
from tests.helpers.index_model import TIMES, Answers, Model, assert_same, one_thread, vectors  # noqa: F401
from tests.helpers.search import METRICS

DIMS = (5, 8, 20)
SIZES = st.sampled_from([0, 1, 2, 63, 64, 130])  # about tiles of 64 rows
SEEDS = st.integers(0, 1 << 20)


class Machine(RuleBasedStateMachine):
    def __init__(self, root: Path, metric: str, prefix_dtype: str):
        super().__init__()
        self.root, self.options = Path(tempfile.mkdtemp(dir=root)), (metric, prefix_dtype)
        self.folders: dict[str, Model] = {}  # what was saved where
        self.left: list[tuple[MatryoshkaIndex, Model]] = []  # whose files may be gone

    @initialize(
        dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
        rotation=st.sampled_from([None, "pca"]),
        rows=st.sampled_from([0, 1, 64, 300]),
        seed=SEEDS,
    )
    def begin(self, dtype, rotation, rows, seed):
        metric, prefix_dtype = self.options
        self.index = MatryoshkaIndex(
            DIMS, metric=metric, dtype=dtype, prefix_dtype=prefix_dtype, rotation=rotation
        )
        self.model = Model(DIMS[-1])
        self.add(rows, seed)

    def new_vectors(self, rows: int, seed: int) -> torch.Tensor:
        x = vectors(rows, DIMS[-1], seed)
        if seed % 3 == 0 and len(self.model.vectors):  # equal to others
            old = self.model.matrix
            x[::2] = old[torch.arange(len(x[::2])) * 7 % len(old)]
        elif seed % 3 == 1 and self.index.metric != "cosine":  # sums are exact, many equal
            x = x.clamp(-1.5, 1.5).round()
        return x

    def some_ids(self, count: int, seed: int) -> list[int]:
        rows = torch.randperm(len(self.model.ids), generator=torch.Generator().manual_seed(seed))
        return [self.model.ids[row] for row in rows[:count].tolist()]

    @rule(rows=SIZES, seed=SEEDS)
    def add(self, rows, seed):
        x = self.new_vectors(rows, seed)
        self.index.add(x)
        self.model.add(x)

    @rule(rows=SIZES, seed=SEEDS, step=st.sampled_from([-1, 1, 7]), gap=st.integers(-200, 200))
    def add_with_ids(self, rows, seed, step, gap):
        begin = max(self.model.next_id + gap, 0)
        ids = [i for i in range(begin, begin + rows * abs(step), abs(step))]
        ids = [i for i in ids[:: 1 if step > 0 else -1] if i not in self.model.vectors]
        x = self.new_vectors(len(ids), seed)
        self.index.add(x, torch.tensor(ids, dtype=torch.int64))
        self.model.add(x, ids)

    @rule(count=SIZES, seed=SEEDS)
    def update(self, count, seed):
        ids = self.some_ids(count, seed)
        x = self.new_vectors(len(ids), seed)
        self.index.update(np.array(ids, dtype=np.int64), x.numpy())
        self.model.update(ids, x)

    @rule(count=st.sampled_from([1, 2, 9, 30, 64, 10_000]), seed=SEEDS, twice=st.booleans())
    def remove(self, count, seed, twice):
        ids = self.some_ids(count, seed)
        self.index.remove(torch.tensor(ids * (1 + twice), dtype=torch.int64))
        self.model.remove(ids)

    @rule()
    def compact(self):
        before = self.index.nbytes
        self.index.compact()
        assert self.index._rows.snapshot.count == len(self.model.vectors)
        assert self.index.nbytes <= before

    @rule(name=st.sampled_from("ab"))
    def save(self, name):
        self.index.save(self.root / name)
        self.folders[name] = self.model.copy()

    @precondition(lambda self: self.folders)
    @rule(which=st.integers(0, 1), verify=st.booleans())
    def load(self, which, verify):
        name = sorted(self.folders)[which % len(self.folders)]
        self.left.append((self.index, self.model))
        self.index = MatryoshkaIndex.load(self.root / name, verify=verify)
        self.model = self.folders[name].copy()
        before = self.left[-1][0]
        for field in ("dims", "metric", "dtype", "prefix_dtype"):
            assert getattr(self.index, field) == getattr(before, field)

    @rule(seed=SEEDS, k=st.sampled_from([1, 3, 70]))
    def search(self, seed, k):
        q = vectors(3, DIMS[-1], seed)
        expected = Answers(self.index, self.model, q)
        expected.check_exact(self.index.search(q, k))
        keep = len(self.model.vectors) + k
        for stages in ([(5, keep), (20, k)], [(5, keep), (8, keep), (20, k)]):
            expected.check_staged(self.index.search(q, k, stages=stages))

    @rule(seed=SEEDS, share=st.sampled_from([0.0, 0.01, 0.3, 1.0]), masked=st.booleans())
    def search_allowed(self, seed, share, masked):
        q, ids, size = vectors(3, DIMS[-1], seed), self.model.ids, len(self.model.ids)
        mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
        mine = [i for i, allowed in zip(ids, mask.tolist(), strict=True) if allowed]
        unknown = [-1, -(1 << 63), (1 << 63) - 1, self.model.next_id]
        given = mask if masked else torch.tensor(mine[::-1] + unknown + mine[:9])
        expected = Answers(self.index, self.model, q, set(mine))
        everything = self.index.search(q, size + 1, exact=True, allowed=given)
        expected.check_exact(everything)
        stages = [(5, size + 3), (20, 3)]
        expected.check_staged(self.index.search(q, 3, stages=stages, allowed=given))
        for threshold in [0.0, *everything.scores[0, :: max(size // 3, 1)].tolist()]:
            if threshold > -torch.inf:
                found = self.index.range_search(q, threshold, allowed=given)
                expected.check_range(found, everything, threshold)

    @rule(count=SIZES, seed=SEEDS)
    def look_up(self, count, seed):
        known, unknown = self.some_ids(count, seed), [self.model.next_id, -1, (1 << 63) - 1]
        ids = torch.tensor(known + unknown + known)
        there = self.index.contains(ids).tolist()
        assert there == [True] * len(known) + [False] * 3 + [True] * len(known)
        with pytest.raises(ValueError, match=f"ids: .* got {self.model.next_id}"):
            self.index.reconstruct(ids)
        twice = self.index.reconstruct(np.array(known * 2, dtype=np.int64))
        assert isinstance(twice, np.ndarray) and twice.shape == (2 * len(known), DIMS[-1])
        assert np.array_equal(twice[: len(known)], twice[len(known) :])

    def teardown(self):
        for index, model in [(self.index, self.model), *self.left]:
            assert_same(index, model)
        for name, model in self.folders.items():
            assert_same(MatryoshkaIndex.load(self.root / name, verify=True), model)
        shutil.rmtree(self.root)


@pytest.fixture
def small(monkeypatch):
    """Many blocks, parts and files where there are few rows."""
    monkeypatch.setattr(store, "BLOCK_ROWS", (192, 64))
    monkeypatch.setattr(store, "CHUNK_ROWS", 100)
    monkeypatch.setattr(folder, "TIER", 2)
    monkeypatch.setattr(folder.os, "fsync", lambda _: None)


@pytest.mark.parametrize("prefix_dtype", ["float32", "int8"])
@pytest.mark.parametrize("metric", METRICS)
def test_any_order(metric, prefix_dtype, tmp_path, small):
    run_state_machine_as_test(
        lambda: Machine(tmp_path, metric, prefix_dtype),
        settings=settings(
            max_examples=20 * TIMES,
            stateful_step_count=30,
            derandomize=TIMES == 1,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


ROWS = vectors(70, DIMS[-1], 1)
LAST = (1 << 63) - 2  # the largest id


def ids(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def found(index, allowed):
    return index.search(ROWS[:2], 3, allowed=allowed)


def near(index, threshold):
    return index.range_search(ROWS[:2], threshold)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.remove(ids(2, 99)), ValueError, "ids: expected ids of the index, got 99"),
        (lambda i: i.remove(ids(-1)), ValueError, "ids: expected ids of the index, got -1"),
        (lambda i: i.remove(ids(5)), ValueError, "ids: expected ids of the index, got 5"),
        (lambda i: i.remove(["2"]), TypeError, "ids: expected integers, got list of str: ids"),
        (lambda i: i.remove("2"), TypeError, "ids: expected integers, got str: ids"),
        (lambda i: i.remove(ids(99, dtype=torch.int32)), ValueError, "ids: .* index, got 99"),
        (lambda i: i.remove(np.array([2.0])), TypeError, "ids: .* integers, got numpy.float64"),
        (
            lambda i: i.remove(np.array([2], ">i8")),
            TypeError,
            "ids: expected a native .*, got numpy.>i8",
        ),
        (lambda i: i.remove(ids(2)[None]), ValueError, r"ids: .* shape \[n\], got \[1, 1\]"),
        (lambda i: i.update(ids(2, 3, 2), ROWS[:3]), ValueError, "ids: .* none twice, got 2 again"),
        (lambda i: i.update(ids(2, 99), ROWS[:2]), ValueError, "ids: expected .* index, got 99"),
        (lambda i: i.update(ids(2, -7), ROWS[:2]), ValueError, "ids: .* of at least 0, got -7"),
        (lambda i: i.update(ids(2), ROWS[:2]), ValueError, r"ids: .* shape \[2\], got \[1\]"),
        (lambda i: i.update(ids(2), ROWS[:1, :9]), ValueError, "vectors: expected width 20, got 9"),
        (lambda i: i.update(ids(2), ROWS[:1] * np.nan), ValueError, "vectors: .* got NaN .* row 0"),
        (lambda i: i.update(ids(2), ROWS[:1] * 1e9), ValueError, "vectors as float16: .* finite"),
        (lambda i: i.update(ids(2), ROWS[0]), ValueError, "vectors: expected shape .*, got"),
        (lambda i: i.update(ids(2), ROWS[:1].int()), TypeError, "vectors: expected a floating"),
        (lambda i: i.add(ROWS[:2], ids(99, 2)), ValueError, "ids: .* not in use, got 2"),
        (lambda i: i.add(ROWS[:2], ids(99, 99)), ValueError, "ids: .* none twice, got 99"),
        (lambda i: i.add(ROWS[:1], ids(LAST + 1)), ValueError, f"ids: .* below .*, got {LAST + 1}"),
        (lambda i: i.contains(ids(2).bool()), TypeError, "ids: .* integers, got torch.bool"),
        (lambda i: i.reconstruct(ids(2, 5)), ValueError, "ids: expected ids of the index, got 5"),
        (lambda i: found(i, [2.0]), TypeError, r"allowed\[0\]: expected an integer, got float"),
        (lambda i: found(i, ids(2) > 0), ValueError, r"allowed: .* each of 11 ids, .* \[1\]"),
        (lambda i: found(i, torch.ones(12) > 0), ValueError, r"allowed: .* of 11 ids, .* \[12\]"),
        (lambda i: found(i, torch.ones(11)), TypeError, "allowed: .* integers, got torch.float32"),
        (lambda i: found(i, ids(2)[None]), ValueError, r"allowed: .* shape \[n\], got \[1, 1\]"),
        (lambda i: near(i, np.nan), ValueError, "threshold: expected a finite number, got nan"),
        (lambda i: near(i, -np.inf), ValueError, "threshold: expected a finite number, got -inf"),
        (lambda i: near(i, "far"), TypeError, "threshold: expected a number, got str"),
        (lambda i: near(i, None), TypeError, "threshold: expected a number, got NoneType"),
        (lambda i: near(i, True), ValueError, "threshold: expected a finite number, got True"),
        (lambda i: i.range_search(ROWS[:1, :9], 0), ValueError, "queries: expected width 20"),
        (lambda i: i.range_search(ROWS[:1] * np.inf, 0), ValueError, "queries: expected finite"),
    ],
)
def test_bad_input_changes_nothing(call, error, message):
    index, model = MatryoshkaIndex(DIMS, dtype="float16"), Model(DIMS[-1])
    index.add(ROWS[:12])
    model.add(ROWS[:12])
    index.remove(ids(5))
    model.remove([5])
    before = index._rows.snapshot
    with pytest.raises(error, match=message):
        call(index)
    assert index._rows.snapshot is before
    assert_same(index, model)
    index.add(ROWS[:1])
    model.add(ROWS[:1])
    assert_same(index, model)


def test_the_largest_id():
    index, model = MatryoshkaIndex(DIMS), Model(DIMS[-1])
    for given in (LAST - 1, LAST):
        index.add(ROWS[:1], ids(given))
        model.add(ROWS[:1], [given])
    with pytest.raises(ValueError, match=f"ids: expected ids below {LAST + 1}, got {LAST + 1}"):
        index.add(ROWS[:1])
    # There is nothing after it, and the others can be used all the same.
    index.add(ROWS[:0])
    index.add(ROWS[1:3], ids(7, 5))
    index.update(ids(LAST), ROWS[5:6])
    model.add(ROWS[1:3], [7, 5])
    model.update([LAST], ROWS[5:6])
    assert_same(index, model)
    assert found(index, ids(LAST)).ids.tolist() == [[LAST, -1, -1]] * 2


def test_what_is_removed_and_replaced_takes_room_until_compact():
    index, model = MatryoshkaIndex(DIMS), Model(DIMS[-1])
    index.add(ROWS)
    model.add(ROWS)
    full = index.nbytes
    index.remove(torch.arange(3, 70))
    model.remove(list(range(3, 70)))
    index.update(ids(1), ROWS[9:10])
    model.update([1], ROWS[9:10])
    assert len(index) == 3 and index.nbytes >= full and "68 removed" in repr(index)
    index.compact()
    assert index.nbytes < full and "removed" not in repr(index)
    assert_same(index, model)
    index.add(ROWS[:1])  # ids are not used again
    model.add(ROWS[:1])
    assert index.ids.tolist() == model.ids == [0, 2, 1, 70]
