"""The Triton scan: exact after rescoring, within its margin, narrowed in parts."""

import pytest
import torch
from mrl_fast.kernels import search as kernels
from mrl_fast.kernels.search import (
    keys,
    metrics,
    plan,
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


# Queries of two parts: two matrix products in one kernel, of every width of a block.
IN_TWO_PARTS = [(queries, dim) for queries in (70, 200) for dim in (16, 32, 64, 256)]


def vectors_to_add_up(kind, shape, device):
    """Queries and rows, fp32, whose products are hard to add up."""
    N, (B, dim) = 100_000 if device == "cuda" else 300, shape
    generator = torch.Generator().manual_seed(5)
    q, x = (torch.randn(n, dim, generator=generator).to(device) for n in (B, N))
    if kind == "positive":  # errors of one direction
        q, x = q.abs(), x.abs()
    if kind == "spike":  # beside which the other products, of 14 bits, are nothing
        for t in (q, x):
            t.fill_(0.171875)[:, 0] = 16
    return q, x


@pytest.mark.parametrize("shape", ON_A_DEVICE if torch.cuda.is_available() else [(70, 40)], ids=str)
@pytest.mark.parametrize("kind", ["signs", "positive", "spike"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_a_scan_are_within_its_margin(dtype, kind, shape, triton_device):
    """What tensor cores add up, by truncation, against fp64: on a device above all."""
    q, x = vectors_to_add_up(kind, shape, triton_device)
    scale = {torch.int8: 7 if kind == "spike" else 40}.get(dtype, 1)
    q, x = ((scale * v).clamp(-127, 127).to(dtype) for v in (q, x))
    assert scan_error(q, x) <= 1


@pytest.mark.parametrize(
    "shape", IN_TWO_PARTS if torch.cuda.is_available() else [(70, 40)], ids=str
)
@pytest.mark.parametrize("kind", ["signs", "positive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_a_scan_in_two_parts_are_within_its_margin(dtype, kind, shape, triton_device):
    q, x = vectors_to_add_up(kind, shape, triton_device)
    assert scan_error(q, x.to(dtype)) <= 1


def test_an_error_of_a_scan_is_seen(triton_device, monkeypatch):
    """A margin that is too small, a bucket that does not come, and one that comes twice."""
    q, x = vectors_to_add_up("positive", (5, 40), triton_device)
    assert 0 < scan_error(q, x) <= 1
    tiny = metrics.Margin(bound=0.0, a=1e-12)
    monkeypatch.setattr(metrics.Margin, "of", classmethod(lambda *_: tiny))
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
