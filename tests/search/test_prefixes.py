"""An index searched by a prefix of its columns: an index of shorter vectors, to the last answer."""

import pytest
import torch

from mrl_fast import ExactResult, MatryoshkaIndex, funnel_search, prefix_topk
from mrl_fast.shared.types import Tuned
from tests.helpers.coding import CODINGS, coding
from tests.helpers.search import METRICS, brute_force, held

DIMS = (7, 16, 48, 64)


def clustered(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = 1 / (1 + torch.arange(64) / 4)
    centres = torch.randn(30, 64, generator=generator) * spread
    x = centres[torch.randint(30, (rows,), generator=generator)]
    x = x + 0.3 * torch.randn(rows, 64, generator=generator) * spread
    near = x[torch.randint(rows, (20,), generator=generator)]
    return x, near + 0.2 * torch.randn(20, 64, generator=generator) * spread


def both_ways(q, dim):
    """A search's queries and options: cut, and whole with a dim."""
    return (q[:, :dim], {}), (q, {"dim": dim})


def check_exact(index, q, x, ids, dim, k, **options):
    """Against fp64 scores of the rows ``x`` by their first columns, whose ids these are."""
    scores = brute_force(q[:, :dim], x[:, :dim], index.metric)
    order = scores.sort(dim=1, descending=True, stable=True)
    there = min(k, len(x))
    for given, by in both_ways(q, dim):
        found = index.search(given, k, **by, **options)
        assert isinstance(found, ExactResult)
        assert torch.equal(found.ids[:, :there], ids[order.indices[:, :there]])
        best = order.values[:, :there].float()
        torch.testing.assert_close(found.scores[:, :there], best, rtol=2e-7, atol=1e-30)
        assert (found.ids[:, there:] == -1).all()
        assert (found.scores[:, there:] == -torch.inf).all()
    # A threshold in the widest gap among the best, far from every score.
    top = scores.flatten().sort(descending=True).values[10:41]
    widest = int((top[:-1] - top[1:]).argmax())
    threshold = float(top[widest : widest + 2].mean())
    for given, by in both_ways(q, dim):
        found = index.range_search(given, threshold, **by, **options)
        assert int(found.lims[-1]) == 11 + widest
        for b, (mine, row) in enumerate(zip(order.values, order.indices, strict=True)):
            its = slice(int(found.lims[b]), int(found.lims[b + 1]))
            assert torch.equal(found.ids[its], ids[row[mine > threshold]])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("code", CODINGS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_exact(metric, code, dtype):
    x, q = clustered(2500)
    index = MatryoshkaIndex(DIMS, metric=metric, dtype=dtype, **coding(code))
    for part in x.split([1, 1999, 500]):
        index.add(part)
    x, ids = held(x, dtype), torch.arange(2500)
    for dim in DIMS:
        check_exact(index, q, x, ids, dim, 10)
    kept = (ids % 5 != 2) & (ids > 70)
    index.remove(ids[~kept])
    x, ids = x[kept], ids[kept]
    for some in (ids % 3 == 0, ids % 200 == 3):
        check_exact(index, q, x[some], ids[some], 48, 9, allowed=some)
        check_exact(index, q, x[some], ids[some], 7, 9, allowed=ids[some])
    check_exact(index, q[:2], x, ids, 16, 2600)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("code", CODINGS)
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-18, 1e15])
def test_what_lies_beyond_a_prefix_counts_for_nothing(metric, code, scale):
    """Whatever the norms of whole vectors, which is what an index knows."""
    x, q = clustered(2500)
    for dim in (7, 48):
        mixed = x.clone()
        mixed[20::3, :dim] *= scale
        mixed[21::3, dim:] *= scale
        # Of cosines the best are of rows whose squares no fp32 holds.
        mixed[:20, :dim] = (q[:1, :dim] + 1e-3 * x[:20, :dim]) * scale
        index = MatryoshkaIndex(DIMS, metric=metric, **coding(code))
        index.add(mixed)
        check_exact(index, q, mixed, torch.arange(2500), dim, 10)


@pytest.mark.parametrize("code", CODINGS)
@pytest.mark.parametrize("scale", [1e-25, 1e-40])
def test_cosines_of_rows_that_begin_with_zeros(code, scale):
    """What is known of such a row is that its first prefix is 0, and that the row is not."""
    x, q = clustered(2500)
    x[:20, :7] = 0.0
    x[:20, 7:48] = (q[:1, 7:48] + 1e-3 * x[:20, 7:48]) * scale
    x[20:40, :48] = 0.0
    q[:, :7] *= 1e-3
    index = MatryoshkaIndex(DIMS, **coding(code))
    index.add(x)
    check_exact(index, q, x, torch.arange(2500), 48, 10)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("code", CODINGS)
def test_scores_closer_than_fp32_tells(metric, code):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, generator=generator).repeat(3000, 1)
    x[:, :7] *= 1e-3  # whose norm says little of the prefix that is searched
    x[:, 15] = 1e-3 * (1 + 1e-6 * torch.randperm(3000, generator=generator))
    x[:, 48:] = torch.randn(3000, 16, generator=generator)
    q = torch.randn(3, 64, generator=generator)
    index = MatryoshkaIndex(DIMS, metric=metric, **coding(code))
    index.add(x)
    scores = brute_force(q[:, :48], x[:, :48], metric)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :25]
    assert torch.equal(index.search(q[:, :48], 25).ids, best)


def test_bounds_of_codes_hold_for_their_prefix():
    x, q = clustered(5000)
    index = MatryoshkaIndex((48, 64), prefix_dtype="int8")
    index.add(x)
    found = index.search(q[:, :48], 10)
    assert found.rows_touched.float().mean() < 0.5 * len(x)
    check_exact(index, q, x, torch.arange(5000), 48, 10)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("code", CODINGS)
def test_stages_within_a_prefix(metric, code):
    x, q = clustered(1000)
    index = MatryoshkaIndex(DIMS, metric=metric, **coding(code))
    index.add(x)
    stages = [(7, 1000), (16, 300), (48, 10)]
    expected = funnel_search(q, x, stages, metric=metric)
    lists = [stages, [(16, 1, 1000), *stages[1:]]] if code == "bits" else [stages]
    for mine in lists:
        for width in (48, 64):
            found = index.search(q[:, :width], 10, stages=mine)
            assert torch.equal(found.scores, expected.scores)
            assert torch.equal(found.ids, expected.ids)
    one = index.search(q[4, :16], 10, stages=[(16, 10)])
    assert torch.equal(one.scores, prefix_topk(q[4:5], x, 10, dim=16, metric=metric).scores)


def test_tuned_stages_are_for_whole_vectors():
    x, q = clustered(1000)
    index = MatryoshkaIndex(DIMS)
    index.add(x)
    index._tuned = Tuned([(7, 20), (64, 10)], 10, 1000)
    assert not isinstance(index.search(q), ExactResult)
    assert not isinstance(index.search(q, dim=64), ExactResult)
    check_exact(index, q, x, torch.arange(1000), 48, 10)


@pytest.mark.parametrize("code", CODINGS)
@pytest.mark.parametrize("metric", METRICS)
def test_a_rotation_needs_whole_queries(metric, code):
    x, q = clustered(1000)
    index = MatryoshkaIndex(DIMS, metric=metric, rotation="pca", **coding(code))
    message = "queries: expected width 64 with rotation='pca', .* got 16: pass whole .* dim=16"
    for part in (x, x[:0]):  # of an empty index too
        for call in (index.search, lambda q: index.range_search(q, 0.5)):
            with pytest.raises(ValueError, match=message):
                call(q[:, :16])
        assert index.search(q, 3, dim=16).ids.shape == (20, 3)
        index.add(part)
    turned = index._rows.rotation.apply(x), index._rows.rotation.apply(q)
    scores = brute_force(turned[1][:, :16], turned[0][:, :16], metric)
    found, best = index.search(q.double(), 5, dim=16), scores.topk(5, dim=1)
    assert torch.equal(found.ids, best.indices)
    torch.testing.assert_close(found.scores, best.values.float(), rtol=2e-7, atol=1e-30)
    staged = index.search(q, 5, stages=[(16, 5)])
    torch.testing.assert_close(staged.scores, found.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("code", CODINGS)
def test_few_rows_and_none(code):
    index = MatryoshkaIndex(DIMS, **coding(code))
    x, q = clustered(30)
    for dim in DIMS:
        for given, by in both_ways(q, dim):
            assert index.search(given, 2, **by).ids.tolist() == [[-1, -1]] * 20
            assert index.range_search(given, 0.0, **by).lims.tolist() == [0] * 21
            assert index.search(given[:0], 2, **by).ids.shape == (0, 2)
    index.add(x)
    index.remove([3])
    rest = torch.arange(30) != 3
    for dim in DIMS:
        check_exact(index, q, x[rest], torch.arange(30)[rest], dim, 50)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_columns_of_a_query_need_not_be_finite(device):
    x, q = clustered(100)
    index = MatryoshkaIndex(DIMS, device=device)
    index.add(x)
    expected = index.search(q[:, :16], 3)
    q[:, 20] = torch.nan
    assert torch.equal(index.search(q, 3, dim=16).ids, expected.ids)
    with pytest.raises(ValueError, match="queries: expected finite values, got .* row 0"):
        index.search(q, 3, dim=48)
