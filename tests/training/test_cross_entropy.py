"""matryoshka_cross_entropy: table, properties, error budget, edges, bad input."""

import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from mrl_fast import _C, matryoshka_cross_entropy
from mrl_fast.shared import native
from mrl_fast.testing import assert_within_budget, rounding_bounds
from mrl_fast.training import cpp
from tests.helpers.losses import generator

DIMS = (8, 12, 48)  # a slab narrower than a vector register, and a wide one


def make_problem(rows=37, classes=101, dims=DIMS, *, tied=True, confidence=0.0, seed=0):
    """x, weight(s), target, bias(es) in fp64; ``confidence`` pulls x towards its class."""
    g = generator(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    weight = randn(classes, dims[-1])
    target = torch.randint(0, classes, (rows,), generator=g)
    x = 0.3 * randn(rows, dims[-1]) + confidence * weight[target]
    if tied:
        return x, weight, target, randn(classes)
    weights = [weight[:, :d] + 0.1 * randn(classes, d) for d in dims]
    return x, weights, target, [randn(classes) for _ in dims]


def leaves(value, dtype):
    if isinstance(value, list):
        return [leaves(v, dtype) for v in value]
    return value.detach().to(dtype, copy=True).requires_grad_()


def run(problem, dtype, impl, *, dims=DIMS, **options):
    """Loss, per_dim and every gradient, as a name → tensor map."""
    x, weight, target, bias = problem
    x, weight, bias = leaves(x, dtype), leaves(weight, dtype), leaves(bias, dtype)
    out = matryoshka_cross_entropy(x, weight, target, dims, bias=bias, impl=impl, **options)
    out.loss.sum().backward()
    result = {"loss": out.loss.detach(), "per_dim": out.per_dim, "dx": x.grad}
    for name, value in (("dw", weight), ("db", bias)):
        for i, tensor in enumerate(value if isinstance(value, list) else [value]):
            result[f"{name}{i}"] = tensor.grad
    return result


def check_budget(*problems, dtype, impl="cpp", dims=DIMS, **options):
    """Every result within the budget; several problems are judged as one, for PyTorch's own error
    on a handful of numbers says little."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    rounded = [
        [
            [t.to(dtype) for t in part]
            if isinstance(part, list)
            else (part.to(dtype) if part.is_floating_point() else part)
            for part in problem
        ]
        for problem in problems
    ]

    def exact_run():
        return joined([run(r, torch.float64, "reference", dims=dims, **wide) for r in rounded])

    bounds = cache(lambda: rounding_bounds(lambda: list(exact_run().values())))
    actual = joined([run(r, dtype, impl, dims=dims, **options) for r in rounded])
    native_ = joined([run(r, dtype, "reference", dims=dims, **options) for r in rounded])
    exact = exact_run()
    for i, (name, value) in enumerate(actual.items()):
        bound = partial(lambda i: bounds()[i], i)
        assert_within_budget(value, exact[name], native_[name], name=name, bound=bound)
    return run(rounded[0], torch.float64, "reference", dims=dims, **wide)


def joined(runs):
    return {name: torch.cat([r[name].reshape(-1) for r in runs]) for name in runs[0]}


IMPLS = ["cpp", "triton"]  # without a GPU, Triton runs in its interpreter


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_table(impl):
    # logits (ln 3, 0) at d = 1 and (ln 9, 0) at d = 2: probabilities 3/4 and 9/10
    x = torch.ones(2, 2)
    weight = torch.tensor([[math.log(3), math.log(3)], [0.0, 0.0]])
    out = matryoshka_cross_entropy(
        x, weight, torch.tensor([0, 1]), (1, 2), impl=impl, reduction="none"
    )
    expected = torch.tensor([[4 / 3, 4.0], [10 / 9, 10.0]]).log()
    torch.testing.assert_close(out.per_dim, expected)
    torch.testing.assert_close(out.loss, expected.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("confidence", [0.0, 1.0], ids=["unsure", "confident"])
@pytest.mark.parametrize("impl", IMPLS)
def test_error_budget(impl, dtype, tied, confidence):
    classes = 301 if impl == "cpp" else 70
    problem = make_problem(classes=classes, tied=tied, confidence=confidence)
    exact = check_budget(problem, dtype=dtype, impl=impl)
    if confidence:  # p >= .999 at the widest dim, or this tests nothing
        assert exact["per_dim"][-1] < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        dict(reduction="sum"),
        dict(reduction="none"),
        dict(label_smoothing=0.1),
        dict(class_weight=torch.linspace(0.1, 2, 101)),
        dict(class_weight=torch.linspace(0.1, 2, 101), label_smoothing=0.2, reduction="none"),
        dict(class_weight=torch.linspace(0, 1, 101), label_smoothing=1.0),
        dict(dim_weights=(0.5, 2.0, 0.0)),
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize(
    ("impl", "tied"), [("cpp", True), ("cpp", False), ("triton", True)], ids=lambda v: str(v)
)
def test_options(options, impl, tied):
    x, weight, target, bias = make_problem(tied=tied, confidence=0.05)
    target[::5] = -100
    check_budget((x, weight, target, bias), dtype=torch.float32, impl=impl, **options)


@pytest.mark.parametrize("rows", [1, 2, 65])
@pytest.mark.parametrize("classes", [1, 2, 63, 130])
@pytest.mark.parametrize("dims", [(1,), (1, 2, 3), (5, 64, 65)], ids=str)
def test_ragged_shapes(rows, classes, dims):
    problems = [make_problem(rows, classes, dims, seed=seed) for seed in range(16)]
    check_budget(*problems, dtype=torch.float32, dims=dims, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("rows", "classes", "dims"),
    [(1, 1, (1,)), (17, 31, (1, 2, 3)), (16, 16, (16, 32)), (33, 5, (5, 24, 33))],
    ids=str,
)
def test_ragged_tiles(rows, classes, dims):
    problems = [make_problem(rows, classes, dims, seed=seed) for seed in range(4)]
    check_budget(*problems, dtype=torch.float32, impl="triton", dims=dims, label_smoothing=0.1)


@pytest.mark.parametrize("isa", _C.available())
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setattr(native, "ISA", isa)
    check_budget(make_problem(confidence=0.1), dtype=torch.float32, label_smoothing=0.1)


def test_chunks_of_classes_change_nothing_but_rounding(monkeypatch):
    problem = make_problem(rows=40, classes=500, confidence=0.1)
    whole = run(problem, torch.float32, "cpp", label_smoothing=0.1)
    monkeypatch.setattr(cpp, "WORKSPACE_BYTES", 1)
    assert len(list(cpp.gradient_chunks(40, 500, 48, 3))) == 8
    check_budget(problem, dtype=torch.float32, label_smoothing=0.1)
    for name, value in run(problem, torch.float32, "cpp", label_smoothing=0.1).items():
        torch.testing.assert_close(value, whole[name])


def test_single_dim_is_cross_entropy():
    x, weight, target, bias = (t.float() if t.is_floating_point() else t for t in make_problem())
    ours = matryoshka_cross_entropy(x, weight, target, (48,), bias=bias).loss
    torch.testing.assert_close(ours, F.cross_entropy(F.linear(x, weight, bias), target))


def test_linear_in_dim_weights_and_per_dim_is_unweighted():
    problem = make_problem()
    plain = run(problem, torch.float32, "cpp")
    weighted = run(problem, torch.float32, "cpp", dim_weights=torch.tensor([1.0, -2.0, 3.0]))
    torch.testing.assert_close(weighted["per_dim"], plain["per_dim"])
    torch.testing.assert_close(
        weighted["loss"], (plain["per_dim"] * torch.tensor([1.0, -2.0, 3.0])).sum()
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_can_be_permuted_and_columns_past_the_last_dim_do_not_count(impl):
    x, weight, target, bias = (t.float() if t.is_floating_point() else t for t in make_problem())
    order = torch.randperm(len(x), generator=generator(1))
    rows = matryoshka_cross_entropy(
        x, weight, target, DIMS, bias=bias, reduction="none", impl=impl
    ).loss
    permuted = matryoshka_cross_entropy(
        x[order], weight, target[order], DIMS, bias=bias, reduction="none", impl=impl
    ).loss
    torch.testing.assert_close(permuted, rows[order])
    padded_x = F.pad(x, (0, 5), value=torch.nan).requires_grad_()
    padded_w = F.pad(weight, (0, 7), value=torch.inf).requires_grad_()
    out = matryoshka_cross_entropy(
        padded_x, padded_w, target, DIMS, bias=bias, reduction="none", impl=impl
    )
    torch.testing.assert_close(out.loss, rows)
    out.loss.sum().backward()
    assert not padded_x.grad[:, 48:].any() and not padded_w.grad[:, 48:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_slices(impl):
    x, weight, target, bias = (t.float() if t.is_floating_point() else t for t in make_problem())
    wide_x, wide_w = torch.randn(len(x), 100), torch.randn(len(weight), 90)
    wide_x[:, 3:51], wide_w[:, 7:55] = x, weight
    ours = matryoshka_cross_entropy(
        wide_x[:, 3:51], wide_w[:, 7:55], target, DIMS, bias=bias, impl=impl
    )
    torch.testing.assert_close(
        ours.loss, matryoshka_cross_entropy(x, weight, target, DIMS, bias=bias, impl=impl).loss
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch_and_all_ignored(impl):
    x, weight, target, bias = make_problem(rows=0)
    out = run((x, weight, target, bias), torch.float32, impl, reduction="sum")
    assert out["loss"] == 0 and not out["dw0"].any() and out["dx"].shape == (0, 48)
    x, weight, target, bias = make_problem()
    ignored = (x, weight, torch.full_like(target, -100), bias)
    assert run(ignored, torch.float32, impl)["loss"].isnan()  # as PyTorch: a mean over nothing
    total = run(ignored, torch.float32, impl, reduction="sum")
    assert total["loss"] == 0 and not total["dx"].any() and not total["dw0"].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # by numpy in the interpreter
def test_nan_logits_are_not_hidden(impl):
    x, weight, target, bias = (t.float() if t.is_floating_point() else t for t in make_problem())
    x[3, 10] = torch.nan
    out = matryoshka_cross_entropy(x, weight, target, DIMS, bias=bias, reduction="none", impl=impl)
    assert out.per_dim[1:, 3].isnan().all() and not out.per_dim[0].isnan().any()
    assert out.per_dim.isnan().sum() == 2


def test_reference_gradients():
    x, weight, target, bias = make_problem(rows=4, classes=5, dims=(2, 3))

    def loss(x, weight, bias):
        return matryoshka_cross_entropy(
            x, weight, target, (2, 3), bias=bias, label_smoothing=0.1, impl="reference"
        ).loss

    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_float64_runs_by_the_reference_and_no_other():
    x, weight, target, bias = make_problem()
    assert matryoshka_cross_entropy(x, weight, target, DIMS, bias=bias).loss.dtype == torch.float64
    with pytest.raises(ValueError, match="impl: 'cpp' has no float64 form"):
        matryoshka_cross_entropy(x, weight, target, DIMS, impl="cpp")


def test_autocast_computes_in_its_dtype():
    x, weight, target, bias = (t.float() if t.is_floating_point() else t for t in make_problem())
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = matryoshka_cross_entropy(x, weight, target, DIMS, bias=bias)
    half = (x.bfloat16(), weight.bfloat16(), target)
    expected = matryoshka_cross_entropy(*half, DIMS, bias=bias.bfloat16())
    assert torch.equal(out.loss, expected.loss)
    out.loss.backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32 and x.grad.any()


def test_second_derivatives_are_refused():
    x, weight, target, _ = (t.float() if t.is_floating_point() else t for t in make_problem())
    x.requires_grad_()
    loss = matryoshka_cross_entropy(x, weight, target, DIMS).loss
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


X, W, Y = torch.randn(4, 8), torch.randn(5, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(x=[1]), TypeError, r"x: expected a torch.Tensor, got list"),
        (dict(x=X[0]), ValueError, r"x: expected shape \[rows, width\], got \[8\]"),
        (dict(x=X.int()), TypeError, r"x: expected a floating-point tensor"),
        (dict(dims=(4, 4)), ValueError, r"dims: expected strictly ascending widths, got \[4, 4\]"),
        (dict(dims=(8, 4)), ValueError, r"dims: expected strictly ascending"),
        (dict(dims=(4, 9)), ValueError, r"x: expected width >= 9, got 8"),
        (dict(dims=()), ValueError, r"dims: expected at least one"),
        (dict(dims=(0, 4)), ValueError, r"dims\[0\]: expected an integer >= 1, got 0"),
        (dict(dims=(4.5,)), TypeError, r"dims\[0\]: expected an integer, got float"),
        (dict(dims=8), TypeError, r"dims: expected a sequence"),
        (dict(weight=W[:, :6]), ValueError, r"weight: expected shape \[V, >= 8\], got \[5, 6\]"),
        (dict(weight=[W]), ValueError, r"weight: expected 2 tensors, one a dim, got 1"),
        (dict(weight=[W[:, :4], W[:2]]), ValueError, r"weight\[1\]: expected shape \[5, 8\]"),
        (dict(weight=[W[:, :5], W]), ValueError, r"weight\[0\]: expected shape \[V, 4\]"),
        (
            dict(weight=W.half()),
            TypeError,
            r"weight: expected torch.float32 as x, got torch.float16; give x.to\(torch.float16\)",
        ),
        (
            dict(weight=W.to("meta")),
            ValueError,
            r"weight: expected a tensor on cpu, got one on meta",
        ),
        (dict(bias=torch.ones(4)), ValueError, r"bias: expected shape \[5\], got \[4\]"),
        (dict(bias=[torch.ones(5)] * 2), TypeError, r"bias: expected a tensor, as weight is one"),
        (dict(target=Y.int()), TypeError, r"target: expected torch.int64, got torch.int32"),
        (dict(target=Y[:3]), ValueError, r"target: expected shape \[4\], got \[3\]"),
        (dict(target=Y + 5), ValueError, r"target: expected classes in \[0, 5\) or -100, got 5"),
        (dict(target=Y - 1), ValueError, r"target: expected classes in .* got -1"),
        (dict(class_weight=torch.ones(4)), ValueError, r"class_weight: expected shape \[5\]"),
        (dict(dim_weights=(1.0,)), ValueError, r"dim_weights: expected shape \[2\], got \[1\]"),
        (dict(label_smoothing=1.5), ValueError, r"label_smoothing: expected .* \[0, 1\], got 1.5"),
        (dict(reduction="avg"), ValueError, r"reduction: expected one of 'mean', .* got 'avg'"),
        (dict(impl="cuda"), ValueError, r"impl: expected None or one of .* got 'cuda'"),
    ],
)
def test_bad_input(kwargs, error, message):
    arguments = dict(x=X, weight=W, target=Y, dims=(4, 8)) | kwargs
    with pytest.raises(error, match=message):
        matryoshka_cross_entropy(**arguments)
