"""The Triton search engine: its scan and margin, the rescan, and what may not change a score."""

import pytest
import torch
from mrl_fast.kernels import search as kernels
from mrl_fast.kernels.search import (
    approx,
    keys,
    metrics,
    pair_scores,
    plan,
    scan,
    scan_shape,
    topk,
)
from mrl_fast.kernels.shared.tiling import operand

from mrl_fast.search import reference
from mrl_fast.testing import assert_same_topk

METRICS = ["ip", "cosine", "l2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


def make_vectors(rows, width, device, *, seed=0, dtype=torch.float32):
    """A slice of a wider matrix, so that strides are real."""
    wide = torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(seed))
    return wide.to(device, dtype)[:, :width]


@pytest.fixture
def rescans(monkeypatch):
    """A scan with small buffers, so that small databases are scanned in phases; counts the queries
    that were flagged."""
    monkeypatch.setattr(plan, "BUFFER", (16, 32))
    monkeypatch.setattr(plan, "LEAST_RANK", 4)
    counted, rescan = [], topk.rescan

    def spy(self, keys, flag, k):
        if flag.any():
            counted.append(int(flag.sum()))
        rescan(self, keys, flag, k)

    monkeypatch.setattr(topk, "rescan", spy)
    return counted


# aligned; ragged rows and columns; two tiles of queries; one column; one query
@pytest.mark.parametrize(
    "shape", [(4, 1024, 16), (5, 1421, 19), (20, 900, 5), (3, 700, 1), (1, 833, 33)], ids=str
)
@pytest.mark.parametrize("metric", METRICS)
def test_scan_is_exact(metric, shape, rescans, triton_device):
    B, N, dim = shape
    q = make_vectors(B, dim, triton_device)
    x = make_vectors(N, dim, triton_device, seed=1)
    result = kernels.prefix_topk(q, x, 4, dim, metric)
    exact = reference.scores(q, x, dim, metric)
    assert_same_topk(result, exact, name=metric, tolerance=1e-5 * exact.abs().max().item())
    if dim > 1 or metric == "l2":  # one column ties under cosine
        assert not rescans, "the scan was to suffice, or it is not tested"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scan_of_half_precision(dtype, rescans, triton_device):
    q = make_vectors(5, 24, triton_device, dtype=dtype)
    x = make_vectors(400, 24, triton_device, seed=1, dtype=dtype)
    result = kernels.prefix_topk(q, x, 4, 20, "cosine")
    exact = reference.scores(q, x, 20, "cosine")
    assert_same_topk(result, exact, name="cosine", tolerance=1e-6)
    assert not rescans


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_scan_of_eight_bits(metric, dtype, rescans, triton_device):
    q, x = make_vectors(5, 24, triton_device), make_vectors(900, 24, triton_device, seed=1)
    q, x = ((40 * v).round().clamp(-128, 127).to(dtype) for v in (q, x))
    exact = reference.scores(q, x, 20, metric)
    result = kernels.prefix_topk(q, x, 4, 20, metric)
    assert_same_topk(result, exact, name=metric, tolerance=1e-6 * exact.abs().max().item())
    assert not rescans


# On a device: tiles of every number of queries, columns in one block and in several, rows that are
# not aligned. The interpreter has one shape of tiles.
ON_A_DEVICE = [(70, 1024), (200, 128), (16, 128), (16, 1024), (200, 1024), (70, 1000)]


@pytest.mark.parametrize("shape", ON_A_DEVICE if torch.cuda.is_available() else [(70, 40)], ids=str)
@pytest.mark.parametrize("kind", ["signs", "positive", "spike"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_a_scan_are_within_its_margin(dtype, kind, shape, triton_device):
    """What tensor cores add up, by truncation, against fp64: on a device above all."""
    N, (B, dim) = 100_000 if triton_device == "cuda" else 300, shape
    generator = torch.Generator().manual_seed(5)
    q, x = (torch.randn(n, dim, generator=generator).to(triton_device) for n in (B, N))
    if kind == "positive":  # errors of one direction
        q, x = q.abs(), x.abs()
    if kind == "spike":  # beside which the other products, of 14 bits, are nothing
        for t in (q, x):
            t.fill_(0.171875)[:, 0] = 16
    scale = {torch.int8: 7 if kind == "spike" else 40}.get(dtype, 1)
    q, x = (operand((scale * v).clamp(-127, 127).to(dtype)) for v in (q, x))
    coarse, config = plan.scan_queries(q, x, "ip"), scan_shape.scan_config(len(q), x)
    seeds, tiles = config.BLOCK_N // scan_shape.BUCKET, -(-N // config.BLOCK_N)
    hits, count, _, theta = plan.buffers(q, tiles * seeds, tiles * seeds)
    terms, norm = metrics.row_terms(x, "ip")
    one = scan.Scan(config, coarse.q, x, "ip", terms, coarse.norms, norm)
    one(hits, count, theta, 0, tiles, window=1)
    best = (hits >> 32).int().view(torch.float32).double()
    bucket, i = (hits & 0xFFFFFFFF)[0], torch.arange(scan_shape.BUCKET, device=q.device)
    there = bucket != 0xFFFFFFFF
    assert (there.sum() * scan_shape.BUCKET >= N) and len(bucket[there].unique()) == there.sum()
    best, bucket = best[:, there], bucket[there]
    within = (bucket % seeds)[:, None]
    rows = (i // 2 * config.groups + within // 4) * 8 + within % 4 * 2 + i % 2
    rows += (bucket // seeds * config.BLOCK_N)[:, None]
    exact = q.double() @ x.double().T
    exact = exact[:, rows.clamp(max=N - 1)].where(rows < N, -torch.inf).amax(2)
    error = coarse.margin.error(coarse.norms, norm)[:, None]
    assert ((best - exact).abs() <= error).all(), ((best - exact).abs() / error).max()


@pytest.mark.parametrize("dim", [256, 768])
@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32], ids=str)
def test_margins_leave_few_rows_to_be_scored_again(dtype, metric, k, dim, monkeypatch):
    """On Hopper the error of sums in few bits must not grow with the columns, or all queries would
    be rescanned. By scores of fp32: margins are of a device's products."""
    monkeypatch.setattr(scan_shape, "hopper", lambda x: True)
    monkeypatch.setattr(metrics, "scan_precision", lambda x: "tf32")
    q, x = (make_vectors(n, dim, "cpu", seed=n) for n in (4, 100_000))
    q, x = (torch.nn.functional.normalize(v).to(dtype) for v in (q, x))
    margin, config = metrics.Margin.of(x, metric), scan_shape.Config(64, 128, 64, 4, 3)
    planned = plan.Plan.of(k, x, config, margin)
    q, x = q.float(), x.float()
    scores = q @ x.T - (x.square().sum(1) / 2 if metric == "l2" else 0)
    error = margin.error(q.norm(dim=1), x.norm(dim=1).max())[:, None]
    buckets = scores.view(len(q), -1, scan_shape.BUCKET).amax(2)
    theta = torch.full_like(error, -torch.inf)
    begin = 0
    for end in planned.ends:  # in any order: rows are random
        ends = (
            begin * config.BLOCK_N // scan_shape.BUCKET,
            end * config.BLOCK_N // scan_shape.BUCKET,
        )
        hits = (buckets[:, ends[0] : ends[1]] >= theta).sum(1)
        assert begin == 0 or (hits + planned.kept <= planned.buffer).all(), (hits, planned)
        seen = buckets[:, : ends[1]]
        theta = seen.topk(planned.rank).values[:, -1:] - 2 * error
        begin = end
    kept = (buckets >= theta).sum(1)
    assert (kept <= planned.kept).all(), (kept, planned)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [4, 17])  # norms found in the scan, and before it
def test_errors_of_the_scan_within_its_margin_change_nothing(
    queries, metric, rescans, triton_device, monkeypatch
):
    q, x = make_vectors(queries, 8, triton_device), make_vectors(1000, 8, triton_device, seed=1)
    # Ties and near ties, more than k and fewer than are scored again, each in a bucket of its own.
    x[70::104] = x[7] * (1 + 2e-7 * torch.arange(9, device=x.device)[:, None].clamp(max=6))
    q[0] = x[7]
    expected = kernels.prefix_topk(q, x, 5, 8, metric)
    scan = topk.Scan.__call__
    norms = torch.linalg.vector_norm(x, dim=1).max(), torch.linalg.vector_norm(q, dim=1)
    if metric == "cosine":  # rows are divided by theirs
        norms = torch.ones_like(norms[0]), norms[1]
    wrong = 0
    # As bad as it can be: the k best seem worse, all others better; and at random.
    for factor, worst, seed in [
        (0.99, True, 0),
        (0.95, False, 1),
        (0.95, False, 2),
        (1e5, False, 0),
    ]:
        generator = torch.Generator().manual_seed(seed)

        def noisy(self, hits, count, *rest, factor=factor, worst=worst, random=generator, **more):
            before = count.clone()
            scan(self, hits, count, *rest, **more)
            margin = metrics.Margin.of(x, metric).error(norms[1], norms[0])
            score = (hits >> 32).int().view(torch.float32)
            noise = 2 * torch.rand(score.shape, generator=random).to(score) - 1
            if worst:
                config, bucket = self.config, expected[1] % self.config.BLOCK_N
                of_tile = config.BLOCK_N // scan_shape.BUCKET
                bucket = bucket // 8 % config.groups * 4 + bucket % 8 // 2
                bucket += expected[1] // config.BLOCK_N * of_tile
                best = ((hits & 0xFFFFFFFF)[:, :, None] == bucket[:, None]).any(2)
                noise = torch.where(best, -1.0, 1.0)
            moved = score + factor * noise * margin[: len(score), None]
            lanes = torch.arange(hits.shape[1], device=hits.device)
            new = (lanes >= before[:, None]) | bool(more.get("window"))
            moved = torch.where(new, moved, score).view(torch.int32).long()
            hits.copy_(moved << 32 | hits & 0xFFFFFFFF)

        monkeypatch.setattr(topk.Scan, "__call__", noisy)
        result = kernels.prefix_topk(q, x, 5, 8, metric)
        if factor <= 1:
            assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
        else:
            wrong += int((result[1] != expected[1]).sum())
    assert wrong, "errors far beyond the margin were to show, or this test sees nothing"


def test_narrowing_in_parts(triton_device):
    C, rank = 8192, 5
    score = torch.randn(4, C, generator=torch.Generator().manual_seed(0)).to(triton_device)
    score[0, 7000] = torch.nan
    before = score.view(torch.int32).long() << 32 | torch.arange(C, device=score.device)
    sizes, norms = torch.tensor([[C, 5000, 100, C + 9], [1, 300, 1, 1]], device=score.device)
    hits, count = before.clone(), sizes.int()
    flag, theta = torch.zeros_like(count), torch.empty_like(score[:, 0])
    one = torch.ones(1, device=score.device)
    keys.narrow(hits, count, flag, theta, norms.float(), None, one, rank, (0.0, 0.0, 0.01, 0.0))
    assert flag.tolist() == [0, 0, 0, 1]
    for b, size in enumerate(sizes.clamp(max=C).tolist()):
        seen = score[b, :size]
        best = seen.sort(descending=True).values[rank - 1]  # NaN first
        assert theta[b].item() == pytest.approx(best.item() - 0.02 * norms[b].item(), rel=1e-5)
        kept = (~(seen < theta[b])).nonzero()[:, 0]
        assert torch.equal(hits[b, : count[b]], before[b, kept])
    assert 4900 < count[1] < 5000 and count[0] >= rank  # next to nothing, and nearly all, is cut


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
    coarse = plan.scan_queries(q, x, metric)
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
