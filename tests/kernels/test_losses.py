"""The Triton kernels of losses, below the public ops, against a plain fold in memory."""

import pytest
import torch
import torch.nn.functional as F
from mrl_fast.kernels import training as kernels
from mrl_fast.kernels.shared import tiling

from mrl_fast.testing import rounding_bounds
from tests.helpers.fold_problem import DIMS, GRADIENTS, Problem, check

FEATURES = {
    "cross-entropy": {},
    "smooth": dict(soft="row"),
    "info-nce": dict(scaled=True, bias=False),
    "clip": dict(scaled=True, bias=False, columns=True),
    "columns": dict(scaled=True, bias=False, columns=True, target=False),
    "unscaled columns": dict(columns=True),
    "boost": dict(scaled=True, bias=False, period=13, own_boost=1.5, other_boost=0.7, columns=True),
    "boost all": dict(other_boost=1.25, target=False),
    "exclude": dict(scaled=True, bias=False, period=13, exclude_own=True),
    "mask": dict(scaled=True, bias=False, mask=True),
    "mask in place": dict(mask=True, V=32, soft="matrix"),
    "everything": dict(scaled=True, mask=True, soft="matrix", columns=True, period=13,
                       own_boost=1.5, other_boost=0.7),
    "distill": dict(scaled=True, bias=False, soft="matrix", target=False),
    "sigmoid": dict(scaled=True, link="sigmoid"),
    "sigmoid of unscaled": dict(link="sigmoid", mask=True, period=13, own_boost=0.5),
    "sigmoid without target": dict(link="sigmoid", scaled=True, target=False),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features(name, triton_device):
    Problem(triton_device, **FEATURES[name]).check()


# one program; ragged in every axis; one row; two classes; one class; blocks that end on a slab
SHAPES = [(16, 16, (16,)), (1, 40, (5, 6)), (18, 2, (2, 20)), (3, 1, (2,)), (17, 33, (16, 32))]


@pytest.mark.parametrize(("B", "V", "dims"), SHAPES, ids=str)
def test_shapes(B, V, dims, triton_device):
    Problem(triton_device, B=B, V=V, dims=dims, scaled=True, columns=True).check()
    (problem := Problem(triton_device, B=B, V=V, dims=dims, soft="row")).check()
    head = problem.x, problem.weight, problem.bias
    z = kernels.logits_forward(*head, dims)
    grads = kernels.logits_backward(grad := torch.randn_like(z), *head, dims)

    def native(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in head]
        z = torch.stack([F.linear(leaves[0][:, :d], leaves[1][:, :d], leaves[2]) for d in dims])
        return [z.detach(), *torch.autograd.grad(z, leaves, grad.to(dtype))]

    bounds = rounding_bounds(lambda: native(torch.double))
    names, exact, theirs = ("logits", "dx", "dw", "db"), native(torch.double), native(torch.float)
    for *row, bound in zip(names, (z, *grads), exact, theirs, bounds, strict=True):
        check(*row, lambda bound=bound: bound)


def test_any_stride(triton_device):
    problem = Problem(triton_device, scaled=True, mask=True, soft="matrix", columns=True, V=32)
    expected = problem.by_kernels()
    for name in ("x", "weight", "mask", "soft", "row_scale", "col_scale"):
        setattr(problem, name, getattr(problem, name).T.contiguous().T)  # columns apart
    for name in ("bias", "target"):
        setattr(problem, name, torch.stack([getattr(problem, name)] * 2, dim=1)[:, 0])
    problem.upstream = [d.T.contiguous().T for d in problem.upstream]
    torch.testing.assert_close(problem.by_kernels(), expected)
    for name in ("mask", "soft"):  # rows apart, and not at multiples of 16 bytes
        setattr(problem, name, F.pad(getattr(problem, name), (3, 2))[:, 3:-2])
    torch.testing.assert_close(problem.by_kernels(), expected)
    problem.x = problem.x[:1].expand(20, -1)  # rows on one another
    problem.mask = problem.mask[:1].expand(20, -1)
    problem.soft = problem.soft.masked_fill(problem.mask, 0.0)
    problem.check()


@pytest.mark.parametrize("features", [
    dict(), dict(scaled=True, columns=True, mask=True, soft="matrix"),
    dict(period=70, own_boost=2.0, scaled=True, columns=True), dict(link="sigmoid", scaled=True),
], ids=["plain", "all", "boost", "sigmoid"])  # fmt: skip
def test_chunks_of_rows_and_classes(features, triton_device, monkeypatch):
    monkeypatch.setattr(tiling, "WORKSPACE_BYTES", 1)  # the least is 128 × 128
    assert tiling.chunk_steps(132, 256, 8) == (128, 128) and tiling.row_step(24) == 128
    Problem(triton_device, B=132, V=141, dims=(2, 5), **features).check()


def test_logits_of_more_rows_than_a_grid_has(triton_device, monkeypatch):
    problem = Problem(triton_device, B=70, V=37)
    head = problem.x, problem.weight, problem.bias
    expected = kernels.logits_forward(*head, DIMS)
    monkeypatch.setattr(tiling, "MOST_ROWS", 32)
    assert torch.equal(kernels.logits_forward(*head, DIMS), expected)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_hidden_columns_stay_hidden(triton_device):
    problem = Problem(triton_device, scaled=True, columns=True)
    expected = problem.by_kernels()
    for hidden in (torch.inf, torch.nan):
        problem.x[:, DIMS[-1] :] = hidden
        problem.weight[:, DIMS[-1] :] = hidden
        for name, actual in problem.by_kernels().items():
            assert actual is expected[name] is None or torch.equal(actual, expected[name]), name
    assert all((expected[name][:, DIMS[-1] :] == 0).all() for name in ("dx", "dw"))
    problem.weight[:, 8] = torch.nan  # seen by the widest prefix only
    problem.x[3, 8] = torch.inf
    f = problem.forward()
    assert torch.equal(f["row_log"][:3], expected["row_log"][:3]) and f["row_log"][3].isnan().all()
    assert torch.equal(f["col_log"][:3], expected["col_log"][:3]) and f["col_log"][3].isnan().all()


@pytest.mark.parametrize("how", ["mask", "bias"])
def test_excluded_columns(how, triton_device):
    """128 classes or more in a row, as of a padded vocabulary, are as if they were not there."""
    problem = Problem(triton_device, V=300, dims=(2, 5), columns=True)
    problem.target %= 130
    if how == "bias":
        problem.bias[130:] = -torch.inf
    else:
        problem.mask = (torch.arange(300, device=triton_device) >= 130).expand(20, -1)
    actual = problem.by_kernels()
    assert (actual["dw"][130:] == 0).all() and (actual["db"][130:] == 0).all()
    assert ((actual["col_max"] + actual["col_log"])[:, 130:] == -torch.inf).all()
    problem.mask = None
    problem.weight, problem.bias = problem.weight[:130], problem.bias[:130]
    problem.upstream[3] = problem.upstream[3][:, :130]
    names = ("row_max", "row_log", "hit", "dx", "dw", "db")
    problem.check(actual, names, lambda name, t: t[:130] if name in ("dw", "db") else t)


def test_rows_with_nothing_left(triton_device):
    problem = Problem(triton_device, scaled=True, columns=True, mask=True, soft="row")
    problem.mask[3], problem.mask[:, 5] = True, True
    problem.soft *= 0
    actual = problem.by_kernels()
    assert (actual["row_max"][:, 3] == -torch.inf).all() and (actual["row_log"][:, 3] == 0).all()
    assert (actual["col_max"][:, 5] == -torch.inf).all() and (actual["col_log"][:, 5] == 0).all()
    assert (actual["hit"][:, 3] == -torch.inf).all() and (actual["soft_sum"] == 0).all()
    assert (actual["dx"][3] == 0).all() and (actual["dw"][5] == 0).all()
    problem.check(actual, ("row_max", "row_log", "col_max", "col_log", *GRADIENTS))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_not_a_number_stays(triton_device):
    problem = Problem(triton_device, columns=True)
    problem.x[3] = torch.nan
    f = problem.by_kernels()
    assert f["row_log"][:, 3].isnan().all() and f["row_log"].isnan().sum() == 4
    assert f["col_log"].isnan().all()
    assert f["dx"][3, : DIMS[-1]].isnan().all() and f["dw"][:, : DIMS[-1]].isnan().all()


def test_a_target_that_is_no_class_gives_nan(triton_device):
    for link in ("softmax", "sigmoid"):
        problem = Problem(triton_device, link=link)
        problem.target[:4] = torch.tensor([37, -1, -100, 2**32 + 5])  # a GPU is not asked to check
        assert problem.forward()["hit"].isnan().sum(1).tolist() == [4] * 4


def test_the_most_probable_class_is_exactly_at_the_maximum(triton_device):
    problem = Problem(triton_device)
    z = kernels.logits_forward(problem.x, problem.weight, problem.bias, DIMS)
    for g in range(len(DIMS)):
        problem.target = z[g].argmax(-1)
        f = problem.forward()
        assert torch.equal(f["hit"][g], -f["row_log"][g])  # (z − row_max) is 0, not about 0


@pytest.mark.parametrize("columns", [False, True])
def test_confident_predictions(columns, triton_device):
    """Near p = 1 gradients are as precise, relative to themselves, as PyTorch's own."""
    problem = Problem(triton_device, B=20, V=20, dims=(6, 12), bias=False, columns=columns)
    problem.x = problem.weight = F.normalize(problem.weight[:, :12]) * 4
    problem.target = torch.arange(20, device=triton_device)
    n = torch.full_like(problem.upstream[0], 1 / 20)
    problem.upstream = [n, -2 * n if columns else -n, None, n]  # cross-entropy both ways
    assert (problem.forward()["row_log"][1].abs() < 0.02).all()  # p > 0.98
    problem.check()


def test_sigmoid_keeps_digits_on_both_sides(triton_device):
    problem = Problem(triton_device, link="sigmoid", dims=(3,))
    problem.x *= 0.1
    for offset in (-60.0, -10.0, 10.0, 60.0):
        problem.bias.fill_(offset)
        exact, f = problem.native(torch.double), problem.by_kernels()
        for name in ("row_log", "hit", "db"):
            error = (f[name].double() / exact[name] - 1).abs().max()
            assert error < 1e-5, (name, offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiny_and_absent_gradients(dtype, triton_device):
    problem = Problem(triton_device)
    problem.x, problem.weight, problem.bias = (t.to(dtype) for t in problem.tensors()[:3])
    f, d_hit, factors = problem.forward(), problem.upstream[1], (1.0, 2.0**-12, 0.0, torch.nan)
    large, small, zero, nan = (
        problem.backward(f, [-d_hit * c, d_hit * c, None, None]) for c in factors
    )
    assert (small["dx"].float() * 2.0**12 - large["dx"].float()).abs().max() < 2e-3
    assert all((t == 0).all() for t in zero.values() if t is not None)
    assert nan["dx"][:, : DIMS[-1]].isnan().all()  # as a GradScaler has to see it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vector_without_norm_leaves_the_others_their_gradients(dtype, triton_device):
    """Cosine scores: its scale is 1 / 1e-12, by which no other gradient may be measured."""
    problem = Problem(triton_device, scaled=True, bias=False)
    problem.x[3], problem.weight[5] = 0.0, 0.0
    norms = [t[:, :d].norm(dim=1) for t in (problem.x, problem.weight) for d in DIMS]
    scales = [1 / n.clamp(min=1e-12) for n in norms]
    problem.row_scale, problem.col_scale = torch.stack(scales[:4]) * 20, torch.stack(scales[4:])
    problem.upstream = [d * 1e-6 for d in problem.upstream]  # below what fp16 holds
    exact = problem.native(torch.double)
    problem.x, problem.weight = problem.x.to(dtype), problem.weight.to(dtype)
    actual = problem.by_kernels()
    ordinary = torch.arange(20) != 3, torch.arange(37) != 5
    for name, rows in zip(("dx", "dw"), ordinary, strict=True):
        mine, theirs = actual[name][rows].double(), exact[name][rows]
        assert torch.isfinite(mine).all(), name
        error = (mine - theirs).norm() / theirs.norm()
        assert error < (0.01 if dtype == torch.float16 else 0.04), (name, error)


def test_compute_dtype(triton_device):
    """fp32 masters: products of bf16 operands, gradients in fp32."""
    problem = Problem(triton_device, scaled=True)
    f = problem.forward(compute_dtype=torch.bfloat16)
    actual = f | problem.backward(f, compute_dtype=torch.bfloat16)
    assert actual["dx"].dtype == actual["dw"].dtype == torch.float32
    problem.x, problem.weight = (t.bfloat16().float() for t in (problem.x, problem.weight))
    if triton_device == "cpu":  # where the interpreter multiplies and stores in fp32
        problem.check(actual)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_predict(triton_device):
    problem = Problem(triton_device, B=40)
    head = [problem.x.round(), problem.weight.round(), problem.bias.round()]  # many ties
    head[2][20:] = -torch.inf  # whole tiles
    head[0][7, 3] = torch.nan  # seen from the third prefix on
    labels, confidence = kernels.predict_forward(*head, DIMS)
    z = torch.stack([F.linear(head[0][:, :d], head[1][:, :d], head[2]) for d in DIMS])
    assert labels.dtype == torch.int64 and confidence.dtype == torch.float32
    assert torch.equal(labels, z.argmax(-1).where(~z.isnan().any(-1), 0))
    exact, native = (z.to(t).softmax(-1).amax(-1) for t in (torch.double, torch.float))
    check("confidence", confidence, exact, native, None)
    assert (z == z.amax(-1, keepdim=True)).sum(-1).max() > 1
    labels, confidence = kernels.predict_forward(problem.x, problem.weight * 0, None, DIMS)
    assert (labels == 0).all() and ((confidence * 37 - 1).abs() < 1e-6).all()


def test_no_rows(triton_device):
    problem = Problem(triton_device, B=0, scaled=True, columns=True, mask=True, soft="matrix")
    results = problem.by_kernels()
    shapes = {"row_max": (4, 0), "soft_sum": (4, 0), "col_max": (4, 37), "dx": (0, 14)}
    shapes |= {"dw": (37, 14), "db": (37,), "d_row_scale": (4, 0), "d_col_scale": (4, 37)}
    for name, shape in shapes.items():
        assert results[name].shape == shape, name
    assert (results.pop("col_max") == -torch.inf).all()
    assert all((t == 0).all() for t in results.values())
    for t in kernels.predict_forward(problem.x, problem.weight, None, DIMS):
        assert t.shape == (4, 0)
