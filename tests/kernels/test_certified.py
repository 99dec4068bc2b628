"""Certified exact and range search on the device: what bounds decide, and what is scanned."""

import pytest
import torch
from mrl_fast.kernels.search import certified, metrics, plan
from mrl_fast.kernels.search.coarse import Prefix
from mrl_fast.kernels.search.keys import empty
from mrl_fast.kernels.search.metrics import row_terms
from mrl_fast.kernels.search.plan import KnownRows

from mrl_fast.search import reference
from mrl_fast.testing import assert_same_topk
from tests.helpers.kernels import METRICS

PREFIX, WIDTH = 8, 40


def make_rows(rows, device, *, structure):
    """Vectors in clusters whose energy lies in the prefix, or without structure."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, WIDTH, generator=generator)
    if structure:
        centres = 5 * torch.randn(9, PREFIX, generator=generator)
        x *= 0.1
        x[:, :PREFIX] += centres[torch.arange(rows) * 9 // rows]
    return x.to(device)


def known(x, metric, prefix=PREFIX):
    terms, norm = row_terms(x, metric)
    tails = torch.linalg.vector_norm(x[:, prefix:], dim=1) * (1 + 1e-6)
    if metric == "cosine":
        tails = tails * terms.scale
    short, short_norm = row_terms(x[:, :prefix], metric)
    bounds = KnownRows(terms._replace(outer=tails), norm)
    return KnownRows(terms, norm), Prefix(x[:, :prefix], KnownRows(short, short_norm), bounds)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(plan, "BUFFER", (16, 32))
    monkeypatch.setattr(plan, "LEAST_RANK", 4)
    monkeypatch.setattr(certified, "SURVIVORS", 40)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("structure", [True, False])
def test_exact(metric, structure, triton_device):
    x = make_rows(800, triton_device, structure=structure)
    q = x[[5, 799]] * 1.01
    rows, prefix = known(x, metric)
    result = empty(q, 4)
    touched = certified.exact_topk(q, x, 4, metric, result, rows, prefix)
    exact = reference.scores(q, x, WIDTH, metric)
    assert_same_topk(result, exact, name=metric, tolerance=1e-6 * exact.abs().max().item())
    if structure:
        assert (touched < len(x)).all() and (touched >= 4).all()
    else:
        assert (touched == len(x)).any(), "nothing was scanned at full width, or this tests nothing"


@pytest.mark.parametrize("metric", METRICS)
def test_a_bound_that_is_too_low_shows(metric, triton_device):
    x = make_rows(800, triton_device, structure=True)
    q = x[[5, 799]] + 0.05
    rows, prefix = known(x, metric)
    outer = prefix.bounds.terms.outer
    wrong = prefix._replace(
        bounds=prefix.bounds._replace(terms=prefix.bounds.terms._replace(outer=-3 * outer))
    )
    result = empty(q, 9)
    certified.exact_topk(q, x, 9, metric, result, rows, wrong)
    best = reference.scores(q, x, WIDTH, metric).topk(9)
    assert (result[1] != best.indices).any(dim=1).all()
    found = reference.scores(q, x, WIDTH, metric).gather(1, result[1])
    torch.testing.assert_close(result[0], found.float(), rtol=1e-5, atol=1e-5)  # of lesser rows


def test_rows_that_are_not_allowed(triton_device):
    x = make_rows(800, triton_device, structure=True)
    q = x[:2].clone()
    allowed = torch.ones(len(x), dtype=torch.uint8, device=x.device)
    allowed[::2] = 0
    rows, prefix = known(x, "ip")
    out = torch.where(allowed == 1, 0.0, -torch.inf)

    def only(some):
        return some._replace(terms=some.terms._replace(term=out), allowed=allowed)

    prefix = prefix._replace(shortlist=only(prefix.shortlist), bounds=only(prefix.bounds))
    result = empty(q, 5)
    certified.exact_topk(q, x, 5, "ip", result, only(rows), prefix)
    exact = reference.scores(q, x, WIDTH, "ip").masked_fill(allowed == 0, -torch.inf)
    assert_same_topk(result, exact, name="ip", tolerance=1e-4)


@pytest.mark.parametrize(("metric", "k"), [("ip", 1), ("cosine", 3), ("l2", 3)])
def test_bounds_that_are_the_scores(metric, k, triton_device, monkeypatch):
    """Rows without a tail: rounding alone decides whether a bound reaches its own score, and all
    are as much too low as a scan's error allows."""
    x = make_rows(700, triton_device, structure=True)
    x[:, PREFIX:] = 0
    q = x[::240] + 0.3 * make_rows(3, triton_device, structure=False)
    q[:, PREFIX:] = 0
    rows, prefix = known(x, metric)
    margin = metrics.Margin.from_rows(x[:, :PREFIX], metric)
    low = 0.99 * margin.error(torch.linalg.vector_norm(q, dim=1), prefix.bounds.norm)

    class Low(certified.Scan):
        def __call__(self, hits, count, theta, *phase, **more):
            super().__call__(hits, count, theta + low, *phase, **more)

    monkeypatch.setattr(certified, "Scan", Low)
    result = empty(q, k)
    touched = certified.exact_topk(q, x, k, metric, result, rows, prefix)
    exact = reference.scores(q, x, WIDTH, metric)
    assert_same_topk(result, exact, name=metric, tolerance=1e-6 * exact.abs().max().item())
    assert (touched < len(x)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_range(metric, triton_device):
    x = make_rows(700, triton_device, structure=True)
    x[300:309] = x[17]
    q = x[[17, 200]].clone()
    exact = reference.scores(q, x, WIDTH, metric)
    rows, _ = known(x, metric)
    for threshold in (
        exact[0].sort().values[-31:-29].mean().item(),  # between two scores
        exact.min().item() - 1,
        exact.max().item() + 1,
    ):
        lims, scores, ids = certified.range_search(
            q, x, threshold, metric, rows, Prefix(x, rows, rows)
        )
        for b in range(2):
            mine = slice(int(lims[b]), int(lims[b + 1]))
            expected = (exact[b].float() >= threshold).nonzero()[:, 0]
            assert torch.equal(ids[mine].sort().values, expected)
            torch.testing.assert_close(
                scores[mine], exact[b][ids[mine]].float(), rtol=1e-6, atol=1e-6
            )
            assert (scores[mine].diff() <= 0).all()
