"""Fused losses under torch.func: backwards as by autograd, forwards refused."""

import pytest
import torch
from torch.autograd import forward_ad

from mrl_fast.training import ops
from tests.helpers.losses import DIMS, LOSSES, tensors

CALLS = LOSSES | {"inverse_norms": lambda x, w: ops.inverse_norms(x, DIMS).sum()}
# PyTorch's own first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is dep:DeprecationWarning")
FORWARD = r"once, backwards; for forward-mode derivatives .* pass impl='reference'"
SECOND = r"once, backwards; for second derivatives pass impl='reference'"


def detached():
    return [t.detach() for t in tensors((19, 48), (30, 48))]


def by_autograd(name, x, w):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(CALLS[name](x, w), x)[0]


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused(name):
    x, w = detached()

    def loss(x):
        return CALLS[name](x, w)

    with pytest.raises(RuntimeError, match=FORWARD):
        torch.func.jvp(loss, (x,), (x,))
    with pytest.raises(RuntimeError, match=FORWARD):
        torch.func.jacfwd(loss)(x)
    with pytest.raises(RuntimeError, match=FORWARD):
        torch.func.hessian(loss)(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=FORWARD):
        loss(forward_ad.make_dual(x, x))
    compiled = torch.compile(lambda x: torch.func.jvp(loss, (x,), (x,)), backend="aot_eager")
    with pytest.raises(RuntimeError, match=FORWARD):
        compiled(x)


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_has_the_derivative(name):
    x, w = (t.double() for t in detached())
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)

    def loss(x):
        return LOSSES[name](x, w, "reference")

    _, tangent = torch.func.jvp(loss, (x,), (direction,))
    gradient = torch.func.grad(loss)(x)
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    assert tangent.abs() > 1e-6


@pytest.mark.parametrize("name", CALLS)
def test_backward_transforms_equal_autograd(name):
    x, w = detached()

    def loss(x):
        return CALLS[name](x, w)

    expected = by_autograd(name, x, w)
    gradient, value = torch.func.grad_and_value(loss)(x)
    assert torch.equal(value, loss(x)) and torch.equal(gradient, expected)
    _, pull = torch.func.vjp(loss, x)
    assert torch.equal(pull(torch.ones_like(value))[0], expected)
    assert torch.equal(torch.func.jacrev(loss)(x), expected)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)


@pytest.mark.parametrize("name", CALLS)
def test_vmap_runs_sample_by_sample(name):
    x, w = detached()
    several = torch.stack([x, 2 * x.flip(0), x.roll(1, 1)], dim=1)  # [19, 3, 48]

    def loss(x):
        return CALLS[name](x, w)

    values = torch.func.vmap(loss, in_dims=1)(several)
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=1)(several)
    for i, sample in enumerate(several.unbind(1)):
        torch.testing.assert_close(values[i], loss(sample))
        torch.testing.assert_close(gradients[i], by_autograd(name, sample, w))
