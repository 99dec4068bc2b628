"""matryoshka_sigmoid_loss and matryoshka_distill: tables, peers' results, edges, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from mrl_fast import matryoshka_distill, matryoshka_sigmoid_loss
from mrl_fast.training import distillation
from tests.helpers.losses import generator, judge

DIMS = (8, 12, 48)
IMPLS = ["cpp", "triton"]


def vectors(*shapes, seed=0):
    g = generator(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=g) for shape in shapes]


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

    def make(seed):
        q, d, noise = vectors((rows, 48), (rows + extra, 48), (rows, 48), seed=seed)
        d[:rows] = q + 0.1 * noise  # σ(z) near 1 at the targets, near 0 elsewhere
        return q.to(torch.bfloat16), d.to(torch.bfloat16), torch.tensor(scale), torch.tensor(bias)

    def fused(q, d, scale, bias):
        return matryoshka_sigmoid_loss(q, d, DIMS, scale=scale, bias=bias, impl=impl)

    judge(fused, siglip, make, torch.float64 if impl == "reference" else dtype)


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
    monkeypatch.setattr(distillation, "CHUNK_BYTES", 1)  # 64 rows
    both = kind in ("pair", "scores")

    def make(seed):
        shapes = [(rows, 48), (rows, 100), (23, 100), (23, 48)]
        x, *teacher, y = vectors(*shapes, seed=seed)
        return [x, y] if both else [x], teacher

    def scores(teacher, x):
        left, right = {"self": (x, x), "wider": (teacher[0], teacher[0])}.get(kind, teacher)
        return F.normalize(left) @ F.normalize(right).T

    def fused(*student, given):
        x = student[0]
        teacher = {"self": x, "wider": given[0], "scores": scores(given, x)}.get(kind, tuple(given))
        options = dict(temperature=temperature, impl=impl)
        return matryoshka_distill(tuple(student) if both else x, teacher, DIMS, **options)

    def plain(*student, given):
        pair = student if both else student * 2
        return kl(pair, scores(given, student[0]).detach(), temperature)

    judge(fused, plain, make, torch.float64 if impl == "reference" else torch.float32)


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
            r"scale: expected a number > 0, got -1.0",
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
            r"temperature: expected a number > 0, got 0.0",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
