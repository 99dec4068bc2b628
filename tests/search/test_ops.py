"""prefix_topk, rerank and funnel_search: tables, ties, edges, exactness, bad input."""

from functools import partial

import numpy as np
import pytest
import torch
from mrl_fast.kernels import search as kernels

from mrl_fast import (
    _C,
    MatryoshkaIndex,
    SearchResult,
    approx_topk,
    funnel_search,
    prefix_topk,
    rerank,
)
from mrl_fast.search import reference
from mrl_fast.search.index.device_metrics import DEVICE_METRICS
from mrl_fast.shared import native
from mrl_fast.testing import assert_same_topk
from tests.helpers.search import METRICS, RUNS, metrics_of

IMPLS = ["cpp", "triton"]  # without a GPU, Triton runs in its interpreter
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def vectors(rows, width, *, dtype=torch.float32, seed=0, pad=0):
    """Unit-scale rows; ``pad`` makes them a slice of a wider matrix."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, width + pad, generator=generator) / width**0.5
    return wide.to(dtype)[:, :width]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_table(impl):
    database = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    query = torch.tensor([[1.0, 0.5]])
    tables = {
        "ip": ([3.0, 1.5, 1.0, 0.0], [0, 2, 1, 3]),
        "l2": ([-0.25, -1.25, -3.25, -4.25], [2, 3, 1, 0]),
        "cosine": ([1.5 / 2.5**0.5, 1 / 1.25**0.5, 0.5 / 1.25**0.5, 0.0], [2, 0, 1, 3]),
    }
    for metric, (scores, ids) in tables.items():
        result = prefix_topk(query, database, 4, metric=metric, impl=impl)
        assert result.ids.tolist() == [ids]
        torch.testing.assert_close(result.scores, torch.tensor([scores]))
    assert prefix_topk(query, database, 2, dim=1, impl=impl).ids.tolist() == [[0, 2]]


# aligned; ragged; one query; more queries than a group; k beyond a tile; k beyond N
SHAPES = [(8, 256, 32, 10), (7, 1001, 33, 10), (1, 300, 5, 3), (29, 200, 7, 70), (2, 20, 4, 50)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "metric"), RUNS)
def test_against_float64(impl, metric, dtype, shape):
    B, N, width, k = shape
    if impl == "triton" and (dtype == torch.float16 or N > 300):
        N = min(N, 140)  # the interpreter is slow
    q, x = vectors(B, width, dtype=dtype, pad=3), vectors(N, width, dtype=dtype, seed=1, pad=5)
    dim = max(1, width - 1)
    exact = reference.scores(q, x, dim, metric)
    result = prefix_topk(q, x, k, dim=dim, metric=metric, impl=impl)
    assert_same_topk(result, exact, name="prefix_topk", tolerance=2e-6)
    candidates = torch.stack([torch.randperm(N)[: min(N, 37)] for _ in range(B)])
    candidates[:, 3] = -1
    found = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, candidates.clamp(min=0), True)
    found.scatter_(1, candidates[:, :3], True)  # row 0 only where it was asked for
    found[:, 0] = (candidates == 0).any(dim=1)
    reranked = rerank(q, x, candidates, k, dim=dim, metric=metric, impl=impl)
    masked = torch.where(found, exact, -torch.inf)
    assert_same_topk(reranked, masked, name="rerank", tolerance=2e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("isa", _C.available())
def test_every_instruction_set(isa, metric, monkeypatch):
    monkeypatch.setattr(native, "ISA", isa)
    q, x = vectors(13, 70), vectors(5000, 70, seed=1)
    exact = reference.scores(q, x, 70, metric)
    assert_same_topk(prefix_topk(q, x, 100, metric=metric), exact, name=isa, tolerance=2e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_vector_widths_agree_to_the_bit(metric, monkeypatch):
    q, x = vectors(13, 70), vectors(3000, 70, seed=1)
    results = []
    for isa in [name for name in _C.available() if name != "portable"]:
        monkeypatch.setattr(native, "ISA", isa)
        results.append(prefix_topk(q, x, 50, metric=metric))
    for other in results[1:]:
        assert torch.equal(other.scores, results[0].scores)
        assert torch.equal(other.ids, results[0].ids)


@pytest.mark.parametrize("metric", METRICS)
def test_results_depend_on_nothing_but_the_pair(metric, monkeypatch):
    q, x = vectors(70, 40), vectors(4000, 40, seed=1)
    whole = prefix_topk(q, x, 20, metric=metric)
    for rows in (slice(0, 1), slice(3, 5), slice(10, 27)):  # other batches, other groups
        part = prefix_topk(q[rows], x, 20, metric=metric)
        assert torch.equal(part.scores, whole.scores[rows]) and torch.equal(
            part.ids, whole.ids[rows]
        )
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "threads", threads)
        other = prefix_topk(q, x, 20, metric=metric)
        assert torch.equal(other.scores, whole.scores) and torch.equal(other.ids, whole.ids)
    again = rerank(q, x, whole.ids.flip(1), 20, metric=metric)  # rerank scores as the scan does
    assert torch.equal(again.scores, whole.scores) and torch.equal(again.ids, whole.ids)
    funnel = funnel_search(q, x, [(7, 4000), (39, 4000), (40, 20)], metric=metric)  # carried sums
    assert torch.equal(funnel.scores, whole.scores) and torch.equal(funnel.ids, whole.ids)


# Of many rows a sample tells that they score alike, of fewer a list that decides nothing.
@pytest.mark.parametrize(("rows", "distinct"), [(40_000, 40_000), (40_000, 3), (20_000, 3)])
@pytest.mark.parametrize("metric", METRICS)
def test_one_query_of_many_rows(metric, rows, distinct):
    x, q = vectors(distinct, 40, seed=1), vectors(70, 40)
    x = x[torch.arange(rows) % distinct]
    # By less than the rounding of a score, so that two sums disagree on their order.
    x = x * (1 + 2.0**-22 * torch.rand(x.shape, generator=torch.Generator().manual_seed(4)))
    whole = prefix_topk(q, x, 20, metric=metric)
    for row in (0, 69):
        one = prefix_topk(q[row], x, 20, metric=metric)
        assert torch.equal(one.scores[0], whole.scores[row])
        assert torch.equal(one.ids[0], whole.ids[row])


@pytest.mark.parametrize(("impl", "metric"), RUNS)
def test_equal_rows_come_in_order(impl, metric):
    rows = {"cpp": 1_000_000, "triton": 700}[impl]
    x = torch.ones(rows, 3)
    x[rows // 2] = 2.0  # one better row, by the inner product
    k = 7
    result = prefix_topk(torch.ones(2, 3), x, k, metric=metric, impl=impl)
    expected = [rows // 2, *range(k - 1)] if metric == "ip" else list(range(k))
    assert result.ids.tolist() == [expected] * 2


@pytest.mark.parametrize("impl", IMPLS)
def test_duplicates_and_a_descending_order(impl):
    # every value comes 50 times and each row beats all before it: the gate never closes
    x = (torch.arange(2000) // 50).float()[:, None]
    result = prefix_topk(torch.ones(1, 1), x, 120, impl=impl)
    expected = [*range(1950, 2000), *range(1900, 1950), *range(1850, 1870)]
    assert result.ids.tolist() == [expected]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize(("B", "N"), [(0, 5), (3, 0), (0, 0)])
def test_empty(impl, B, N):
    q, x = vectors(B, 4), vectors(N, 4)
    candidates = torch.full((B, 2), -1)
    for result in (
        prefix_topk(q, x, 3, impl=impl),
        rerank(q, x, candidates, 3, impl=impl),
        funnel_search(q, x, [(2, 5), (4, 3)], impl=impl),
    ):
        assert result.scores.shape == result.ids.shape == (B, 3)
        assert (result.ids == -1).all() and (result.scores == -torch.inf).all()


@pytest.mark.parametrize(("impl", "metric"), RUNS)
def test_funnel_is_its_stages(impl, metric):
    q, x = vectors(5, 48, seed=3), vectors(150, 48, seed=4)
    stages = [(8, 60), (16, 30), (48, 10)]
    expected = reference.funnel_search(q, x, stages, metric)
    result = funnel_search(q, x, stages, metric=metric, impl=impl)
    assert torch.equal(result.ids, expected.ids)
    torch.testing.assert_close(result.scores, expected.scores)


@pytest.mark.parametrize("impl", IMPLS)
def test_columns_past_dim_do_not_count(impl):
    q, x = vectors(3, 20), vectors(100, 20, seed=1)
    expected = prefix_topk(q, x, 5, dim=12, impl=impl)
    q[:, 12:], x[:, 12:] = torch.nan, torch.inf
    assert torch.equal(prefix_topk(q, x, 5, dim=12, impl=impl).scores, expected.scores)
    assert torch.equal(prefix_topk(q[:, :12], x, 5, dim=12, impl=impl).ids, expected.ids)


def test_kind_in_is_kind_out():
    q, x = vectors(3, 8), vectors(50, 8, seed=1)
    expected = prefix_topk(q, x, 4)
    for convert in (
        torch.Tensor.numpy,
        lambda t: locked(t.numpy()),
        lambda t: np.asfortranarray(t),
    ):
        result = prefix_topk(convert(q), convert(x), 4)
        assert isinstance(result.scores, np.ndarray) and isinstance(result.ids, np.ndarray)
        assert (result.ids == expected.ids.numpy()).all()
    flipped = prefix_topk(q.numpy(), x.numpy()[::-1], 4)  # a negative stride
    assert (flipped.ids == 49 - expected.ids.numpy()).all()
    doubles = prefix_topk(q.double(), x.double(), 4)
    assert torch.equal(doubles.scores, expected.scores)  # searched as fp32

    class Exported:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **kwargs):
            return self.tensor.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    assert torch.equal(prefix_topk(Exported(q), Exported(x), 4).ids, expected.ids)


def locked(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def test_out():
    q, x = vectors(3, 8), vectors(50, 8, seed=1)
    out = SearchResult(torch.empty(3, 4), torch.empty(3, 4, dtype=torch.int64))
    result = prefix_topk(q, x, 4, out=out)
    assert result.scores is out.scores and torch.equal(out.ids, prefix_topk(q, x, 4).ids)
    wrong = SearchResult(torch.full((3, 4), 7.0), torch.empty(3, 4, dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"out.ids: expected \[3, 4\] torch.int64, got .* torch.int32"
    ):
        prefix_topk(q, x, 4, out=wrong)
    assert (wrong.scores == 7.0).all()  # nothing half-written


def test_large_k_and_many_queries():
    q, x = vectors(300, 6), vectors(2000, 6, seed=1)
    result = prefix_topk(q, x, 2000)
    assert (result.ids.sort(dim=1).values == torch.arange(2000)).all()
    assert_same_topk(result, reference.scores(q, x, 6, "ip"), name="all rows", tolerance=2e-6)


Q, X = vectors(2, 8), vectors(10, 8)
BAD = torch.full((10, 8), 1.0)
BAD[4, 2] = torch.nan


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(queries={1.0}), TypeError, "queries: expected a tensor, a numpy array"),
        (dict(queries=Q[None]), ValueError, r"queries: expected shape \[rows, width\], got"),
        (dict(queries=Q[:, :5]), ValueError, "queries: expected width 8 as database, got 5"),
        (dict(queries=Q.half()), TypeError, "queries: expected torch.float32 as database"),
        (dict(queries=Q.int()), TypeError, "queries: expected a floating-point or int8 tensor"),
        (dict(queries=Q * torch.nan), ValueError, "queries: expected finite .* in row 0"),
        (
            dict(queries=Q.to("meta")),
            ValueError,
            "queries: expected a tensor on cpu, got one on meta",
        ),
        (dict(database=BAD), ValueError, "database: expected finite values, .* in row 4"),
        (
            dict(database=BAD.nan_to_num(torch.inf)),
            ValueError,
            "database: expected finite .* row 4",
        ),
        (dict(database=np.array([["a"]])), TypeError, "database: expected a numeric dtype"),
        (dict(database=X[:, :0], queries=Q[:, :0]), ValueError, "at least one column"),
        (dict(k=0), ValueError, "k: expected an integer >= 1, got 0"),
        (dict(k=1.5), TypeError, "k: expected an integer, got float"),
        (dict(k=True), TypeError, "k: expected an integer, got bool"),
        (dict(dim=9), ValueError, r"dim: expected an integer in \[1, 8\], got 9"),
        (dict(dim=0), ValueError, r"dim: expected an integer in \[1, 8\], got 0"),
        (
            dict(metric="dot"),
            ValueError,
            "metric: expected one of 'ip', 'cosine', .* got 'dot'",
        ),
        (dict(impl="cuda"), ValueError, "impl: expected None or one of .* got 'cuda'"),
        (dict(queries=Q * 1e30, database=X * 1e30), ValueError, "database: .* beyond"),
    ],
)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=message):
        prefix_topk(**(dict(queries=Q, database=X, k=3) | kwargs))


def test_a_metric_that_an_implementation_lacks(monkeypatch):
    assert set(METRICS) == {*metrics_of("cpp")} <= {*metrics_of("reference")}
    assert {*metrics_of("triton")} == {*DEVICE_METRICS} <= {*METRICS}
    monkeypatch.setattr(kernels, "METRICS", ("ip", "l2"))
    monkeypatch.delitem(DEVICE_METRICS, "cosine")
    expected = "metric: expected one of 'ip', 'l2' with {}, got 'cosine'"
    for run in (
        partial(prefix_topk, k=3), partial(approx_topk, k=3),
        partial(funnel_search, stages=[(8, 3)]),
        partial(rerank, candidates=torch.zeros(len(Q), 1, dtype=torch.int64), k=3),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=expected.format("impl='triton'")):
            run(Q, X, metric="cosine", impl="triton")
    with pytest.raises(ValueError, match=expected.format("device='cuda'")):
        MatryoshkaIndex((4, 8), metric="cosine", device="cuda")


@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "candidates: expected integers, got torch.float32"),
        (torch.zeros(3, 3, dtype=torch.int64), ValueError, r"candidates: expected shape \[2, C\]"),
        (
            torch.full((2, 3), 10),
            ValueError,
            r"candidates: expected rows in \[0, 10\) or -1, got 10",
        ),
        (torch.full((2, 3), -2), ValueError, r"candidates: expected rows .* got -2"),
    ],
)
def test_bad_candidates(candidates, error, message):
    with pytest.raises(error, match=message):
        rerank(Q, X, candidates, 2)


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([], ValueError, "stages: expected at least one"),
        ([(8, 10), (4, 5)], ValueError, "stages dims: expected strictly ascending"),
        ([(4, 5), (8, 10)], ValueError, "stages: expected keeps that do not grow"),
        ([(4, 5), (9, 5)], ValueError, r"stages: expected an integer in \[1, 8\], got 9"),
        ([(4, 0)], ValueError, r"stages\[0\] keep: expected an integer >= 1, got 0"),
        ([4, 8], TypeError, r"stages: expected a sequence of \(dim, keep\) pairs"),
    ],
)
def test_bad_stages(stages, error, message):
    with pytest.raises(error, match=message):
        funnel_search(Q, X, stages)


@pytest.mark.parametrize("impl", ["cpp", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bits(impl, dtype):
    g = torch.Generator().manual_seed(5)
    q, x = ((40 * torch.randn(n, 12, generator=g)).round().clamp(-127, 127) for n in (2, 60))
    q, x = q.to(dtype), x.to(dtype)
    for metric in metrics_of(impl):
        found = prefix_topk(q, x, 5, dim=9, metric=metric, impl=impl)
        expected = prefix_topk(q.double(), x.double(), 5, dim=9, metric=metric, impl="reference")
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    assert rerank(q, x, found.ids, 3, dim=9, metric="l2", impl=impl).ids.tolist() == (
        found.ids[:, :3].tolist()
    )


@pytest.mark.parametrize("impl", ["cpp", "reference", "triton"])
def test_approx_topk(impl, monkeypatch):
    g = torch.Generator().manual_seed(5)
    q, x = torch.randn(8, 6, generator=g), torch.randn(6000, 6, generator=g)
    exact = prefix_topk(q, x, 10, impl="reference")
    same = approx_topk(q, x, 10, recall=1.0, impl=impl)
    assert torch.equal(same.ids, exact.ids) and same.expected_recall == 1.0
    found = approx_topk(q.numpy(), x.numpy(), 10, recall=0.6, impl=impl)
    share = sum(
        len({*a} & {*b}) for a, b in zip(found.ids.tolist(), exact.ids.tolist(), strict=True)
    )
    assert 0.6 <= found.expected_recall <= 1
    # 80 of them: four standard deviations of a share
    assert share / 80 >= found.expected_recall - 4 * (0.25 / 80) ** 0.5
    if impl == "triton":
        assert found.expected_recall < 0.9 and share < 80
    for b, (ids, scores) in enumerate(zip(found.ids, found.scores, strict=True)):
        torch.testing.assert_close(torch.tensor(scores), x[ids] @ q[b], rtol=1e-4, atol=1e-4)
    for recall in (0, 1.5, -1):
        with pytest.raises(ValueError, match=r"recall: expected a number in \(0, 1\]"):
            approx_topk(q, x, 10, recall=recall, impl=impl)
