"""MatryoshkaIndex: the functional ops' answers to the bit, whatever the batches of add."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mrl_fast import _C, MatryoshkaIndex, funnel_search, prefix_topk
from mrl_fast.search.index import store
from mrl_fast.shared import native
from tests.helpers.coding import CODINGS, coding
from tests.helpers.search import METRICS, held

DIMS = (16, 32, 96)
STAGES = [(16, 100), (32, 50), (96, 20)]


def vectors(rows, seed=0):
    return torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_equals_the_functional_ops(metric, dtype):
    x, q = vectors(1000), vectors(20, seed=1)
    index = MatryoshkaIndex(DIMS, metric=metric, dtype=dtype)
    for part in x.split([1, 70, 57, 0, 200, 672]):  # begins and ends inside tiles
        index.add(part)
    stored = held(x, dtype)
    assert len(index) == 1000
    assert torch.equal(index.reconstruct(torch.tensor([999, 0, 77])), stored[[999, 0, 77]])
    for ours, theirs in [
        (index.search(q, 10, stages=[(96, 10)]), prefix_topk(q, stored, 10, metric=metric)),
        (index.search(q, 20, stages=STAGES), funnel_search(q, stored, STAGES, metric=metric)),
        (
            index.search(q, 10, stages=[(32, 10)]),
            prefix_topk(q, stored, 10, dim=32, metric=metric),
        ),
    ]:
        assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.ids, theirs.ids)


def test_ids():
    index = MatryoshkaIndex(DIMS)
    x = vectors(10)
    index.add(x[:3], ids=torch.tensor([50, 7, 20]))
    index.add(x[3:5].numpy())  # consecutive after the largest
    index.add(x[5:6], ids=np.array([0]))
    assert index.ids.tolist() == [50, 7, 20, 51, 52, 0]
    assert index.search(x[:6], 1).ids.ravel().tolist() == [50, 7, 20, 51, 52, 0]
    for ids, message in (([50], "that are not in use, got 50"), ([8, 8], "none twice, got 8")):
        with pytest.raises(ValueError, match=f"ids: expected .*{message}"):
            index.add(x[: len(ids)], ids=torch.tensor(ids))
    assert len(index) == 6


def test_one_width_only():
    index = MatryoshkaIndex([96], metric="l2")
    x = vectors(130)
    index.add(x)
    result = index.search(x, 1)
    assert result.ids.ravel().tolist() == list(range(130)) and not result.scores.any()


def test_missing_and_kinds():
    index = MatryoshkaIndex(DIMS)
    assert index.search(vectors(2), 3).ids.tolist() == [[-1] * 3] * 2
    index.add(vectors(2))
    scores, ids = index.search(vectors(2).numpy().astype(np.float64), 3)
    assert isinstance(ids, np.ndarray) and ids[:, 2].tolist() == [-1, -1]
    assert np.isneginf(scores[:, 2]).all() and ids[:, 0].tolist() == [0, 1]
    assert "2 vectors" in repr(index) and "cosine" in repr(index)


def test_equal_vectors_come_in_the_order_of_adding():
    index = MatryoshkaIndex(DIMS)
    index.add(torch.ones(100, 96), ids=torch.arange(100, 0, -1))
    assert index.search(torch.ones(1, 96), 5).ids.tolist() == [[100, 99, 98, 97, 96]]
    staged = index.search(torch.ones(1, 96), 5, stages=[(16, 50), (96, 5)])
    assert staged.ids.tolist() == [[100, 99, 98, 97, 96]]


def test_many_small_adds_fill_few_blocks():
    index = MatryoshkaIndex((8,))
    for i in range(3000):
        index.add(torch.full((1, 8), float(i + 1)))
    assert len(index._rows.snapshot.blocks) == 3 and len(index) == 3000  # of 1,024, 1,024 and 2,048


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.add(vectors(2)[:, :5]), ValueError, "vectors: expected width 96, got 5"),
        (lambda i: i.add(vectors(2) * torch.nan), ValueError, "vectors: expected finite .* row 0"),
        (lambda i: i.add(vectors(2).int()), TypeError, "vectors: expected a floating-point"),
        (lambda i: i.add(["text"]), TypeError, "vectors: expected numbers, got list of str"),
        (lambda i: i.add([[0.0] * 96, [0.0]]), ValueError, "vectors: expected rows of one width"),
        (lambda i: i.add(vectors(1)[0]), ValueError, r"vectors: expected shape \[rows, width\]"),
        (lambda i: i.add(vectors(2), ids=[8, 2]), ValueError, "that are not in use, got 2"),
        (lambda i: i.add(vectors(2), ids=torch.ones(2)), TypeError, "ids: expected integers"),
        (
            lambda i: i.add(vectors(2), ids=torch.tensor([1])),
            ValueError,
            r"ids: expected shape \[2\]",
        ),
        (
            lambda i: i.add(vectors(1), ids=torch.tensor([-1])),
            ValueError,
            "ids: .* at least 0, got -1",
        ),
        (lambda i: i.search(vectors(1), 0), ValueError, "k: expected an integer >= 1"),
        (
            lambda i: i.search(vectors(1)[:, :40]),
            ValueError,
            r"queries: expected width 96, or of a prefix in \(16, 32\), got 40: .*\[:, :32\]",
        ),
        (lambda i: i.search(vectors(1), dim=40), ValueError, "dim: expected one of .* got 40"),
        (
            lambda i: i.range_search(vectors(1)[:, :16], 0.5, dim=32),
            ValueError,
            "dim: expected at most 16, the queries' width, got 32",
        ),
        (
            lambda i: MatryoshkaIndex([96], metric="l2").range_search(vectors(1), 0.5),
            ValueError,
            "threshold: expected at most 0, as scores of 'l2' are −squared distance .*, got 0.5",
        ),
        (
            lambda i: i.search(vectors(1)[:, :32], 1, stages=[(16, 4), (96, 1)]),
            ValueError,
            r"stages\[1\] dim: expected at most 32, the queries' width, got 96",
        ),
        (
            lambda i: i.search(vectors(1), 1, dim=32, stages=[(16, 4)]),
            ValueError,
            "dim: expected None where stages are given, got 32",
        ),
        (
            lambda i: i.search(vectors(1), 5, stages=[(16, 4)]),
            ValueError,
            "last keep of at least k=5",
        ),
        (
            lambda i: i.search(vectors(1), 1, stages=[(17, 4)]),
            ValueError,
            r"stages\[0\] dim: .* 17",
        ),
        (
            lambda i: i.search(vectors(1), 1, stages=[(16, 4)], exact=True),
            ValueError,
            "exact: expected False where stages are given",
        ),
        (lambda i: i.reconstruct(torch.tensor([3, 99])), ValueError, "ids: expected ids .* got 99"),
        (lambda i: MatryoshkaIndex((8, 8)), ValueError, "dims: expected no width twice"),
        (lambda i: MatryoshkaIndex((8,), metric="dot"), ValueError, "metric: expected one of"),
        (lambda i: MatryoshkaIndex((8,), dtype="int4"), ValueError, "dtype: expected one of"),
        (
            lambda i: MatryoshkaIndex((8,), prefix_dtype="int4"),
            ValueError,
            "prefix_dtype: expected one of",
        ),
        (lambda i: MatryoshkaIndex((8,), rotation="opq"), ValueError, "rotation: expected one of"),
        (
            lambda i: MatryoshkaIndex((40000,), prefix_dtype="int8"),
            ValueError,
            r"dims\[0\]: expected at most 32768 with prefix_dtype='int8', got 40000",
        ),
        (lambda i: i.search(vectors(1) * torch.inf), ValueError, "queries: expected finite"),
    ],
)
def test_bad_input(call, error, message):
    index = MatryoshkaIndex(DIMS)
    index.add(vectors(4))
    with pytest.raises(error, match=message):
        call(index)
    assert len(index) == 4 and index.search(vectors(4), 1).ids.ravel().tolist() == [0, 1, 2, 3]


def test_values_beyond_half_precision_are_refused():
    index = MatryoshkaIndex(DIMS, dtype="float16")
    with pytest.raises(ValueError, match="vectors as float16: expected finite values"):
        index.add(vectors(1) * 1e6)
    assert len(index) == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_int8_prefix_chooses_and_the_vectors_score(metric, dtype):
    x, q = vectors(3000), vectors(20, seed=1)
    x[:, 16:] *= 0.1  # the prefix decides
    index = MatryoshkaIndex((13, 96), metric=metric, dtype=dtype, prefix_dtype="int8")
    for part in x.split([1, 70, 57, 0, 200, 2672]):
        index.add(part)
    stored = held(x, dtype)
    assert torch.equal(index.reconstruct(torch.tensor([2999, 0, 77])), stored[[2999, 0, 77]])
    exact = prefix_topk(q, stored, 10, metric=metric)
    found = index.search(q, 10, stages=[(13, 300), (96, 10)])
    same = found.ids == exact.ids
    assert same.float().mean() > 0.95
    assert torch.equal(found.scores[same], exact.scores[same])  # scored as vectors, to the bit
    # All rows kept: what the codes say cannot matter any more.
    for ours, theirs in [
        (index.search(q, 10, stages=[(13, 3000), (96, 10)]), exact),
        (
            index.search(q, 10, stages=[(13, 10)]),
            prefix_topk(q, stored, 10, dim=13, metric=metric),
        ),
    ]:
        assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.ids, theirs.ids)


@pytest.mark.parametrize("metric", METRICS)
def test_codes_are_the_same_on_every_instruction_set(metric, monkeypatch):
    x, q = vectors(3000), vectors(33, seed=1)
    results = []
    for isa in _C.available():
        monkeypatch.setattr(native, "ISA", isa)
        index = MatryoshkaIndex(DIMS, metric=metric, prefix_dtype="int8")
        index.add(x)
        results.append(index.search(q, 40, stages=[(16, 40), (96, 40)]).ids.sort().values)
    assert all(torch.equal(ids, results[0]) for ids in results)


def test_rows_lie_in_blocks_that_never_move(monkeypatch):
    monkeypatch.setattr(store, "BLOCK_ROWS", (192, 64))
    x, q = vectors(1000), vectors(20, seed=1)
    for prefix_dtype in CODINGS:
        index = MatryoshkaIndex(DIMS, metric="ip", **coding(prefix_dtype))
        places = []
        for part in x.split(70):
            index.add(part)
            places.append([block.suffix.data_ptr() for block in index._rows.snapshot.blocks])
        assert all(a == places[-1][: len(a)] for a in places) and len(places[-1]) > 4
        result = index.search(q, 20, stages=[(16, 1000), (32, 900), (96, 20)])
        expected = prefix_topk(q, x, 20)
        assert torch.equal(result.scores, expected.scores)
        assert torch.equal(result.ids, expected.ids)
        rows = torch.randperm(1000)[:300]
        assert torch.equal(index.reconstruct(rows), x[rows])


def test_memory_beyond_the_vectors():
    x = torch.randn(4096, 768)  # fills its blocks
    for prefix_dtype, most in {"float32": 0.015, "int8": 0.035, "bits": 0.305}.items():
        index = MatryoshkaIndex((64, 768), **coding(prefix_dtype))
        index.add(x)
        assert index.nbytes < (1 + most) * x.numel() * 4


PEAK = """
import sys, torch
from mrl_fast import MatryoshkaIndex
rows, parts, prefix_dtype, dtype = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
x = torch.ones(rows, 768) + torch.arange(768.0)
warm = MatryoshkaIndex((64, 768), prefix_dtype=prefix_dtype, dtype=dtype)
warm.add(x[:200])
def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))
index = MatryoshkaIndex((64, 768), prefix_dtype=prefix_dtype, dtype=dtype)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS:")
for part in x.chunk(parts):
    index.add(part)
print((status("VmHWM:") - before) * 1024 / (rows * 768 * (4 if dtype == "float32" else 2)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("parts", "prefix_dtype", "dtype"),
    [(1, "float32", "float16"), (1, "int8", "float32"), (40, "float32", "float32"),
     (40, "int8", "float16")],
)  # fmt: skip
def test_adding_needs_little_more_than_the_vectors(parts, prefix_dtype, dtype):
    command = [sys.executable, "-c", PEAK, "80000", str(parts), prefix_dtype, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.2, done.stdout  # times the bytes of the vectors


def decaying(rows, seed=0):
    """Vectors whose energy lies in a random subspace of few dimensions."""
    generator = torch.Generator().manual_seed(5)
    axes = torch.linalg.qr(torch.randn(96, 96, generator=generator)).Q
    spread = 1 / (1 + torch.arange(96))
    generator.manual_seed(seed)
    return (torch.randn(rows, 96, generator=generator) * spread) @ axes


@pytest.mark.parametrize("prefix_dtype", CODINGS)
@pytest.mark.parametrize("metric", METRICS)
def test_rotation(metric, prefix_dtype):
    x, q = decaying(2000), decaying(30, seed=1)
    index = MatryoshkaIndex(DIMS, metric=metric, **coding(prefix_dtype), rotation="pca")
    assert index.search(q, 3).ids.tolist() == [[-1] * 3] * 30 and index.rotation is None
    index.add(x[:1500])
    axes = index.rotation
    index.add(x[1500:])
    assert torch.equal(index.rotation, axes)
    torch.testing.assert_close(axes @ axes.T, torch.eye(96), atol=2e-6, rtol=0)
    torch.testing.assert_close(index.reconstruct(index.ids[:50]), x[:50], atol=2e-6, rtol=0)
    exact = prefix_topk(q, x, 10, metric=metric)
    found = index.search(q, 10, exact=True)
    torch.testing.assert_close(found.scores, exact.scores, atol=1e-5, rtol=1e-5)
    assert (found.ids == exact.ids).float().mean() > 0.99

    def recall(index):
        ids = index.search(q, 10, stages=[(16, 60), (96, 10)]).ids
        return (ids[:, :, None] == exact.ids[:, None]).any(dim=2).float().mean()

    plain = MatryoshkaIndex(DIMS, metric=metric, **coding(prefix_dtype))
    plain.add(x)
    assert recall(index) > 0.99 > 0.95 > recall(plain)
    single = index.search(q[4:5], 10, stages=[(16, 60), (96, 10)])
    batch = index.search(q, 10, stages=[(16, 60), (96, 10)])
    assert torch.equal(single.scores[0], batch.scores[4])  # a query's rotation is its own


def test_rotation_fitted_on_samples():
    x = decaying(500)
    index = MatryoshkaIndex(DIMS, rotation="pca")
    index.fit(decaying(300, seed=2).numpy())
    axes = index.rotation
    index.add(x[:2])
    assert torch.equal(index.rotation, axes)
    moments = axes @ (decaying(300, seed=2).T @ decaying(300, seed=2)) @ axes.T
    energy = moments.diagonal()
    assert (energy[:-1] >= energy[1:] - 1e-4).all()
    assert (moments - energy.diag()).abs().max() < 1e-3 * energy[0]
    with pytest.raises(ValueError, match="samples: expected an empty index, got 2 vectors"):
        index.fit(x)
    with pytest.raises(ValueError, match="rotation: expected 'pca'"):
        MatryoshkaIndex(DIMS).fit(x)
    with pytest.raises(ValueError, match="samples: expected at least one vector"):
        MatryoshkaIndex(DIMS, rotation="pca").fit(x[:0])


def test_a_failed_add_leaves_everything_as_it_was():
    index = MatryoshkaIndex(DIMS, dtype="float16", rotation="pca")
    x = vectors(3)
    x[2] *= 1e6  # beyond half precision once all others are stored
    with pytest.raises(ValueError, match="vectors as float16: expected finite values"):
        index.add(x)
    assert len(index) == 0 and index.rotation is None
    index.add(vectors(3))
    assert len(index) == 3 and index.ids.tolist() == [0, 1, 2]
