"""The assertions reject wrong answers."""

import pytest
import torch

from mrl_fast.testing import assert_same_topk, assert_within_budget, rounding_bounds


def test_budget_accepts_the_native_error_and_rejects_more():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    native = torch.tensor([1.0, 2.0 + 1e-6])
    assert_within_budget(native, exact, native, name="native")
    assert_within_budget(exact[:0], exact[:0], native[:0], name="empty")
    for wrong in ([1.0, 2.0 + 4e-6], [1.0, torch.nan], [torch.inf, 2.0]):
        with pytest.raises(AssertionError, match="wrong: error"):
            assert_within_budget(torch.tensor(wrong), exact, native, name="wrong")
    for useless in ([1.0, torch.nan], [torch.inf, 2.0]):
        with pytest.raises(AssertionError, match="own result has NaN or infinity at 1 of 2"):
            assert_within_budget(native, exact, torch.tensor(useless), name="native")
    with pytest.raises(AssertionError, match=r"wrong: \[1\], not \[2\]"):
        assert_within_budget(native[:1], exact, native, name="wrong")


def softmax_gradient(x, w, target, dtype):
    """What a loss's tests compare: the loss, and the gradients of both sides."""
    x, w = (t.to(dtype).requires_grad_() for t in (x, w))
    loss = torch.nn.functional.cross_entropy(x @ w.T, target, reduction="none")
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [x, w])]


@pytest.mark.parametrize("classes", [2, 63, 301])
def test_bounds_hold_in_any_order_of_sums_and_half_a_term_exceeds_them(classes):
    g = torch.Generator().manual_seed(classes)
    x, w = 0.3 * torch.randn(5, 65, generator=g), torch.randn(classes, 65, generator=g)
    target = torch.arange(5) % classes
    exact = softmax_gradient(x, w, target, torch.float64)
    bounds = rounding_bounds(lambda: softmax_gradient(x, w, target, torch.float64))
    for seed in range(20):  # PyTorch's own sums, in other orders
        order = torch.randperm(65, generator=g.manual_seed(seed))
        loss, dx, dw = softmax_gradient(x[:, order], w[:, order], target, torch.float32)
        back = order.argsort()
        for a, e, b in zip((loss, dx[:, back], dw[:, back]), exact, bounds, strict=True):
            # as if PyTorch had been exact: the bound alone decides
            assert_within_budget(a, e, e.float(), name="order", bound=lambda b=b: b)
    half = [e.float() for e in exact]
    p = (x.double() @ w.double().T).softmax(1).float()
    j = p.masked_fill(torch.nn.functional.one_hot(target, classes).bool(), 0.0).argmax(1)
    half[0] = half[0] + 0.5 * torch.log1p(-p.gather(1, j[:, None])[:, 0])  # of one class's exp
    half[1] = half[1] - 0.5 * p.gather(1, j[:, None]) * w[j]  # of one class
    half[2][j[0]] -= 0.5 * p[0, j[0]] * x[0]  # of one row
    for wrong, e, b in zip(half, exact, bounds, strict=True):
        with pytest.raises(AssertionError, match="half: error"):
            assert_within_budget(wrong, e, e.float(), name="half", bound=lambda b=b: b)


def test_a_bound_counts_by_elements_and_only_where_native_is_exceeded():
    exact = torch.tensor([1.0, 100.0], dtype=torch.float64)
    bound = torch.tensor([0.1, 5.0], dtype=torch.float64)
    native = exact.float()
    assert_within_budget(torch.tensor([1.05, 104.0]), exact, native, name="in", bound=lambda: bound)
    for wrong in ([1.2, 100.0], [1.0, 106.0], [torch.nan, 100.0]):
        with pytest.raises(AssertionError, match="out: error"):
            assert_within_budget(
                torch.tensor(wrong), exact, native, name="out", bound=lambda: bound
            )
    assert_within_budget(native, exact, native, name="in", bound=lambda: pytest.fail("called"))


def test_bounds_leave_infinite_scores_and_integers_alone():
    x = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64)
    (bound,) = rounding_bounds(lambda: [x.logsumexp(1)])
    assert 2.0**-24 < bound < 2.0**-18


@pytest.mark.parametrize(
    "run",
    [
        torch.exp, torch.log1p, torch.sqrt, torch.sigmoid, torch.tanh, torch.rsqrt,
        lambda x: x**1.5, torch.nn.functional.softplus, torch.nn.functional.gelu,
        lambda x: torch.addcmul(x, x, x), lambda x: x.softmax(0),
    ],
)  # fmt: skip
def test_bounds_know_what_rounds(run):
    x = torch.rand(500, generator=torch.Generator().manual_seed(1)) + 0.1

    def results(dtype):
        leaf = x.to(dtype).requires_grad_()
        out = run(leaf)
        return [out.detach(), *torch.autograd.grad(out.pow(3).sum(), leaf)]

    exact, bounds = results(torch.float64), rounding_bounds(lambda: results(torch.float64))
    for a, e, b in zip(results(torch.float32), exact, bounds, strict=True):
        error = (a - e).abs()
        assert (b > 0).all() and (error <= 2 * b).all() and b.max() < 20 * error.max()


def test_bounds_leave_what_does_not_round_alone():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    (bound,) = rounding_bounds(lambda: [torch.where(x > 0, x.abs(), -x).clamp(max=1.5).relu()])
    assert not bound.any()


EXACT = torch.tensor([[0.5, 1.0, 1.0, -torch.inf]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("scores", "ids", "message"),
    [
        ([1.0, 1.0, 0.5, -torch.inf], [1, 2, 0, -1], None),
        ([1.0, 1.0, 0.5, -torch.inf], [2, 1, 0, -1], "order"),
        ([1.0, 0.5, 1.0, -torch.inf], [1, 0, 2, -1], "better row was left out"),
        ([1.0, 1.0, 0.5, -torch.inf], [1, 1, 0, -1], "a row twice"),
        ([1.0, 1.0, 0.6, -torch.inf], [1, 2, 0, -1], "a score is off"),
        ([1.0, 1.0, 0.5, 0.0], [1, 2, 0, -1], "missing neighbour has a score"),
        ([1.0, 1.0, -torch.inf, -torch.inf], [1, 2, -1, -1], "2 neighbours, not 3"),
        ([1.0, 1.0, torch.nan, -torch.inf], [1, 2, 0, -1], "a score is off"),
    ],
)
def test_topk(scores, ids, message):
    result = torch.tensor([scores]), torch.tensor([ids])
    if message is None:
        assert_same_topk(result, EXACT, name="right", tolerance=1e-6)
    else:
        with pytest.raises(AssertionError, match=message):
            assert_same_topk(result, EXACT, name="wrong", tolerance=1e-6)
