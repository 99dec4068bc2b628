"""Exact search by codes of eight bits on the device: each term of the bound decides somewhere."""

import pytest
import torch
from mrl_fast.kernels.search import certified, plan
from mrl_fast.kernels.search.coarse import Codes, Int8
from mrl_fast.kernels.search.keys import empty
from mrl_fast.kernels.search.metrics import row_terms
from mrl_fast.kernels.search.plan import KnownRows

from mrl_fast.search import reference
from mrl_fast.testing import assert_same_topk
from tests.helpers.kernels import METRICS

WIDTH = 40
# Rows that a query with large errors scores exactly, and just below the row that is the best.
DECOYS = {"ip": (0.6, 0.0, 0.0), "cosine": (2.0, 127.0, -127.0), "l2": (-3.15, 0.0, 0.0)}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(plan, "BUFFER", (16, 16))
    monkeypatch.setattr(plan, "LEAST_RANK", 4)
    monkeypatch.setattr(certified, "SURVIVORS", 24)


def randn(rows, seed=0):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def search(q, x, k, metric):
    """Checks the k best against fp64, and returns them and how many rows were scored."""
    result, rows = empty(q, k), KnownRows(*row_terms(x, metric))
    touched = certified.exact_topk(q, x, k, metric, result, rows, Codes.of(x, metric))
    exact = reference.scores(q, x, x.shape[1], metric)
    assert_same_topk(result, exact, name=metric, tolerance=1e-6 * exact.abs().max().item())
    return result[1], touched


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_without_structure(metric, triton_device):
    x = randn(611) * torch.linspace(0.2, 3, 611)[:, None]
    x[100:105] = x[4]
    x[::50] = 0
    x, q = x.to(triton_device), torch.cat([randn(2, 1), 1.01 * x[4:5]]).to(triton_device)
    touched = search(q, x, 5, metric)[1]
    assert (touched < len(x)).all() and (touched >= 5).all()


@pytest.mark.parametrize("metric", METRICS)
def test_what_a_row_lacks_is_in_its_bound(metric, triton_device):
    """The best row's code is worth nothing to the query; over 64 others score a little less."""
    q = torch.full((1, WIDTH), 127.0, device=triton_device)
    q[:, 0] = 0
    x = torch.zeros(600, WIDTH, device=triton_device)
    x[:, 0] = 127
    x[:200, 1:18] = 1
    x[411, 1:] = 0.45
    ids, touched = search(q, x, 1, metric)
    assert ids.item() == 411 and touched < len(x)


@pytest.mark.parametrize("metric", METRICS)
def test_what_a_query_lacks_is_in_the_bound(metric, triton_device):
    q = torch.full((1, WIDTH), 0.45, device=triton_device)
    q[:, 0] = 127
    x = torch.zeros(600, WIDTH, device=triton_device)
    x[:, 0] = -9
    x[:200, :3] = torch.tensor(DECOYS[metric], device=triton_device)
    x[411] = 5
    x[411, 0] = 0
    ids, touched = search(q, x, 1, metric)
    assert ids.item() == 411 and touched < len(x)


@pytest.mark.parametrize("metric", METRICS)
def test_bounds_that_are_the_scores(metric, triton_device, monkeypatch):
    """Integers have no errors: rounding alone decides whether a bound reaches its own score, and
    all are as much too low as a scan's error allows."""
    x, q = ((40 * randn(n, n)).round().clamp(-126, 126) for n in (600, 2))
    x[:, 0] = q[:, 0] = 127
    x, q = x.to(triton_device), q.to(triton_device)
    assert torch.equal(Int8.of(x).codes[:, :WIDTH].float(), x)
    codes = Codes.of(x, metric)
    bounds = codes.bounding(q, metric)
    low = 0.99 * bounds.error / bounds.unit
    exactly = codes._replace(outers=torch.cat([0 * codes.outers[:2], codes.outers[2:]]))

    class Low(certified.Scan):
        def __call__(self, hits, count, theta, *phase, **more):
            super().__call__(hits, count, theta + low, *phase, **more)

    monkeypatch.setattr(certified, "Scan", Low)
    rows, result = KnownRows(*row_terms(x, metric)), empty(q, 3)
    certified.exact_topk(q, x, 3, metric, result, rows, exactly)
    exact = reference.scores(q, x, WIDTH, metric)
    assert_same_topk(result, exact, name=metric, tolerance=1e-6 * exact.abs().max().item())


def test_codes_and_what_they_lack(triton_device):
    x = torch.stack([randn(1)[0] * 10.0**e for e in (-35, -25, -3, 0, 4, 15)]).to(triton_device)
    x = torch.cat([x, 0 * x[:1]])
    coded = Int8.of(x)
    (codes, scale), left = coded, coded.lacking(x)
    assert codes.shape == (7, 48) and not codes[:, WIDTH:].any()
    lacking = x.double() - scale[:, None].double() * codes[:, :WIDTH].double()
    norms = lacking.norm(dim=1)
    assert (norms <= left).all()
    usual = slice(1, 6)
    assert (left[usual] < 1e-4 * x[usual].norm(dim=1) + 1.001 * norms[usual] + 1e-17).all()
    assert (codes[usual].abs().amax(dim=1) == 127).all() and not codes[6].any()


@pytest.mark.parametrize("metric", METRICS)
def test_range(metric, triton_device):
    x = randn(600).to(triton_device)
    q = x[[17, 200]].clone()
    exact = reference.scores(q, x, WIDTH, metric)
    rows, codes = KnownRows(*row_terms(x, metric)), Codes.of(x, metric)
    threshold = exact[0].sort().values[-21:-19].mean().item()  # between two scores
    lims, scores, ids = certified.range_search(q, x, threshold, metric, rows, codes)
    for b in range(2):
        mine = slice(int(lims[b]), int(lims[b + 1]))
        expected = (exact[b].float() >= threshold).nonzero()[:, 0]
        assert torch.equal(ids[mine].sort().values, expected)
        torch.testing.assert_close(scores[mine], exact[b][ids[mine]].float(), rtol=1e-6, atol=1e-6)
