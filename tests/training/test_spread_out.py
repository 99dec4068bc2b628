"""matryoshka_spread_out, by itself and as an option of InfoNCE: table, sentence-transformers' own
results, budgets, gradients, edges, bad input."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from mrl_fast import (
    MatryoshkaInfoNCELoss,
    SpreadOut,
    matryoshka_info_nce,
    matryoshka_spread_out,
)
from mrl_fast.training import grams
from tests.helpers.losses import ALL_WAYS, BOTH_WAYS, DIMS, generator, judge

IMPLS = ["cpp", "triton"]


def columns(*rows, width=48, seed=0, common=0.5):
    """Columns of embeddings about a common direction: their similarities are mostly positive."""
    g = generator(seed)
    middle = common * torch.randn(width, dtype=torch.float64, generator=g)
    return [middle + torch.randn(n, width, dtype=torch.float64, generator=g) for n in rows]


DEFAULT = SpreadOut()


def plain(*xs, dims=DIMS, weights=DEFAULT, normalize=True):
    """``[G]``: the terms as they are defined, from similarity matrices."""
    per_dim = []
    for d in dims:
        terms = []
        for x in xs:
            u = F.normalize(x[:, :d]) if normalize else x[:, :d]
            s = u @ u.T
            s = s[~torch.eye(len(x), dtype=torch.bool)]
            excess = F.relu(s.square().mean() - 1 / d)
            terms.append(weights.mean * s.mean().square() + weights.second_moment * excess)
        total = torch.stack(terms).sum()
        per_dim.append(total / len(xs) if weights.aggregation == "mean" else total)
    return torch.stack(per_dim)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_table(impl):
    # similarities 1, 0, 0 of three pairs at d = 1, where a row is 0; 1, 4/5 and 4/5 at d = 2
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 2.0]])
    out = matryoshka_spread_out(x, (1, 2), weights=(3, 5), impl=impl)
    at_two = [1, 4 / 5, 4 / 5]
    expected = [
        3 * (1 / 3) ** 2,  # the second moment, 1/3, is below 1
        3 * (sum(at_two) / 3) ** 2 + 5 * (sum(s * s for s in at_two) / 3 - 1 / 2),
    ]
    torch.testing.assert_close(out.per_dim, torch.tensor(expected))
    weighted = matryoshka_spread_out(x, (1, 2), weights=(3, 5), dim_weights=(2, 0.5), impl=impl)
    torch.testing.assert_close(weighted.loss, out.per_dim @ torch.tensor([2, 0.5]))
    # dot products of the rows themselves at d = 2
    raw = matryoshka_spread_out(x, (2,), weights=(1, 0), normalize=False, impl=impl)
    torch.testing.assert_close(raw.loss, torch.tensor(((50 + 8 + 16) / 3) ** 2))


WEIGHTS = [DEFAULT, SpreadOut(0.0, 2.0, "sum"), SpreadOut(3.0, 0.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_equals_sentence_transformers(impl, weights):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    theirs = losses.GlobalOrthogonalRegularizationLoss(
        None,
        mean_weight=weights.mean,
        second_moment_weight=weights.second_moment,
        aggregation=weights.aggregation,
    )
    xs = [x.requires_grad_() for x in columns(19, 19)]
    total = sum(
        sum(theirs.compute_loss_from_embeddings([x[:, :d] for x in xs]).values()) for d in DIMS
    )
    expected = torch.autograd.grad(total, xs)
    ours = [x.detach().to(torch.float32 if impl == "cpp" else x.dtype) for x in xs]
    ours = [x.requires_grad_() for x in ours]
    loss = matryoshka_spread_out(ours, DIMS, weights=weights, impl=impl).loss
    tolerance = dict(rtol=2e-5, atol=1e-7) if impl == "cpp" else {}
    torch.testing.assert_close(loss.double(), total.detach(), **tolerance)
    for found, grad in zip(torch.autograd.grad(loss, ours), expected, strict=True):
        torch.testing.assert_close(found.double(), grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_error_budget(impl, weights, dtype):
    def fused(*xs):
        return matryoshka_spread_out(xs, DIMS, weights=weights, impl=impl)

    make = lambda seed: columns(70, 33, seed=seed)  # noqa: E731
    judge(fused, partial(plain, weights=weights), make, dtype)


@pytest.mark.parametrize("options", [{}, dict(normalize=False)])
def test_the_reference_is_the_formula(options):
    def fused(*xs):
        return matryoshka_spread_out(xs, DIMS, impl="reference", **options)

    make = lambda seed: columns(19, 30, seed=seed)  # noqa: E731
    judge(fused, partial(plain, **options), make, torch.float64)
    xs = [x.requires_grad_() for x in columns(5, 4, width=6)]
    of = lambda *xs: matryoshka_spread_out(xs, (2, 6), impl="reference", **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(of, xs) and torch.autograd.gradgradcheck(of, xs)


@pytest.mark.parametrize("impl", IMPLS)
def test_raw_products(impl):
    def fused(*xs):
        return matryoshka_spread_out(xs, DIMS, normalize=False, impl=impl)

    judge(fused, partial(plain, normalize=False), lambda seed: columns(40, 40, seed=seed))


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_of_rows(impl, monkeypatch):
    """However few rows a part has, the sums are the same to rounding."""
    (x,) = (x.float().requires_grad_() for x in columns(70))
    whole = matryoshka_spread_out(x, DIMS, impl=impl).loss
    (expected,) = torch.autograd.grad(whole, x)
    monkeypatch.setattr(grams, "PART", 200)
    parts = matryoshka_spread_out(x, DIMS, impl=impl).loss
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, x)[0], expected, rtol=1e-4, atol=1e-7)


OPTIONS = {
    "default": {},
    "clip": dict(directions=BOTH_WAYS, partition_mode="per_direction"),
    "hard": dict(directions=ALL_WAYS, hardness_mode="all_negatives", hardness_strength=3.0),
    "masked": dict(mask=torch.arange(19 * 38).reshape(19, 38) % 39 == 1),
    "raw": dict(normalize=False, scale=0.1),
}


CASES = [
    *((impl, name, "mean") for impl in ("cpp", "reference") for name in OPTIONS),
    *(("cpp", "default", reduction) for reduction in ("sum", "none")),
    ("triton", "default", "mean"),
]


@pytest.mark.parametrize(("impl", "options", "reduction"), CASES)
def test_an_option_of_info_nce(impl, options, reduction):
    """It is InfoNCE and the terms of queries and of each block of documents, for each query."""
    options = OPTIONS[options]
    dtype = torch.float64 if impl == "reference" else torch.float32
    xs = [x.to(dtype).requires_grad_() for x in columns(19, 19, 19)]
    given = options | dict(impl=impl, reduction=reduction, dim_weights=(1, 0.5, 2))
    together = matryoshka_info_nce(xs[0], xs[1:], DIMS, spread_out=(2.0, 30.0), **given)
    alone = matryoshka_info_nce(xs[0], xs[1:], DIMS, **given)
    spread = matryoshka_spread_out(
        xs, DIMS, weights=(2.0, 30.0), dim_weights=(1, 0.5, 2), impl=impl,
        normalize=options.get("normalize", True),
    )  # fmt: skip
    times = 19 if reduction == "sum" else 1
    torch.testing.assert_close(together.loss, alone.loss + times * spread.loss)
    per_dim = spread.per_dim[:, None] if reduction == "none" else times * spread.per_dim
    torch.testing.assert_close(together.per_dim, alone.per_dim + per_dim)
    expected = torch.autograd.grad(alone.loss.sum() + 19 ** (reduction != "mean") * spread.loss, xs)
    for found, grad in zip(torch.autograd.grad(together.loss.sum(), xs), expected, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-5)


def test_documents_as_one_tensor_are_one_column():
    q, d = (x.float() for x in columns(9, 20))
    found = matryoshka_info_nce(q, d, DIMS, spread_out=SpreadOut(aggregation="sum")).per_dim
    alone = matryoshka_info_nce(q, d, DIMS).per_dim
    torch.testing.assert_close(found - alone, plain(q, d, weights=SpreadOut(aggregation="sum")))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows, impl):
    x = columns(rows)[0].float().requires_grad_()
    out = matryoshka_spread_out(x, DIMS, impl=impl)
    out.loss.backward()
    assert x.grad.isfinite().all()
    if rows < 2:
        assert out.per_dim.tolist() == [0.0] * 3 and not x.grad.any()
    else:
        torch.testing.assert_close(out.per_dim, plain(x.detach()), rtol=1e-5, atol=1e-6)


def test_zero_rows_and_strides():
    wide = columns(12, width=100)[0].float()
    x = wide[:, 3:99:2]  # a last axis of stride 2
    x[3] = 0.0
    x = x.requires_grad_()
    out = matryoshka_spread_out(x, DIMS)
    torch.testing.assert_close(out.per_dim, plain(x.detach()), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(out.loss, x)
    assert grad.isfinite().all()


def test_threads_change_no_bit():
    xs = [x.float().requires_grad_() for x in columns(700, 300)]
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss = matryoshka_spread_out(xs, (8, 12, 48)).loss
        results.append([loss, *torch.autograd.grad(loss, xs)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_no_similarities_are_held():
    """A batch whose similarities would take 40 GB."""
    x = torch.randn(100_000, 8, requires_grad=True)
    matryoshka_spread_out(x, (2, 8)).loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_and_autocasts(impl):
    x = columns(30)[0].float().requires_grad_()

    def loss(x):
        return matryoshka_info_nce(x, x.flip(0), DIMS, spread_out=SpreadOut(), impl=impl).loss

    with torch.autocast("cpu", torch.bfloat16):
        found = loss(x)
    rounded = x.detach().bfloat16().requires_grad_()
    torch.testing.assert_close(found, loss(rounded), rtol=1e-6, atol=1e-6)
    if impl == "cpp":
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), loss(x))
        grads = [torch.autograd.grad(f(x), x)[0] for f in (compiled, loss)]
        torch.testing.assert_close(*grads)
    meta = torch.empty(4, 48, device="meta", requires_grad=True)
    assert grams.prefix_grams(meta, meta.new_empty(3, 4), DIMS, impl).grams.shape == (2512,)


def test_second_derivatives_are_refused():
    x = columns(9)[0].float().requires_grad_()
    (grad,) = torch.autograd.grad(matryoshka_spread_out(x, DIMS).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        grad.sum().backward()


def test_module():
    xs = [x.float() for x in columns(19, 19)]
    loss_fn = MatryoshkaInfoNCELoss(DIMS, spread_out=SpreadOut(1.0, 10.0))
    expected = matryoshka_info_nce(*xs, DIMS, spread_out=(1.0, 10.0))
    assert torch.equal(functional_call(loss_fn, {}, tuple(xs)), expected.loss)
    assert torch.equal(loss_fn.per_dim, expected.per_dim)


X = torch.randn(4, 8)
BAD = {
    "spread_out: expected a SpreadOut or its values, got 1.0": (
        TypeError, lambda: matryoshka_info_nce(X, X, (8,), spread_out=1.0),
    ),
    "spread_out: mean: expected a number >= 0, got -1": (
        ValueError, lambda: matryoshka_info_nce(X, X, (8,), spread_out=(-1,)),
    ),
    "weights: second_moment: expected a number >= 0, got nan": (
        ValueError, lambda: matryoshka_spread_out(X, (8,), weights=(0, math.nan)),
    ),
    "weights: aggregation: expected one of 'mean', 'sum', got 'max'": (
        ValueError, lambda: matryoshka_spread_out(X, (8,), weights=(1, 1, "max")),
    ),
    "weights: expected a weight above 0": (
        ValueError, lambda: matryoshka_spread_out(X, (8,), weights=(0, 0)),
    ),
    "embeddings: expected at least one column": (
        ValueError, lambda: matryoshka_spread_out([], (8,)),
    ),
    r"embeddings\[1\]: expected width 8": (
        ValueError, lambda: matryoshka_spread_out([X, X[:, :7]], (7,)),
    ),
    "dims": (ValueError, lambda: matryoshka_spread_out(X, (9,))),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    error, call = BAD[message]
    with pytest.raises(error, match=message):
        call()
