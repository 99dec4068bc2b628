"""The Triton kernels of search: selection, rescans, reranking, and what may not change a score."""

import pytest
import torch
from mrl_fast.kernels import search as kernels
from mrl_fast.kernels.search import (
    approx,
    keys,
    pair_scores,
    plan,
    queries,
    rescan,
    scan_shape,
    topk,
)
from mrl_fast.kernels.search.keys import EMPTY

from mrl_fast.search import reference
from mrl_fast.testing import assert_same_topk
from tests.helpers.kernels import METRICS, make_vectors


@pytest.mark.parametrize("metric", METRICS)
def test_more_ties_than_the_scan_keeps_are_rescanned(metric, rescans, triton_device):
    x = make_vectors(1, 5, triton_device).repeat(1500, 1)
    q = torch.cat([x[:1], -x[:1]])
    scores, ids = kernels.prefix_topk(q, x, 40, 5, metric)
    assert rescans == [2]
    assert (ids == torch.arange(40, device=ids.device)).all()
    assert (scores == scores[:, :1]).all()


def test_only_the_queries_that_need_it_are_rescanned(rescans, triton_device):
    x = torch.zeros(1200, 2, device=triton_device)
    x[:, 0] = 1.0
    x[:, 1] = torch.arange(1200)
    q = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=triton_device)
    _, ids = kernels.prefix_topk(q, x, 3, 2, "ip")
    assert ids.tolist() == [[1199, 1198, 1197], [0, 1, 2]] and rescans == [1]


def test_pairs_that_are_scored_last_leave_what_a_rescan_wrote(triton_device):
    """Programs of one launch come in any order."""
    q, x = make_vectors(2, 5, triton_device), make_vectors(600, 5, triton_device, seed=1)
    to, most, k = plan.buffers(q, 64), 16, 4
    to.hits.zero_()
    to.count[:2] = torch.tensor([most + 1, 3])
    pairs, config = pair_scores.Pairs(q, x, "ip"), scan_shape.scan_config(2, x)
    keys = torch.zeros(2, most * scan_shape.BUCKET, dtype=torch.int64, device=q.device)
    blocks = pair_scores.pair_blocks(x, 2 * len(x))
    rescans = rescan._rescans(2, len(x), k, 3, blocks["ROWS"], blocks["BLOCKS"])
    rescan._launch(pairs, to, keys, config, rescans, pairs_too=False)
    merged = keys[0, : rescans.KEPT].clone()
    rescan._launch(pairs, to, keys, config, rescans)
    assert torch.equal(keys[0, : rescans.KEPT], merged)
    assert (keys[0, rescans.KEPT :] == EMPTY.value).all() and to.flag[:2].tolist() == [1, 0]
    best = reference.scores(q, x, 5, "ip")[0].topk(k).indices
    assert torch.equal(0xFFFFFFFF - (merged[:k] & 0xFFFFFFFF), best)


@pytest.mark.parametrize("metric", METRICS)
def test_nan_is_not_dropped(metric, rescans, triton_device):
    q, x = make_vectors(2, 4, triton_device), make_vectors(500, 4, triton_device, seed=1)
    x[321, 2] = torch.nan
    scores, ids = kernels.prefix_topk(q, x, 3, 4, metric)
    assert (ids[:, 0] == 321).all() and scores[:, 0].isnan().all()  # highest, as torch ranks it
    assert scores[:, 1:].isfinite().all()


def test_norms_of_zero_and_beyond_fp32(rescans, triton_device, monkeypatch):
    q, x = make_vectors(2, 4, triton_device), make_vectors(120, 4, triton_device, seed=1)
    x[::7] = 0.0
    scores, ids = kernels.prefix_topk(q, x, 120, 4, "cosine")
    assert (scores.gather(1, ids.argsort(dim=1))[:, ::7] == 0).all()
    rescans.clear()
    x = make_vectors(300, 4, triton_device, seed=1)
    x[1] *= 1e-15  # squares of it leave fp32's normal range: no margin holds
    for bytes_at_once in (plan.TEMPORARY_BYTES, 1):  # norms found in the scan, and before it
        monkeypatch.setattr(plan, "TEMPORARY_BYTES", bytes_at_once)
        found = kernels.prefix_topk(q, x, 3, 4, "cosine")
        assert_same_topk(found, reference.scores(q, x, 4, "cosine"), name="cosine", tolerance=1e-6)
    assert rescans == [2, 1, 1]


@pytest.mark.parametrize("metric", METRICS)
def test_a_score_depends_on_nothing_but_the_pair(metric, rescans, triton_device, monkeypatch):
    q, x = make_vectors(9, 21, triton_device), make_vectors(500, 21, triton_device, seed=1)
    scores, ids = kernels.prefix_topk(q, x, 6, 21, metric)

    def check(result, rows=slice(None)):
        assert torch.equal(result[0], scores[rows]) and torch.equal(result[1], ids[rows])

    for rows in (slice(0, 1), slice(3, 8)):  # another batch
        check(kernels.prefix_topk(q[rows], x, 6, 21, metric), rows)
    wide = torch.zeros(500, 32, device=x.device)  # other strides, other vector loads
    wide[:, :21] = x
    check(kernels.prefix_topk(q.contiguous(), wide, 6, 21, metric))
    check(kernels.prefix_topk(q.T.contiguous().T, x.T.contiguous().T, 6, 21, metric))
    check(kernels.rerank(q, x, ids.flip(1), 6, 21, metric))
    check(kernels.funnel_search(q, x, [(5, 500), (21, 6)], metric))
    monkeypatch.setattr(plan, "TEMPORARY_BYTES", 1)  # other chunks
    check(kernels.prefix_topk(q, x, 6, 21, metric))
    check(kernels.rerank(q, x, ids, 6, 21, metric))
    monkeypatch.setattr(topk, "RESCANNED", 5)  # every pair scored
    check(kernels.prefix_topk(q, x, 6, 21, metric))


def test_chunks_of_rows(triton_device, monkeypatch):
    monkeypatch.setattr(plan, "TEMPORARY_BYTES", 1)
    x = torch.arange(9000.0, device=triton_device)[:, None] // 4500
    for k in (3, 4600):  # within a chunk of 4096 rows, and beyond one
        scores, ids = keys.empty(torch.ones(1, 1, device=x.device), k)
        topk.score_all(
            torch.ones(1, 1, device=x.device), x, k, "ip", (scores, ids), plan.KnownRows()
        )
        expected = torch.arange(9000, device=x.device).roll(-4500)[:k]
        assert torch.equal(ids[0], expected)


@pytest.mark.parametrize(("B", "N", "k"), [(0, 300, 3), (2, 0, 3), (2, 5, 9), (2, 200, 300)])
def test_fewer_than_k(B, N, k, rescans, triton_device):
    q, x = make_vectors(B, 4, triton_device), make_vectors(N, 4, triton_device, seed=1)
    scores, ids = kernels.prefix_topk(q, x, k, 3, "ip")
    assert scores.shape == ids.shape == (B, k) and ids.dtype == torch.int64
    assert (ids[:, N:] == -1).all() and (scores[:, N:] == -torch.inf).all()
    exact = reference.scores(q, x, 3, "ip")
    if B:
        assert_same_topk((scores, ids), exact, name="ip", tolerance=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_rerank_of_strided_candidates_with_repeats(metric, triton_device):
    q, x = make_vectors(3, 10, triton_device), make_vectors(50, 10, triton_device, seed=1)
    generator = torch.Generator().manual_seed(2)
    candidates = torch.randint(-1, 50, (3, 30), generator=generator).to(x.device)[:, ::2]
    scores, ids = kernels.rerank(q, x, candidates, 20, 9, metric)
    expected = reference.rerank(q, x, candidates, 20, 9, metric)
    assert torch.equal(ids, expected.ids)
    torch.testing.assert_close(scores, expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_queries_of_more_bits_than_the_rows(metric, rescans, triton_device):
    q, x = make_vectors(3, 24, triton_device), make_vectors(900, 24, triton_device, seed=1).half()
    found = keys.empty(q, 4)
    topk.topk(q, x.contiguous(), 4, metric, found)
    exact = reference.scores(q, x, 24, metric)
    assert_same_topk(found, exact, name=metric, tolerance=1e-5 * exact.abs().max().item())
    assert not rescans, "two parts of a query leave no margin to speak of"
    coarse = queries.scan_queries(q, x, metric)
    left = q.double() - coarse.q.double() - coarse.low.double()
    assert (left.norm(dim=1) <= coarse.errors).all() and (coarse.errors < 1e-5).all()


@pytest.mark.parametrize("double", [False, True])
def test_blocks_that_are_loaded_together_are_added_one_by_one(double, triton_device, monkeypatch):
    q, x = make_vectors(2, 300, triton_device), make_vectors(40, 300, triton_device, seed=1)
    rows = torch.arange(40, device=x.device).expand(2, -1)
    for metric in METRICS:
        found = []
        for blocks in (1, 2, 4):
            shape = dict(ROWS=32, BLOCKS=blocks, num_warps=4)
            monkeypatch.setattr(pair_scores, "pair_blocks", lambda *_, shape=shape: shape)
            found.append(pair_scores.Pairs(q, x, metric, double=double).keys(rows))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("factor", [1e-25, 1e-22, 1e18])
@pytest.mark.parametrize("metric", METRICS)
def test_norms_beyond_what_fp32_can_square(metric, factor, triton_device):
    """Scores of rows and queries that small are 0 or made of a few bits: then rows decide."""
    q, x = make_vectors(2, 6, triton_device), make_vectors(300, 6, triton_device, seed=1)
    for a, b in ((q * factor, x), (q, x * factor)):
        found, every = keys.empty(q, 5), keys.empty(q, 5)
        topk.topk(a, b, 5, metric, found)
        topk.score_all(a, b, 5, metric, every, plan.KnownRows())
        assert torch.equal(found[1], every[1]) and torch.equal(found[0], every[0])


def test_the_default_dtype_is_not_ours(triton_device, monkeypatch):
    monkeypatch.setattr(plan, "TEMPORARY_BYTES", 1)  # norms before the scan
    q, x = make_vectors(2, 6, triton_device), make_vectors(400, 6, triton_device, seed=1)
    expected = kernels.prefix_topk(q, x, 3, 6, "cosine")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = kernels.prefix_topk(q, x, 3, 6, "cosine")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_rows_far_apart_and_candidates_that_do_not_exist(triton_device):
    memory = torch.zeros(1 << 26, dtype=torch.int8, device=triton_device)
    x = memory.as_strided((16, 8), ((1 << 22) - 3, 1))
    x.copy_(torch.randint(-9, 9, (16, 8)))
    _, ids = kernels.prefix_topk(x[3:4].clone(), x, 2, 8, "l2")
    assert ids[0, 0] == 3
    rows = torch.tensor([[1, 99, -1, 1 << 40]], device=triton_device)
    assert kernels.rerank(x[3:4].clone(), x, rows, 3, 8, "ip")[1].tolist() == [[1, -1, -1]]


@pytest.mark.parametrize("metric", METRICS)
def test_chunks_of_queries_that_alone_would_take_another_shape(
    metric, rescans, triton_device, monkeypatch
):
    def shape(queries, x):
        return scan_shape.Config(16, 64 if queries > 2 else 128, 16, 1, 1)

    for user in (approx, topk):
        monkeypatch.setattr(user, "scan_config", shape)
    q, x = make_vectors(3, 5, triton_device), make_vectors(1003, 5, triton_device, seed=1)
    expected = kernels.prefix_topk(q, x, 4, 5, metric)
    monkeypatch.setattr(plan, "TEMPORARY_BYTES", 1)  # a query at a time
    found = kernels.prefix_topk(q, x, 4, 5, metric)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not rescans
    roughly = kernels.approx_topk(q, x, 4, 5, metric, 0.9)[0]
    monkeypatch.undo()
    monkeypatch.setattr(approx, "scan_config", shape)
    assert torch.equal(roughly[1], kernels.approx_topk(q, x, 4, 5, metric, 0.9)[0][1])
