"""Exact search where very many rows score alike, or very many are wanted: right. That it is not
slow, benchmarks/cpu/worst_cases.py says."""

import numpy as np
import pytest
import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.shared.native import METRICS as METRIC_TERMS
from tests.helpers.coding import CODINGS, coding
from tests.helpers.search import METRICS, held
from tests.search.test_exact import best

ROWS, WIDTH = 12_000, 36


def rows_of(kind, rows, width):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator)
    some = torch.randint(rows, (rows,), generator=generator)
    if kind == "equal":
        return x[:1].repeat(rows, 1)
    if kind == "ten distinct":
        return x[some % 10]
    if kind == "few equal among many":
        return torch.where((some % 3 == 0)[:, None], x[:1] * 2, x)
    if kind == "near-duplicates":
        return x[:1] + 1e-6 * x
    if kind == "near-duplicates of two":  # whose mean is near neither
        return x[some % 2] + 1e-6 * x
    if kind == "near-duplicates of ten and others":
        return torch.where((some % 50 == 0)[:, None], 3 * x, x[some % 10] + 1e-6 * x)
    if kind == "near-duplicates and zeros":
        return torch.where((some % 50 == 0)[:, None], 0.0, x[:1] + 1e-6 * x)
    if kind == "norms spread":
        return x * torch.exp(3 * x[:, :1])
    if kind == "opposite zeros":  # equal in value, not bit for bit
        return torch.where((some % 2 == 0)[:, None], 0.0, -0.0) * x[:1]
    raise AssertionError(kind)


NEAR = [f"near-duplicates {which}" for which in ("of two", "and zeros")]
KINDS = ["equal", "ten distinct", "few equal among many", "near-duplicates", "norms spread"]


def assert_right(index, x, queries, k, metric, alive=None):
    """Equal to brute force over the rows that may be found."""
    alive = torch.arange(len(x)) if alive is None else alive
    scores, rows = best(queries, x[alive], k, metric)
    allowed = None if len(index) == len(alive) else alive
    found = index.search(queries, k, exact=True, allowed=allowed)
    there = scores.shape[1]
    assert torch.equal(found.ids[:, :there], alive[rows])
    torch.testing.assert_close(found.scores[:, :there], scores.float(), rtol=3e-7, atol=1e-30)
    assert (found.ids[:, there:] == -1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefix_dtype", CODINGS)
@pytest.mark.parametrize("kind", [*KINDS, *NEAR, "opposite zeros"])
def test_rows_that_score_alike(kind, prefix_dtype, metric):
    x = rows_of(kind, ROWS, WIDTH)
    queries = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2))
    queries[0] = x[0]
    if METRIC_TERMS[metric].normalized:
        # Between nearly parallel vectors cosines differ by less than fp64 tells.
        queries[0] *= torch.linspace(1, 2, WIDTH)
    for dims in [(9, WIDTH), (WIDTH,)]:
        index = MatryoshkaIndex(dims, metric=metric, **coding(prefix_dtype))
        index.add(x)
        for count in (20, 3):  # equal rows are looked for where queries are many
            assert_right(index, x, queries[:count], 10, metric)
        index.remove(torch.arange(0, ROWS, 5))
        left = torch.arange(ROWS)[torch.arange(ROWS) % 5 != 0]
        assert_right(index, x, queries, 10, metric, left)
        assert_right(index, x, queries, 10, metric, left[::100])  # gathered


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefix_dtype", CODINGS)
def test_clusters_of_near_duplicates(prefix_dtype, metric):
    x = rows_of("near-duplicates of ten and others", ROWS, WIDTH)
    queries = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(4))
    index = MatryoshkaIndex((9, WIDTH), metric=metric, **coding(prefix_dtype))
    index.add(x)
    index.remove(torch.arange(0, ROWS, 5))
    left = torch.arange(ROWS)[torch.arange(ROWS) % 5 != 0]
    assert_right(index, x, queries, 10, metric, left)


@pytest.mark.parametrize("prefix_dtype", CODINGS)
def test_cosines_closer_than_fp64_tells(prefix_dtype):
    x = rows_of("near-duplicates", ROWS, WIDTH)
    wide = x.numpy().astype(np.longdouble)
    cosines = wide @ wide[0] / np.sqrt((wide**2).sum(1) * (wide[0] ** 2).sum())
    index = MatryoshkaIndex((9, WIDTH), **coding(prefix_dtype))
    index.add(x)
    for count in (20, 1):
        found = index.search(x[:1].repeat(count, 1), 10, exact=True)
        assert torch.equal(found.ids, found.ids[:1].expand(count, -1))
        rows = found.ids[0].numpy()
        assert len(set(rows)) == 10
        assert cosines[rows].min() >= np.sort(cosines)[-10] - 1e-15  # a few roundings of fp64


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("k", [90, 100, 5000, ROWS, ROWS + 7])  # a 128th of the rows is 93
def test_many_neighbours(k, dtype, metric):
    x = held(rows_of("few equal among many", ROWS, WIDTH), dtype)
    queries = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    index = MatryoshkaIndex((9, WIDTH), metric=metric, dtype=dtype)
    index.add(x)
    assert_right(index, x, queries, k, metric)
