"""The Triton scan: exact after rescoring, within its margin, narrowed in parts."""

import pytest
import torch
from mrl_fast.kernels import search as kernels
from mrl_fast.kernels.search import (
    metrics,
    narrow,
    plan,
    queries,
    scan,
    scan_shape,
    topk,
)

from benchmarks.gpu.margin import scan_error
from mrl_fast.search import reference
from mrl_fast.testing import assert_same_topk
from tests.helpers.kernels import DTYPES, METRICS, make_vectors


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
# Of queries in two parts: matrix products of 64 and 128 rows, one block of columns and several.
IN_TWO_PARTS = [(B, dim) for B in (70, 200) for dim in (16, 32, 64, 256)]
KINDS = ["signs", "positive", "spike"]
HALVES = [torch.float16, torch.bfloat16]  # the interpreter's products of bf16 are wrong


def margin_vectors(kind, rows, dim, device):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, dim, generator=generator).to(device)
    if kind == "positive":  # errors of one direction
        x = x.abs()
    if kind == "spike":  # beside which the other products, of 14 bits, are nothing
        x.fill_(0.171875)[:, 0] = 16
    return x


@pytest.mark.parametrize("shape", ON_A_DEVICE if torch.cuda.is_available() else [(70, 40)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_a_scan_are_within_its_margin(dtype, kind, shape, triton_device):
    """What tensor cores add up, by truncation, against fp64: on a device above all."""
    N, (B, dim) = 100_000 if triton_device == "cuda" else 300, shape
    q, x = (margin_vectors(kind, n, dim, triton_device) for n in (B, N))
    scale = {torch.int8: 7 if kind == "spike" else 40}.get(dtype, 1)
    assert scan_error(*((scale * v).clamp(-127, 127).to(dtype) for v in (q, x))) <= 1


@pytest.mark.parametrize(
    "shape", IN_TWO_PARTS if torch.cuda.is_available() else [(20, 16), (20, 40)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES[: 2 if torch.cuda.is_available() else 1], ids=str)
def test_sums_of_queries_in_two_parts_are_within_its_margin(dtype, kind, shape, triton_device):
    """Two products a tile, whose sum holds the bits that the rows' dtype has not."""
    N, (B, dim) = 100_000 if triton_device == "cuda" else 300, shape
    q, x = (margin_vectors(kind, n, dim, triton_device) for n in (B, N))
    assert scan_error(q * 1.01, x.to(dtype)) <= 1


@pytest.mark.parametrize("dim", [16, 40])
def test_two_sums_are_as_good_as_one(dim, triton_device, monkeypatch):
    """As on Blackwell, where products may not follow one another in one sum."""
    for module in (scan, scan_shape):
        monkeypatch.setattr(module, "one_sum_a_product", lambda x: True)
    q, x = (margin_vectors("signs", n, dim, triton_device) for n in (20, 300))
    assert scan_error(q, x.half()) <= 1
    assert scan_shape.scan_precision(x) == "tf32"


def test_an_error_of_a_scan_is_seen(triton_device, monkeypatch):
    """A margin that is too small, a bucket that does not come, and one that comes twice."""
    q, x = (margin_vectors("positive", n, 40, triton_device) for n in (5, 300))
    assert 0 < scan_error(q, x) <= 1
    tiny = metrics.Margin(bound=0.0, a=1e-12)
    monkeypatch.setattr(metrics.Margin, "from_rows", classmethod(lambda *_: tiny))
    assert scan_error(q, x) > 1
    monkeypatch.undo()
    call = scan.Scan.__call__

    for instead in (lambda hits: hits[:, 0], lambda hits: -1):

        def wrong(self, hits, *args, instead=instead, **kwargs):
            call(self, hits, *args, **kwargs)
            hits[:, 1] = instead(hits)

        monkeypatch.setattr(scan.Scan, "__call__", wrong)
        assert scan_error(q, x) == torch.inf


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
    margin, config = metrics.Margin.from_rows(x, metric), scan_shape.Config(64, 128, 64, 4, 3)
    planned = plan.Plan.from_sizes(k, x, config, margin, len(q))
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
            before = count[: len(hits)].clone()
            scan(self, hits, count, *rest, **more)
            margin = metrics.Margin.from_rows(x, metric).error(norms[1], norms[0])
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


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_narrowing_in_parts(metric, triton_device):
    C, rank = 8192, 5
    score = torch.randn(6, C, generator=torch.Generator().manual_seed(0)).to(triton_device)
    score[0, 7000] = torch.nan
    bits = score.view(torch.int32).long() << 32 | torch.arange(C, device=score.device)
    sizes, norms = torch.tensor(
        [[C, 5000, 100, C + 9, 90, 80], [1, 300, 1, 1, 1, 0]], device=score.device
    )
    q = queries.scan_queries(norms[:, None].float(), norms[:, None].float(), metric)
    q = q._replace(margin=metrics.Margin(0.0, 0.0, d=0.01))
    among = torch.tensor([1, 1, 1, 1, 0, 1], dtype=torch.int32, device=score.device)
    one = torch.ones(1, dtype=torch.float32, device=score.device)
    for norm in (one, one.view(torch.int32)):
        to = plan.buffers(score, C)
        to.hits.copy_(bits)
        to.count[:6] = sizes.int() - 7
        narrow.narrow(to, q, norm, rank, seeds=7, among=among)
        flag, count, theta = to.flag[:6], to.count[:6], to.theta
        assert flag.tolist() == [0, 0, 0, 1, 0, 0] and count[4] == 0
        for b, size in enumerate(sizes.clamp(max=C).tolist()):
            if b == 4 or metric == "cosine" and b == 5:  # a norm of which nothing is known
                assert theta[b] == -torch.inf and count[b] == (size if b == 5 else 0)
                continue
            seen = score[b, :size]
            best = seen.sort(descending=True).values[rank - 1 : rank + 1]  # NaN first
            error = 0.02 * norms[b].item()
            assert best[1] < theta[b].item() + error * (1 + 1e-5) and theta[b] + error <= best[0]
            kept = (~(seen < theta[b])).nonzero()[:, 0]
            assert torch.equal(to.hits[b, : count[b]], bits[b, kept])
        assert 4900 < count[1] < 5000 and count[0] >= rank  # next to nothing, nearly all, is cut
        assert metric == "cosine" or count[5] == rank


INF, NAN = float("inf"), float("nan")
EQUAL = [[3.0] * 40, [2.0] * 4 + [1.0] * 36, [0.0, -0.0] * 20, [2.0] * 4 + [-INF] * 36]


@pytest.mark.parametrize("score", [*EQUAL, [INF] * 40, [1.0] + [INF] * 39], ids=str)
def test_narrowing_among_equal_scores(score, triton_device):
    """No bit tells them apart: those that may be the fifth best stay, all of them."""
    score = torch.tensor([score], device=triton_device)
    ones = torch.ones(1, 1, device=triton_device)
    q = queries.scan_queries(ones, ones, "ip")._replace(margin=metrics.Margin(0.0, 0.0))
    to = plan.buffers(score, 64)
    to.hits[:, :40] = score.view(torch.int32).long() << 32
    narrow.narrow(to, q, ones[0], 5, seeds=40)
    theta = score.sort(descending=True).values[0, 4]
    assert to.theta.item() == theta and to.count[0] == (score >= theta).sum()


@pytest.mark.parametrize("many", [4, 5])
def test_narrowing_where_the_best_are_no_numbers(many, triton_device):
    """NaN ranks highest: no numbers are left beside five of them."""
    score = torch.tensor([[NAN] * many + [1.0] * (40 - many)], device=triton_device)
    ones = torch.ones(1, 1, device=triton_device)
    q = queries.scan_queries(ones, ones, "ip")._replace(margin=metrics.Margin(0.0, 0.0))
    to = plan.buffers(score, 64)
    to.hits[:, :40] = score.view(torch.int32).long() << 32
    narrow.narrow(to, q, ones[0], 5, seeds=40)
    assert not to.theta.isnan() and to.count[0] == (40 if many < 5 else 5)
