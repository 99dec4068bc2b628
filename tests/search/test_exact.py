"""Certified exact search equals brute force in fp64, whatever its bounds are made of."""

import numpy as np
import pytest
import torch

from mrl_fast import _C, MatryoshkaIndex
from mrl_fast.search.index import store
from mrl_fast.shared import native
from tests.helpers.coding import CODINGS, coding
from tests.helpers.search import METRICS, brute_force, held


def best(q, x, k, metric):
    """Scores and rows, ties in the order of rows."""
    order = brute_force(q, x, metric).sort(dim=1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k]


def assert_exact(index, q, x, k, metric):
    scores, rows = best(q, x, k, metric)
    result = index.search(q, k, exact=True)
    found = min(k, len(x))
    assert torch.equal(result.ids[:, :found], rows)
    torch.testing.assert_close(result.scores[:, :found], scores.float(), rtol=2e-7, atol=1e-30)
    assert (result.ids[:, found:] == -1).all() and (result.scores[:, found:] == -torch.inf).all()
    assert (result.rows_touched <= len(x)).all()
    return result


def clustered(rows, width, *, seed=0, noise=0.4):
    """Rows around a few centres whose columns fall off: bounds drop most of them."""
    generator = torch.Generator().manual_seed(seed)
    spread = 1 / (1 + torch.arange(width) / 4)
    centres = torch.randn(50, width, generator=generator) * spread
    x = centres[torch.randint(50, (rows,), generator=generator)]
    x = x + noise * torch.randn(rows, width, generator=generator) * spread
    near = x[torch.randint(rows, (40,), generator=generator)]
    return x, near + 0.2 * torch.randn(40, width, generator=generator) * spread


def build(x, dims, metric, *parts, **options):
    index = MatryoshkaIndex(dims, metric=metric, **options)
    for part in x.split(list(parts) or len(x)):
        index.add(part)
    return index


@pytest.fixture
def as_shipped():
    """Without what the tests set so that few rows are bounded."""
    _C.set_seed_columns(2800)
    yield
    _C.set_seed_columns(0)


@pytest.mark.parametrize("prefix_dtype", CODINGS)
@pytest.mark.parametrize("rows", [300, 30_000])  # too few; and so many that some queries are tried
def test_all_rows_are_read_where_bounds_save_little(rows, prefix_dtype, as_shipped):
    generator = torch.Generator().manual_seed(5)
    x, q = (torch.randn(n, 64, generator=generator) for n in (rows, 16))
    index = build(x, (16, 64), "ip", **coding(prefix_dtype))
    result = assert_exact(index, q, x, 10, "ip")
    if rows == 300 or prefix_dtype != "bits":
        assert (result.rows_touched == rows).all()
    _C.set_seed_columns(0)
    assert torch.equal(index.search(q, 10, exact=True).ids, result.ids)


@pytest.mark.parametrize("rows, queries", [(100, 3), (3000, 3), (3000, 60)])
@pytest.mark.parametrize("metric", METRICS)
def test_one_row_beyond_the_sums_of_fp32(metric, rows, queries, as_shipped):
    generator = torch.Generator().manual_seed(6)
    x, q = torch.randn(rows, 16, generator=generator), torch.ones(queries, 16)
    if metric == "ip":  # 0 in fp64
        x[7] = torch.tensor([3e38, 3e38, -3e38, -3e38] + 12 * [0.0])
    else:
        x[7] = 1e20 * x[7]
    for dims in ((8, 16), (16,)):
        assert_exact(build(x, dims, metric), q, x, 10, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefix_dtype", CODINGS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("dims", [(16, 100), (7, 100), (100,), (33, 64, 100)], ids=str)
def test_clustered(metric, prefix_dtype, dtype, dims):
    x, q = clustered(6000, 100)
    x = held(x, dtype)
    index = build(x, dims, metric, 1, 4999, 1000, dtype=dtype, **coding(prefix_dtype))
    result = assert_exact(index, q, x, 10, metric)
    if prefix_dtype == "int8" and dims[0] > 30:  # an assertion on all rows would test no bound
        assert result.rows_touched.float().mean() < 0.5 * len(x)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefix_dtype", CODINGS)
def test_bounds_that_never_drop_a_row(metric, prefix_dtype):
    x, q = torch.randn(5000, 64), torch.randn(20, 64)  # nothing to learn from 4 columns
    result = assert_exact(build(x, (4, 64), metric, **coding(prefix_dtype)), q, x, 10, metric)
    if prefix_dtype == "bits":
        assert 10 <= result.rows_touched.min() and result.rows_touched.float().mean() < 500
    else:
        assert (result.rows_touched == len(x)).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefix_dtype", CODINGS)
def test_scores_closer_than_fp32_tells(metric, prefix_dtype):
    # Gaps far below the rounding of an fp32 sum of 200 products, in no order of rows.
    generator = torch.Generator().manual_seed(3)
    base, q = torch.randn(200, generator=generator), torch.randn(6, 200, generator=generator)
    x = base.repeat(3000, 1)
    steps = torch.randperm(3000, generator=generator).float()
    x[:, 150] = 1e-3 * (1 + 1e-6 * steps)
    x, q = torch.cat([x, torch.randn(3000, 200, generator=generator)]), torch.cat([q, base[None]])
    for dims in [(32, 200), (200,)]:
        assert_exact(build(x, dims, metric, **coding(prefix_dtype)), q, x, 25, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefix_dtype", CODINGS)
def test_duplicates_come_in_order(metric, prefix_dtype):
    x, q = clustered(3000, 48)
    x[100:1500] = x[7]
    x[2000:2100] = 0.0
    q = torch.cat([q[:5], x[7:8], torch.zeros(1, 48), -x[7:8]])
    for dims in [(12, 48), (48,)]:
        assert_exact(build(x, dims, metric, **coding(prefix_dtype)), q, x, 20, metric)
    equal = torch.ones(100_000, 48)
    index = build(equal, (12, 48), metric, **coding(prefix_dtype))
    assert index.search(q[:2], 5, exact=True).ids.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefix_dtype", CODINGS)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-12, 1e12, 1e15])
def test_tiny_and_huge_vectors(metric, prefix_dtype, scale):
    x, q = clustered(2000, 40)
    x[::3] *= scale
    index = build(x, (8, 40), metric, **coding(prefix_dtype))
    assert_exact(index, q, x, 10, metric)
    # Scaled as a whole: queries too, or fp64 could not tell distances apart.
    x, q = clustered(2000, 40)
    index = build(x * scale, (8, 40), metric, **coding(prefix_dtype))
    assert_exact(index, q * scale, x * scale, 10, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefix_dtype", CODINGS)
def test_edges(metric, prefix_dtype):
    x, q = clustered(130, 40)
    index = build(x, (8, 40), metric, **coding(prefix_dtype))
    for k in (1, 129, 130, 200):
        assert_exact(index, q[:3], x, k, metric)
    assert index.search(q[:0], 3, exact=True).ids.shape == (0, 3)
    empty = MatryoshkaIndex((8, 40), metric=metric, **coding(prefix_dtype))
    result = empty.search(q, 3, exact=True)
    assert (result.ids == -1).all() and (result.rows_touched == 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefix_dtype", CODINGS)
def test_results_depend_on_nothing_but_the_query(metric, prefix_dtype, monkeypatch):
    x, q = clustered(9000, 64)
    q = torch.cat([q, torch.randn(100, 64)])
    index = build(x, (16, 64), metric, **coding(prefix_dtype))
    whole = index.search(q, 10, exact=True)
    for rows in (slice(0, 1), slice(3, 20)):
        part = index.search(q[rows], 10, exact=True)
        assert torch.equal(part.scores, whole.scores[rows])
        assert torch.equal(part.ids, whole.ids[rows])
    for isa in _C.available():
        monkeypatch.setattr(native, "ISA", isa)
        other = build(x, (16, 64), metric, **coding(prefix_dtype)).search(q, 10, exact=True)
        assert torch.equal(other.scores, whole.scores) and torch.equal(other.ids, whole.ids), isa
    monkeypatch.setattr(native, "ISA", "")
    monkeypatch.setattr(store, "BLOCK_ROWS", (192, 64))  # many blocks
    other = build(x, (16, 64), metric, *[1000] * 9, **coding(prefix_dtype))
    blocked = other.search(q, 10, exact=True)
    assert torch.equal(blocked.scores, whole.scores) and torch.equal(blocked.ids, whole.ids)
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "threads", threads)
        other = index.search(q, 10, exact=True)
        assert torch.equal(other.scores, whole.scores) and torch.equal(other.ids, whole.ids)


def test_the_default_is_exact():
    x, q = clustered(3000, 64)
    index = build(x, (16, 64), "cosine")
    plain, exact = index.search(q, 10), index.search(q, 10, exact=True)
    assert torch.equal(plain.ids, exact.ids) and torch.equal(plain.scores, exact.scores)
    as_arrays = index.search(q.numpy(), 10)
    assert isinstance(as_arrays.rows_touched, np.ndarray)
    assert np.array_equal(as_arrays.rows_touched, exact.rows_touched.numpy())


def test_scores_beyond_float_are_refused():
    index = build(torch.full((10, 4), 1e25), (2, 4), "ip")
    with pytest.raises(ValueError, match="expected scores within float32"):
        index.search(torch.full((1, 4), 1e25), 3, exact=True)
