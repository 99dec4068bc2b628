"""matryoshka_sigmoid_loss and matryoshka_distill: tables, peers' results, edges, bad input."""

import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from mrl_fast import matryoshka_distill, matryoshka_sigmoid_loss
from mrl_fast.testing import assert_within_budget, rounding_bounds
from mrl_fast.training.losses import distill
from tests.helpers.losses import generator

DIMS = (8, 12, 48)
IMPLS = ["cpp", "triton"]


def vectors(*shapes, seed=0):
    g = generator(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=g) for shape in shapes]


def grads_of(loss, per_dim, leaves):
    values = torch.cat([loss.detach().reshape(1), per_dim.detach()])
    return [values, *torch.autograd.grad(loss, leaves)]


def judge(run, actual, exact, native):
    """Four problems as one: PyTorch's own error on a few numbers says little."""

    def joined(variant):
        runs = [run(*variant, seed) for seed in range(4)]
        return [torch.cat([r.reshape(-1) for r in rs]) for rs in zip(*runs, strict=True)]

    bounds = cache(lambda: rounding_bounds(lambda: joined(exact)))
    for i, (a, e, n) in enumerate(zip(*map(joined, (actual, exact, native)), strict=True)):
        if a.dtype == torch.float64:
            torch.testing.assert_close(a, e)
        else:
            bound = partial(lambda i: bounds()[i], i)
            assert_within_budget(a, e, n, name=f"result {i}", bound=bound)


# --- sigmoid ---


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_sigmoid_table(impl):
    # one pair alike, one apart: cosines 1, 0 / 0, 1 at d = 2; scale 2, bias −1
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    out = matryoshka_sigmoid_loss(x, x, (2,), scale=2.0, bias=-1.0, impl=impl)
    expected = math.log1p(math.exp(-1)) + math.log1p(math.exp(-1))  # z = 1 and z = −1
    torch.testing.assert_close(out.loss, torch.tensor(expected))


def siglip(q, d, scale, bias, dims=DIMS):
    sign = 2 * torch.eye(len(q), len(d), dtype=q.dtype) - 1
    rows = [
        -F.logsigmoid(sign * (scale * F.normalize(q[:, :w]) @ F.normalize(d[:, :w]).T + bias)).sum()
        for w in dims
    ]
    return torch.stack(rows) / len(q)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "bias", "extra"), [(10.0, -10.0, 0), (60.0, -20.0, 3)])
def test_sigmoid_error_budget(impl, dtype, scale, bias, extra):
    rows = 19 if impl == "triton" else 70
    dtype = torch.float64 if impl == "reference" else dtype

    def run(dtype, impl, seed):
        q, d, noise = vectors((rows, 48), (rows + extra, 48), (rows, 48), seed=seed)
        d[:rows] = q + 0.1 * noise  # σ(z) near 1 at the targets, near 0 elsewhere
        a, b = (t.to(torch.bfloat16).to(dtype).requires_grad_() for t in (q, d))
        alpha, beta = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (scale, bias))
        if impl is None:
            per_dim = siglip(a, b, alpha, beta)
            loss = per_dim.sum()
        else:
            loss, per_dim = matryoshka_sigmoid_loss(a, b, DIMS, scale=alpha, bias=beta, impl=impl)
        return grads_of(loss, per_dim, [a, b, alpha, beta])

    judge(run, (dtype, impl), (torch.float64, None), (dtype, None))


# --- distillation ---


def kl(student, teacher, temperature, dims=DIMS):
    queries, documents = student
    p = (teacher / temperature).softmax(1)
    rows = []
    for w in dims:
        s = F.normalize(queries[:, :w]) @ F.normalize(documents[:, :w]).T
        rows.append(F.kl_div((s / temperature).log_softmax(1), p, reduction="batchmean"))
    return torch.stack(rows) * temperature**2


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("kind", ["self", "wider", "pair", "scores"])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_distill_error_budget(impl, kind, temperature, monkeypatch):
    rows = 70 if impl == "triton" else 130
    monkeypatch.setattr(distill, "CHUNK_BYTES", 1)  # 64 rows
    dtype = torch.float64 if impl == "reference" else torch.float32

    def run(dtype, fused, seed):
        q, d, t, u = vectors((rows, 48), (23, 48), (rows, 100), (23, 100), seed=seed)
        a, b, c, e = (v.to(dtype) for v in (q, d, t, u))
        a, b = a.requires_grad_(), b.requires_grad_()
        both = kind in ("pair", "scores")
        student = (a, b) if both else a
        if kind == "self":
            teacher, scores = a, F.normalize(a) @ F.normalize(a).T
        elif kind == "wider":
            teacher, scores = c, F.normalize(c) @ F.normalize(c).T
        else:
            teacher, scores = (c, e), F.normalize(c) @ F.normalize(e).T
        if kind == "scores":
            teacher = scores
        if fused:
            loss, per_dim = matryoshka_distill(
                student, teacher, DIMS, temperature=temperature, impl=impl
            )
        else:
            per_dim = kl((a, b if both else a), scores.detach(), temperature)
            loss = per_dim.sum()
        return grads_of(loss, per_dim, [a, b] if both else [a])

    judge(run, (dtype, True), (torch.float64, False), (dtype, False))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(impl):
    (x,) = vectors((19, 48))
    x = x.float().requires_grad_()
    out = matryoshka_distill(x, x, (48,), temperature=0.1, impl=impl)
    out.loss.backward()
    assert abs(out.loss) < 1e-6 and x.grad.abs().max() < 1e-6


def test_reference_gradients():
    q, d, t = (v.requires_grad_() for v in vectors((4, 5), (4, 5), (4, 7)))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0))

    def sigmoid(q, d, scale, bias):
        return matryoshka_sigmoid_loss(q, d, (2, 5), scale=scale, bias=bias).loss

    assert torch.autograd.gradcheck(sigmoid, (q, d, scale, bias))
    assert torch.autograd.gradcheck(lambda q: matryoshka_distill(q, t, (2, 5)).loss, q)


def test_ambiguous_teacher_is_asked_about():
    (x,) = vectors((48, 48))
    with pytest.raises(
        ValueError, match=r"teacher: a tensor of shape \[48, 48\] may be vectors or"
    ):
        matryoshka_distill(x, x.clone(), DIMS)
    as_vectors = matryoshka_distill(x, x, DIMS, teacher_kind="vectors")
    as_scores = matryoshka_distill(x, x, DIMS, teacher_kind="scores")
    assert as_vectors.loss != as_scores.loss


X, Y = torch.randn(4, 8), torch.randn(6, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: matryoshka_sigmoid_loss(X, [X], (8,), scale=1.0, bias=0.0),
            TypeError,
            r"documents: expected a torch.Tensor, got list",
        ),
        (
            lambda: matryoshka_sigmoid_loss(X, X[:3], (8,), scale=1.0, bias=0.0),
            ValueError,
            r"documents: expected at least 4 rows, got 3",
        ),
        (
            lambda: matryoshka_sigmoid_loss(X, X, (8,), scale=-1.0, bias=0.0),
            ValueError,
            r"scale: expected a positive number, got -1.0",
        ),
        (
            lambda: matryoshka_sigmoid_loss(X, X, (8,), scale=1.0, bias=math.nan),
            ValueError,
            r"bias: expected a finite number, got nan",
        ),
        (
            lambda: matryoshka_distill(X, Y, (8,)),
            ValueError,
            r"teacher: expected 4 rows, got 6",
        ),
        (
            lambda: matryoshka_distill((X, Y), torch.randn(4, 5), (8,)),
            ValueError,
            r"teacher: expected scores of shape \[4, 6\], got \[4, 5\]",
        ),
        (
            lambda: matryoshka_distill((X, Y), (X, X), (8,)),
            ValueError,
            r"teacher\[1\]: expected shape \[6, 8\], got \[4, 8\]",
        ),
        (
            lambda: matryoshka_distill((X, Y), Y, (8,), teacher_kind="vectors"),
            ValueError,
            r"teacher: expected a pair of vectors",
        ),
        (
            lambda: matryoshka_distill((X, X, X), Y, (8,)),
            TypeError,
            r"student: expected a tensor or a pair of tensors, got 3 of them",
        ),
        (
            lambda: matryoshka_distill(X.long(), Y, (8,)),
            TypeError,
            r"student: expected a floating-point tensor, got torch.int64",
        ),
        (
            lambda: matryoshka_distill((X, X[:, :6]), X, (6,)),
            ValueError,
            r"student\[1\]: expected width 8 as student\[0\], got 6",
        ),
        (
            lambda: matryoshka_distill(X, None, (8,)),
            TypeError,
            r"teacher: expected a tensor or a pair of tensors, got NoneType",
        ),
        (
            lambda: matryoshka_distill((X, Y), (X, Y), (8,), teacher_kind="bogus"),
            ValueError,
            r"teacher_kind: expected one of 'vectors', 'scores', got 'bogus'",
        ),
        (
            lambda: matryoshka_distill(X, Y[:4, :3], (8,), temperature=0.0),
            ValueError,
            r"temperature: expected a positive number, got 0.0",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
