"""Losses in a training loop: torch.compile, autocast, checkpointing, ranks, memory."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mrl_fast import (
    MatryoshkaLoopLoss,
    matryoshka_cross_entropy,
    matryoshka_distill,
    matryoshka_info_nce,
    matryoshka_logits,
    matryoshka_predict,
    matryoshka_sigmoid_loss,
)
from mrl_fast.training import ops
from mrl_fast.training.spec import FoldSpec
from tests.helpers.losses import DIMS, LOSSES, TARGET, tensors


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_as_one_graph(name):
    x, w = tensors((19, 48), (30, 48))
    expected = torch.autograd.grad(LOSSES[name](x, w), [x, w])
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
        loss = compiled(x, w)
        actual = torch.autograd.grad(loss, [x, w])
    torch.testing.assert_close(loss, LOSSES[name](x, w))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_ops_keep_their_contracts_with_pytorch():
    x, w = tensors((9, 48), (11, 48))
    spec = FoldSpec(
        x, w, list(DIMS), row_scale=torch.rand(3, 9), col_scale=torch.rand(3, 11),
        target=TARGET[:9], columns=True,
    )  # fmt: skip
    torch.library.opcheck(ops._fold, (*spec, "cpp"))
    columns_first = w.detach().T.contiguous().T.requires_grad_()
    torch.library.opcheck(ops._fold, (*spec._replace(weight=columns_first), "cpp"))
    torch.library.opcheck(ops._nested_logits, (x, columns_first, None, list(DIMS), "cpp"))
    torch.library.opcheck(ops._inverse_norms, (x, list(DIMS)))
    torch.library.opcheck(ops._nested_logits, (x, w, torch.rand(11), list(DIMS), "cpp"))
    not_differentiable = ("test_schema", "test_faketensor")
    predict = (x.detach(), w.detach(), None, list(DIMS), "cpp")
    torch.library.opcheck(ops.predict, predict, test_utils=not_differentiable)


@pytest.mark.parametrize("name", ["cross_entropy", "info_nce", "sigmoid", "distill"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(name, dtype):
    x, w = tensors((19, 48), (30, 48))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([x, w], lr=1.0)
    with torch.autocast("cpu", dtype):
        loss = LOSSES[name](x, w)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    rounded = [t.detach().to(dtype).double().requires_grad_() for t in (x, w)]
    exact = torch.autograd.grad(LOSSES[name](*rounded), rounded)
    for leaf, e in zip((x, w), exact, strict=True):
        assert leaf.grad.dtype == torch.float32
        error = (leaf.grad - e).abs().max() / e.abs().max()
        assert error < 2 * torch.finfo(dtype).eps


def test_rows_stay_fp32_under_autocast():
    x, w = tensors((19, 48), (30, 48))
    with torch.autocast("cpu", torch.bfloat16):
        out = matryoshka_cross_entropy(x, w, TARGET, DIMS, reduction="none")
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.detach(), out.per_dim.sum(0))


def test_a_teacher_is_the_same_under_autocast():
    x, t = tensors((16, 48), (16, 60))
    plain = matryoshka_distill(x.bfloat16(), t, DIMS, temperature=0.05).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matryoshka_distill(x, t, DIMS, temperature=0.05).loss, plain)


def test_small_gradients_survive_half_precision():
    # 1/n of a large batch is far below what float16 holds; only the end result is rounded
    x, w = tensors((4096, 16), (50, 16), dtype=torch.float16)
    target = torch.arange(4096) % 50
    matryoshka_cross_entropy(x, w, target, (4, 16)).loss.mul(2.0**10).backward()
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    matryoshka_cross_entropy(*exact, target, (4, 16)).loss.mul(2.0**10).backward()
    assert (x.grad != 0).float().mean() > 0.99
    torch.testing.assert_close(x.grad.double(), exact[0].grad, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(w.grad.double(), exact[1].grad, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["cross_entropy", "info_nce", "distill"])
def test_gradient_checkpointing(name):
    x, w = tensors((19, 48), (30, 48))
    encoder = torch.nn.Linear(48, 48)
    plain = torch.autograd.grad(LOSSES[name](encoder(x), w), [x, w])

    def loss(x, w):
        return LOSSES[name](encoder(x), w)

    checked = torch.utils.checkpoint.checkpoint(loss, x, w, use_reentrant=False)
    for a, e in zip(torch.autograd.grad(checked, [x, w]), plain, strict=True):
        assert torch.equal(a, e)


def test_runs_give_the_same_bits():
    x, w = tensors((300, 48), (700, 48))
    for loss in (
        lambda: matryoshka_cross_entropy(x, w, torch.arange(300), DIMS).loss,
        lambda: LOSSES["clip"](x, w[:300]),
    ):
        first, second = (torch.autograd.grad(loss(), [x, w]) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- ranks ---


RANK_OPTIONS = [
    {},
    dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"),
    dict(directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")),
    dict(hardness_mode="all_negatives", hardness_strength=5.0),
    dict(spread_out=(1.0, 50.0)),
    dict(spread_out=(1.0, 50.0, "sum"), impl="reference"),
    "sigmoid",
]


def losses_of_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.save([loss_of_a_rank(rank, options) for options in RANK_OPTIONS], f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that are still there abort an ordinary exit at times


def loss_of_a_rank(rank, options):
    q, p, n = (t.detach() for t in tensors((8, 48), (8, 48), (8, 48)))
    mine = slice(4 * rank, 4 * rank + 4)
    q, p, n = (t[mine].clone().requires_grad_() for t in (q, p, n))
    group = dist.group.WORLD
    if options == "sigmoid":
        out = matryoshka_sigmoid_loss(q, p, DIMS, scale=10.0, bias=-10.0, group=group)
        grads = [*torch.autograd.grad(out.loss, [q, p]), torch.zeros_like(n)]
    else:
        out = matryoshka_info_nce(q, [p, n], DIMS, group=group, **options)
        grads = torch.autograd.grad(out.loss, [q, p, n])
    return [out.loss.detach(), *grads]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Of each rank, the loss and gradients with all options: processes take long to start."""
    folder = tmp_path_factory.mktemp("ranks")
    code = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('ranks', {__file__!r})\n"
        "ranks = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(ranks)\n"
        f"ranks.losses_of_a_rank(int(sys.argv[1]), {str(folder)!r})\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("options", RANK_OPTIONS, ids=str)
def test_two_ranks_equal_one_large_batch(options, ranks):
    results = [losses[RANK_OPTIONS.index(options)] for losses in ranks]
    q, p, n = tensors((8, 48), (8, 48), (8, 48))
    if options == "sigmoid":
        loss = matryoshka_sigmoid_loss(q, p, DIMS, scale=10.0, bias=-10.0).loss
        grads = [*torch.autograd.grad(loss, [q, p]), torch.zeros_like(n)]
    else:
        loss = matryoshka_info_nce(q, [p, n], DIMS, **options).loss
        grads = torch.autograd.grad(loss, [q, p, n])
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, loss.detach())
    for i, grad in enumerate(grads):  # as DDP averages them
        both = torch.cat([results[0][1 + i], results[1][1 + i]]) / 2
        torch.testing.assert_close(both, grad)


# --- predictions ---


@pytest.mark.parametrize("impl", ["cpp", "triton", "reference"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
def test_predictions(impl, tied):
    x, w, b = (t.detach() for t in tensors((19, 48), (70, 48), (70,)))
    weight = w if tied else [w[:, :d].contiguous() for d in DIMS]
    bias = b if tied else [b + g for g in range(3)]
    labels, confidence = matryoshka_predict(x, weight, DIMS, bias=bias, impl=impl)
    expected = matryoshka_logits(x, weight, DIMS, bias=bias).softmax(-1).max(-1)
    assert torch.equal(labels, expected.indices)
    torch.testing.assert_close(confidence, expected.values)
    same = matryoshka_predict(x, w[:1].expand(70, -1), DIMS, impl=impl)
    assert (same.labels == 0).all()  # the first of equals
    torch.testing.assert_close(same.confidence, torch.full((3, 19), 1 / 70))
    assert matryoshka_predict(x[:0], w, DIMS, impl=impl).labels.shape == (3, 0)
    w[5, 10] = torch.nan  # seen by two prefixes
    beside = matryoshka_predict(x, w, DIMS, impl=impl)
    assert (beside.labels[1:] == 0).all()  # the softmax is NaN all over
    assert beside.confidence[1:].isnan().all() and beside.confidence[0].isfinite().all()


def test_predict_bad_input():
    x, w = (t.detach() for t in tensors((19, 48), (70, 48)))
    with pytest.raises(ValueError, match=r"weight: expected at least one class, got shape \[0"):
        matryoshka_predict(x, w[:0], DIMS)


# --- losses with no fused form ---


def test_a_loss_with_no_fused_form_runs_in_a_loop_and_says_so_once():
    a, b, c = tensors((9, 48), (9, 48), (9, 48))
    loss_fn = MatryoshkaLoopLoss(torch.nn.TripletMarginLoss(), DIMS, dim_weights=(1, 2, 3))
    with pytest.warns(UserWarning, match="TripletMarginLoss has no fused form: it runs once"):
        loss = loss_fn([a, b, c])
    loss_fn([a, b, c])  # no warning, which would be an error here
    per_dim = torch.stack([F.triplet_margin_loss(a[:, :d], b[:, :d], c[:, :d]) for d in DIMS])
    torch.testing.assert_close(loss_fn.per_dim, per_dim.detach())
    torch.testing.assert_close(loss, (per_dim * torch.tensor([1.0, 2, 3])).sum())

    def cosent(x, y, labels):
        s = 20 * F.cosine_similarity(x, y)
        pairs = labels[:, None] < labels[None, :]
        return torch.cat([s.new_zeros(1), (s[:, None] - s[None, :])[pairs]]).logsumexp(0)

    labels = torch.linspace(0, 1, 9)
    ranked = MatryoshkaLoopLoss(cosent, DIMS, normalize=True)
    with pytest.warns(UserWarning, match="cosent has no fused form"):
        ranked([a, b], labels).backward()
    assert a.grad.any() and ranked.per_dim.shape == (3,)
    with pytest.raises(ValueError, match=r"dims \(of embeddings\[1\]\): expected widths of at"):
        ranked([a, b[:, :40]], labels)
    a9, b9 = tensors((3, 48), (3, 48))
    rows = MatryoshkaLoopLoss(lambda x, y: (x - y).square().sum(1), DIMS)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="inner: expected a scalar"):
        rows([a9, b9])
    with pytest.raises(TypeError, match="inner: expected a callable, got int"):
        MatryoshkaLoopLoss(3, DIMS)


# --- memory ---

MEMORY = """
import sys, torch
from mrl_fast import matryoshka_cross_entropy, matryoshka_info_nce
torch.manual_seed(0)
def run(rows, columns, width, clip):
    q, p = torch.randn(rows, width).requires_grad_(), torch.randn(columns, width).requires_grad_()
    dims = (8, 32, width)
    if rows == columns:
        ways = ("query_to_doc", "doc_to_query") if clip else ("query_to_doc",)
        loss = matryoshka_info_nce(q, p, dims, directions=ways).loss
    else:
        loss = matryoshka_cross_entropy(q, p, torch.zeros(rows, dtype=torch.int64), dims).loss
    loss.backward()
rows, columns, width, clip = map(int, sys.argv[1:])
run(min(rows, 64), 64 if rows == columns else 128, width, clip)
def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS:")
run(rows, columns, width, clip)
print((status("VmHWM:") - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("rows", "columns", "width", "clip"),
    [
        (4096, 4096, 128, 0),
        (8192, 8192, 33, 1),  # narrow: many columns a chunk
        (2, 200_000, 33, 0),  # two rows against many classes
        (2, 20_000, 1024, 0),  # the same, wide: few columns packed at a time
    ],
)
def test_no_score_matrix_is_held(rows, columns, width, clip):
    command = [sys.executable, "-c", MEMORY, *map(str, (rows, columns, width, clip))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    vectors = 4 * (rows + columns) * width / 2**20  # MiB of inputs, and as much of each gradient
    assert float(done.stdout) < 16 + 3 * vectors  # one score matrix would be 64 or 256 MiB
