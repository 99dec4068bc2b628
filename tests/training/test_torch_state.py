"""torch's defaults, which a program or another of its threads may change, change no loss."""

import pytest
import torch

from mrl_fast import matryoshka_predict
from tests.helpers import torch_states
from tests.helpers.losses import DIMS, LOSSES, tensors

STATES = torch_states.STATES | {
    "filled": torch_states.filled,
    "thread": torch_states.flipping,
}


def results(name, impl, gradients=True):
    x, w = tensors((19, 48), (30, 48))

    def run():
        loss = LOSSES[name](x, w, impl)
        return [loss.detach(), *(torch.autograd.grad(loss, [x, w]) if gradients else ())]

    return run


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradients_are_the_same_bits(name, impl, state):
    run = results(name, impl, gradients=state != "inference")
    expected = run()
    with STATES[state]():
        several = [run() for _ in range(20 if state == "thread" else 1)]
    for actual in several:
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e)


@pytest.mark.parametrize("state", ["float64", "bfloat16", "meta"])
@pytest.mark.parametrize("name", ["all", "sigmoid", "distill", "logits"])
def test_the_same_by_kernels(name, state):
    run = results(name, "triton")
    expected = run()
    with STATES[state]():
        actual = run()
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("impl", ["cpp", "triton", "reference"])
def test_predictions_are_the_same_bits(impl, state):
    x, w = (t.detach() for t in tensors((19, 48), (30, 48)))
    expected = matryoshka_predict(x, w, DIMS, impl=impl)
    with STATES[state]():
        actual = matryoshka_predict(x, w, DIMS, impl=impl)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_of_half_inputs_under_another_default(name):
    x, w = (t.detach().bfloat16().requires_grad_() for t in tensors((19, 48), (30, 48)))

    def run():
        return torch.autograd.grad(LOSSES[name](x, w), [x, w])

    expected = run()
    with torch_states.default_dtype(torch.float64), torch.device("meta"):
        actual = run()
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, e)
