"""matryoshka_logits and the modules around the losses."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from mrl_fast import (
    MatryoshkaCrossEntropyLoss,
    MRLLinear,
    matryoshka_cross_entropy,
    matryoshka_logits,
)
from mrl_fast.testing import assert_within_budget, rounding_bounds
from mrl_fast.training import cpp
from tests.helpers.losses import generator

DIMS = (3, 16, 40)


def make_head(tied, *, rows=19, classes=70, seed=0):
    g = generator(seed)
    x = torch.randn(rows, 40, generator=g)
    widths = DIMS[-1:] if tied else DIMS
    weight = [torch.randn(classes, d, generator=g) for d in widths]
    bias = [torch.randn(classes, generator=g) for _ in widths]
    return x, (weight[0] if tied else weight), (bias[0] if tied else bias)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("impl", "workspace"),
    [("cpp", 64 << 20), ("cpp", 1), ("triton", 64 << 20)],
    ids=["cpp", "cpp-chunked", "triton"],
)
def test_error_budget(impl, tied, dtype, workspace, monkeypatch):
    monkeypatch.setattr(cpp, "WORKSPACE_BYTES", workspace)
    x, weight, bias = make_head(tied)
    grad = torch.randn(len(DIMS), 19, 70, generator=generator(1))

    def run(dtype, impl):
        def leaf(t):
            return t.to(torch.bfloat16).to(dtype).requires_grad_()  # the same values everywhere

        leaf_x = leaf(x)
        weights = leaf(weight) if tied else [leaf(w) for w in weight]
        biases = leaf(bias) if tied else [leaf(b) for b in bias]
        logits = matryoshka_logits(leaf_x, weights, DIMS, bias=biases, impl=impl)
        logits.backward(leaf(grad).detach())
        parameters = [weights, biases] if tied else [*weights, *biases]
        return [logits.detach(), leaf_x.grad, *(p.grad for p in parameters)]

    results = zip(
        run(dtype, impl), run(torch.float64, "reference"), run(dtype, "reference"), strict=True
    )
    bounds = cache(lambda: rounding_bounds(lambda: run(torch.float64, "reference")))
    for i, (actual, exact, native) in enumerate(results):
        assert actual.dtype == dtype
        bound = partial(lambda i: bounds()[i], i)
        assert_within_budget(actual, exact, native, name=f"result {i}", bound=bound)


@pytest.mark.parametrize("impl", ["cpp", "triton"])
@pytest.mark.parametrize(
    "read",
    [
        lambda z: F.cross_entropy(z.permute(1, 2, 0), torch.arange(57).view(19, 3) % 70),
        lambda z: (z.sum(2) * torch.arange(19.0)).sum(),
        lambda z: z.transpose(1, 2).contiguous().pow(2).sum(),
        lambda z: z[:, :, ::3].pow(2).sum(),
    ],
    ids=["permuted", "expanded", "transposed", "strided"],
)
def test_gradients_of_any_layout(impl, read, monkeypatch):
    monkeypatch.setattr(cpp, "PACKED_BYTES", 1)  # chunks of columns
    x, weight, bias = make_head(True)
    grads = []
    for name in (impl, "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        logits = matryoshka_logits(*leaves[:2], DIMS, bias=leaves[2], impl=name)
        grads.append(torch.autograd.grad(read(logits), leaves))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_equals_the_loop_over_linear():
    x, weight, bias = make_head(True)
    expected = torch.stack([F.linear(x[:, :d], weight[:, :d], bias) for d in DIMS])
    torch.testing.assert_close(matryoshka_logits(x, weight, DIMS, bias=bias), expected)
    assert matryoshka_logits(x[:0], weight, DIMS).shape == (3, 0, 70)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_modules_agree_with_torch(tied, bias):
    torch.manual_seed(0)
    head = MRLLinear(DIMS, 7, tied=tied, bias=bias)
    x, target = torch.randn(11, 40, requires_grad=True), torch.randint(0, 7, (11,))
    class_weight = torch.rand(7)
    loss_fn = MatryoshkaCrossEntropyLoss(
        dim_weights=(1, 2, 3), class_weight=class_weight, label_smoothing=0.1
    )
    loss = loss_fn(head, x, target)
    torch_loss = torch.nn.CrossEntropyLoss(class_weight, label_smoothing=0.1)
    per_dim = torch.stack([torch_loss(logits, target) for logits in head(x)])
    torch.testing.assert_close(loss_fn.per_dim, per_dim.detach())
    torch.testing.assert_close(loss, (per_dim * torch.tensor([1.0, 2.0, 3.0])).sum())
    assert not loss_fn.per_dim.requires_grad
    actual = torch.autograd.grad(loss, list(head.parameters()))
    expected = torch.autograd.grad((per_dim * torch.tensor([1.0, 2, 3])).sum(), head.parameters())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert sum(p.numel() for p in head.parameters()) == 7 * (
        (40 if tied else 59) + bias * len(actual) // (1 + bias)
    )


def test_loss_module_without_options_is_the_functional():
    head = MRLLinear(DIMS, 7)
    x, target = torch.randn(5, 40), torch.randint(0, 7, (5,))
    functional = matryoshka_cross_entropy(x, head.weight, target, DIMS, bias=head.bias)
    loss_fn = MatryoshkaCrossEntropyLoss()
    assert torch.equal(loss_fn(head, x, target), functional.loss)
    assert torch.equal(loss_fn.per_dim, functional.per_dim)
    assert "dims=[3, 16, 40], num_classes=7" in repr(head)


def test_a_training_step_lowers_every_prefix_loss():
    torch.manual_seed(0)
    encoder, head, loss_fn = (
        torch.nn.Linear(20, 40),
        MRLLinear(DIMS, 4),
        MatryoshkaCrossEntropyLoss(),
    )
    x, target = torch.randn(64, 20), torch.randint(0, 4, (64,))
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=0.01)
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        loss_fn(head, encoder(x), target).backward()
        optimizer.step()
        first = loss_fn.per_dim if first is None else first
    assert (loss_fn.per_dim < 0.9 * first).all()
