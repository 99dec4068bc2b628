"""MatryoshkaIndex: the functional ops' answers to the bit, whatever the batches of add."""

import numpy as np
import pytest
import torch

from mrl_fast import MatryoshkaIndex, funnel_search, prefix_topk

DIMS = (16, 32, 96)
STAGES = [(16, 100), (32, 50), (96, 20)]


def vectors(rows, seed=0):
    return torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_equals_the_functional_ops(metric, dtype):
    x, q = vectors(1000), vectors(20, seed=1)
    index = MatryoshkaIndex(DIMS, metric=metric, dtype=dtype)
    for part in x.split([1, 70, 57, 0, 200, 672]):  # begins and ends inside tiles
        index.add(part)
    stored = x.to(getattr(torch, dtype)).float()
    assert len(index) == 1000
    assert torch.equal(index.reconstruct(torch.tensor([999, 0, 77])), stored[[999, 0, 77]])
    for ours, theirs in [
        (index.search(q, 10), prefix_topk(q, stored, 10, metric=metric)),
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
    for ids in ([50], [8, 8]):
        with pytest.raises(
            ValueError, match=f"ids: expected ids that are not in use, got {ids[0]}"
        ):
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


def test_many_small_adds_reserve_ahead():
    index = MatryoshkaIndex((8,))
    grown = 0
    for i in range(500):
        before = index.nbytes
        index.add(torch.full((1, 8), float(i + 1)))
        grown += index.nbytes != before
    assert grown < 15 and len(index) == 500


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.add(vectors(2)[:, :5]), ValueError, "vectors: expected width 96, got 5"),
        (lambda i: i.add(vectors(2) * torch.nan), ValueError, "vectors: expected finite .* row 0"),
        (lambda i: i.add(vectors(2).int()), TypeError, "vectors: expected a floating-point"),
        (lambda i: i.add([[0.0] * 96]), TypeError, "vectors: expected a tensor"),
        (lambda i: i.add(vectors(2), ids=[1, 2]), TypeError, "ids: expected a tensor"),
        (lambda i: i.add(vectors(2), ids=torch.ones(2)), TypeError, "ids: expected int64"),
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
        (lambda i: i.search(vectors(1)[0], 1), ValueError, "queries: expected shape"),
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
        (lambda i: MatryoshkaIndex((8, 8)), ValueError, "dims: expected strictly ascending"),
        (lambda i: MatryoshkaIndex((8,), metric="dot"), ValueError, "metric: expected one of"),
        (lambda i: MatryoshkaIndex((8,), dtype="int8"), ValueError, "dtype: expected one of"),
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
