"""matryoshka_info_nce: table, sentence-transformers' own results, CLIP, GIST, edges, bad input."""

import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from mrl_fast import _C, MatryoshkaInfoNCELoss, matryoshka_info_nce
from mrl_fast.shared import native
from mrl_fast.testing import assert_within_budget, rounding_bounds
from mrl_fast.training import cpp
from tests.helpers.losses import generator

try:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
except ModuleNotFoundError:  # as on a GPU machine; elsewhere the reference is held to it
    MultipleNegativesRankingLoss = None

DIMS = (8, 12, 48)
IMPLS = ["cpp", "triton"]
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def make_embeddings(rows=19, negatives=0, *, width=48, noise=1.0, seed=0):
    """Queries, positives near them (``noise`` 0.05: p >= .999), negatives; norms differ."""
    g = generator(seed)
    q = torch.randn(rows, width, dtype=torch.float64, generator=g)
    q = q * torch.linspace(0.2, 5, rows, dtype=torch.float64)[:, None]
    blocks = [q + noise * torch.randn(q.shape, dtype=q.dtype, generator=g)]
    blocks += [torch.randn(q.shape, dtype=q.dtype, generator=g) for _ in range(negatives)]
    return [q, *blocks]


def leaves(embeddings, dtype):
    return [e.to(dtype).clone().requires_grad_() for e in embeddings]


def ours(embeddings, dtype, impl, *, dims=DIMS, **options):
    q, *blocks = leaves(embeddings, dtype)
    documents = blocks[0] if len(blocks) == 1 else blocks
    out = matryoshka_info_nce(q, documents, dims, impl=impl, **options)
    dq, *rest = torch.autograd.grad(out.loss.sum(), [q, *blocks])
    return [out.loss.detach(), out.per_dim, dq, torch.cat(rest)]


def peers(embeddings, dtype, *, dims=DIMS, dim_weights=None, **options):
    """sentence-transformers' loss of each truncated prefix."""
    if MultipleNegativesRankingLoss is None:
        return ours(embeddings, dtype, "reference", dims=dims, **options)
    columns = leaves(embeddings, dtype)
    loss_fn = MultipleNegativesRankingLoss(None, **options)
    per_dim = torch.stack(
        [loss_fn.compute_loss_from_embeddings([c[:, :d] for c in columns], None) for d in dims]
    )
    loss = per_dim.sum() if dim_weights is None else per_dim @ torch.tensor(dim_weights).to(dtype)
    dq, *rest = torch.autograd.grad(loss, columns)
    return [loss.detach(), per_dim.detach(), dq, torch.cat(rest)]


def check_budget(actual, exact, native_, bounds_of=None):
    """``bounds_of`` computes ``exact``. Without it PyTorch's own error is the budget."""
    bounds = cache(lambda: rounding_bounds(bounds_of))
    for i, (a, e, n) in enumerate(zip(actual, exact, native_, strict=True)):
        if a.dtype == torch.float64:  # the reference: no dtype's error to compare with
            torch.testing.assert_close(a, e)
        else:
            bound = partial(lambda i: bounds()[i], i) if bounds_of else None
            assert_within_budget(a, e, n, name=f"result {i}", bound=bound)


def judge(impl, dtype, several, options):
    """Several problems as one: PyTorch's own error on a few numbers says little."""

    def joined(compute):
        runs = map(compute, several)
        return [torch.cat([r.reshape(-1) for r in rs]) for rs in zip(*runs, strict=True)]

    def exact():
        return joined(lambda e: peers(e, torch.float64, **options))

    actual = joined(lambda e: ours(e, dtype, impl, **options))
    check_budget(actual, exact(), joined(lambda e: peers(e, dtype, **options)), exact)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_table(impl):
    # cosines 1 and 0 at d = 1; 1/√2 and 1/√2 at d = 2: log-partitions of (ln 3, 0) and of equals
    q = torch.tensor([[2.0, 0.0]])
    d = torch.tensor([[3.0, 3.0], [0.0, 0.0]])
    out = matryoshka_info_nce(q, d, (1, 2), scale=math.log(3), impl=impl)
    torch.testing.assert_close(out.per_dim[0], torch.tensor(math.log(4 / 3)))
    s = math.log(3) / math.sqrt(2)
    torch.testing.assert_close(out.per_dim[1], torch.tensor(math.log1p(math.exp(-s))))
    torch.testing.assert_close(out.loss, out.per_dim.sum())


OPTIONS = {
    "default": {},
    "two-ways": dict(directions=("query_to_doc", "doc_to_query")),
    "clip": dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"),
    "gte": dict(directions=ALL),
    "queries": dict(directions=("query_to_doc", "query_to_query")),
    "documents": dict(directions=("query_to_doc", "doc_to_doc")),
    "hard-in-batch": dict(hardness_mode="in_batch_negatives", hardness_strength=9.0),
    "hard-own": dict(hardness_mode="hard_negatives", hardness_strength=5.0),
    "hard-all": dict(hardness_mode="all_negatives", hardness_strength=5.0, directions=ALL),
    "scale": dict(scale=75.0),
}


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_equals_sentence_transformers(impl, options, negatives):
    rows, dtype = (70, torch.float32) if impl == "cpp" else (19, torch.float64)
    judge(impl, dtype, [make_embeddings(rows, negatives, seed=seed) for seed in range(3)], options)


@pytest.mark.parametrize("name", ["default", "clip", "gte", "hard-all"])
def test_triton_equals_sentence_transformers(name):
    several = [make_embeddings(19, 1, seed=seed) for seed in range(2)]
    judge("triton", torch.float32, several, OPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [1.0, 0.02], ids=["unsure", "confident"])
@pytest.mark.parametrize("options", [{}, OPTIONS["clip"], OPTIONS["gte"]], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_error_budget(impl, options, noise, dtype):
    embeddings = [e.to(dtype) for e in make_embeddings(19, noise=noise)]
    exact = peers(embeddings, torch.float64, scale=50.0, **options)
    if noise < 1 and not options:  # p >= .999 at the widest dim, or this tests nothing
        assert exact[1][-1] < 1e-3
    native_ = peers(embeddings, dtype, scale=50.0, **options)
    actual = ours(embeddings, dtype, impl, scale=50.0, **options)
    # near p = 1 ours keep digits that log-sum − score, on which a bound would rest, has lost
    unsure = (
        partial(peers, embeddings, torch.float64, scale=50.0, **options) if noise == 1 else None
    )
    check_budget(actual, exact, native_, unsure)


@pytest.mark.parametrize("isa", _C.available())
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setattr(native, "ISA", isa)
    judge("cpp", torch.float32, [make_embeddings(101)], OPTIONS["clip"])


def test_chunks_change_nothing_but_rounding(monkeypatch):
    embeddings, options = make_embeddings(150, 1), OPTIONS["hard-all"]
    whole = ours(embeddings, torch.float32, "cpp", **options)
    monkeypatch.setattr(cpp, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(cpp, "PACKED_BYTES", 1)
    for a, e in zip(ours(embeddings, torch.float32, "cpp", **options), whole, strict=True):
        torch.testing.assert_close(a, e)


def test_threads_change_no_bit(monkeypatch):
    embeddings, options = make_embeddings(400), OPTIONS["gte"]
    whole = ours(embeddings, torch.float32, "cpp", **options)
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "threads", threads)
        other = ours(embeddings, torch.float32, "cpp", **options)
        assert all(torch.equal(a, e) for a, e in zip(other, whole, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_learnable_scale_target_weights_and_reductions(impl):
    q, d = leaves(make_embeddings(19), torch.float32)
    d = torch.cat([d, torch.randn(4, 48, generator=generator(1))])
    target = torch.randperm(23, generator=generator(2))[:19]

    def leaves_of(dtype):
        scale = torch.tensor(3.0, dtype=dtype, requires_grad=True)
        return *leaves((q.detach(), d.detach()), dtype), scale

    def plain(dtype, normalize, reduction):
        a, b, scale = leaves_of(dtype)
        rows = []
        for w in DIMS:
            x, y = a[:, :w], b[:, :w]
            if normalize:
                x, y = F.normalize(x), F.normalize(y)
            rows.append(F.cross_entropy(scale * x @ y.T, target, reduction=reduction))
        per_dim = torch.stack(rows)
        loss = torch.tensordot(torch.tensor([1, 0.5, 2], dtype=dtype), per_dim, 1)
        grads = torch.autograd.grad(loss.sum(), [a, b, scale])
        return [loss.detach(), per_dim.detach(), *grads]

    for normalize in (True, False):
        for reduction in ("mean", "sum", "none"):
            a, b, scale = leaves_of(torch.float32)
            loss, per_dim = matryoshka_info_nce(
                a, b, DIMS, scale=scale, target=target, dim_weights=(1, 0.5, 2),
                normalize=normalize, reduction=reduction, impl=impl,
            )  # fmt: skip
            grads = torch.autograd.grad(loss.sum(), [a, b, scale])
            actual = [loss.detach(), per_dim.detach(), *grads]
            exact = partial(plain, torch.float64, normalize, reduction)
            check_budget(actual, exact(), plain(torch.float32, normalize, reduction), exact)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_masks_as_gist_makes_them(impl):
    q, p, n = make_embeddings(19, 1)
    noise = make_embeddings(19, 1, seed=1)
    guide = [F.normalize(e + 0.3 * o) for e, o in zip((q, p, n), noise, strict=True)]
    threshold = (guide[0] * guide[1]).sum(1, keepdim=True)

    def hidden(a, b):
        return guide[a] @ guide[b].T > threshold

    own = torch.eye(19, dtype=torch.bool)
    to_doc = torch.cat([hidden(0, 1) & ~own, hidden(0, 2)], dim=1)
    mask = {"query_to_doc": to_doc, "query_to_query": hidden(0, 0)}
    assert to_doc.any()

    def gist(dtype):
        columns = leaves((q, p, n), dtype)
        losses = []
        for d in DIMS:
            x, y, z = (F.normalize(e[:, :d]) for e in columns)
            scores = [x @ y.T, x @ z.T, x @ x.T]
            masks = [hidden(0, 1) & ~own, hidden(0, 2), hidden(0, 0) | own]
            hid = [s.masked_fill(m, -torch.inf) for s, m in zip(scores, masks, strict=True)]
            losses.append(F.cross_entropy(20 * torch.cat(hid, 1), torch.arange(19)))
        per_dim = torch.stack(losses)
        dq, *rest = torch.autograd.grad(per_dim.sum(), columns)
        return [per_dim.sum().detach(), per_dim.detach(), dq, torch.cat(rest)]

    dtype = torch.float64 if impl == "reference" else torch.float32
    actual = ours((q, p, n), dtype, impl, mask=mask, directions=("query_to_doc", "query_to_query"))
    check_budget(actual, gist(torch.float64), gist(dtype), partial(gist, torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_norm_rows_give_what_normalize_gives(impl):
    q, p = make_embeddings(9)
    q[2], p[4] = 0.0, 0.0
    q[3, :8] = 0.0
    exact = peers((q, p), torch.float64)
    native_ = peers((q, p), torch.float32)
    actual = ours((q, p), torch.float32, impl)
    assert exact[2][2].abs().max() > 1e6  # a unit vector's gradient over 1e-12
    for a, e, n in zip(actual, exact, native_, strict=True):
        torch.testing.assert_close(a.double(), n.double(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_hidden_columns_and_single_rows(impl):
    q, p = (e.float() for e in make_embeddings(19))
    expected = ours((q, p), torch.float32, impl)
    wide = [F.pad(e, (0, 9), value=torch.nan).requires_grad_() for e in (q, p)]
    out = matryoshka_info_nce(*wide, DIMS, impl=impl)
    torch.testing.assert_close(out.loss.detach(), expected[0])
    out.loss.backward()
    assert not wide[0].grad[:, 48:].any() and not wide[1].grad[:, 48:].any()
    torch.testing.assert_close(wide[0].grad[:, :48], expected[2])
    one = matryoshka_info_nce(q[:1], p[:1], DIMS, directions=ALL[:2], impl=impl)
    assert (one.per_dim == 0).all()  # nothing to be told apart from
    empty = matryoshka_info_nce(q[:0], p, DIMS, reduction="sum", impl=impl)
    assert empty.loss == 0
    assert matryoshka_info_nce(q[:0], p[:0], DIMS, impl=impl).loss.isnan()


def test_reference_gradients():
    embeddings = leaves(make_embeddings(4, 1, width=5), torch.float64)

    def loss(q, p, n):
        return matryoshka_info_nce(q, [p, n], (2, 5), directions=ALL, scale=3.0).loss

    assert torch.autograd.gradcheck(loss, embeddings)


def test_float64_and_second_derivatives():
    q, p = leaves(make_embeddings(4), torch.float64)
    (grad,) = torch.autograd.grad(matryoshka_info_nce(q, p, DIMS).loss, q, create_graph=True)
    grad.sum().backward()
    q, p = leaves((q.detach(), p.detach()), torch.float32)
    (grad,) = torch.autograd.grad(matryoshka_info_nce(q, p, DIMS).loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


def test_module():
    q, p, n = (e.float() for e in make_embeddings(9, 1))
    loss_fn = MatryoshkaInfoNCELoss(DIMS, dim_weights=(1, 2, 3), learn_scale=True, directions=ALL)
    loss = loss_fn(q, p, n)
    functional = matryoshka_info_nce(q, [p, n], DIMS, dim_weights=(1, 2, 3), directions=ALL)
    torch.testing.assert_close(loss, functional.loss)
    torch.testing.assert_close(loss_fn.per_dim, functional.per_dim)
    loss.backward()
    assert loss_fn.log_scale.grad != 0 and [*loss_fn.state_dict()] == ["log_scale", "dim_weights"]
    assert [*MatryoshkaInfoNCELoss(DIMS).parameters()] == []
    with pytest.raises(TypeError, match="temperature: expected one of directions"):
        MatryoshkaInfoNCELoss(DIMS, temperature=1.0)


Q, P = torch.randn(4, 8), torch.randn(4, 8)
M = torch.zeros(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(queries=[1]), TypeError, r"queries: expected a torch.Tensor, got list"),
        (dict(documents=5), TypeError, r"documents: expected a tensor or a sequence, got int"),
        (dict(documents=[]), ValueError, r"documents: expected at least the positives"),
        (dict(documents=P[:, :6]), ValueError, r"documents: expected width 8 as queries, got 6"),
        (dict(documents=P[:3]), ValueError, r"documents: expected at least 4 positives, got 3"),
        (dict(documents=[P, P[:3]]), ValueError, r"documents\[1\]: expected 4 rows, got 3"),
        (dict(documents=P.half()), TypeError, r"documents: expected torch.float32 as queries"),
        (dict(dims=(4, 9)), ValueError, r"dims: expected widths of at most 8 .* got 9"),
        (dict(scale=0.0), ValueError, r"scale: expected a number > 0, got 0.0"),
        (dict(scale=torch.ones(2)), ValueError, r"scale: expected a number or one floating-point"),
        (dict(scale="big"), TypeError, r"scale: expected a number or a tensor, got str"),
        (dict(target=torch.tensor([0, 1, 2, 4])), ValueError, r"target: .* \[0, 4\), got 4"),
        (dict(target=torch.zeros(4)), TypeError, r"target: expected torch.int64"),
        (dict(directions="query_to_doc"), TypeError, r"directions: expected a sequence of names"),
        (dict(directions=("doc_to_doc",)), ValueError, r"directions: .* 'query_to_doc' among"),
        (dict(directions=("x",)), ValueError, r"directions: expected one of .* got 'x'"),
        (dict(partition_mode="x"), ValueError, r"partition_mode: expected one of .* got 'x'"),
        (
            dict(partition_mode="per_direction", directions=ALL),
            ValueError,
            r"partition_mode: expected 'joint' with",
        ),
        (dict(hardness_mode="x"), ValueError, r"hardness_mode: expected one of .* got 'x'"),
        (dict(hardness_strength=-1.0), ValueError, "hardness_strength: expected .* >= 0, got -1.0"),
        (dict(mask=M.float()), TypeError, r"mask: expected a bool tensor, got torch.float32"),
        (dict(mask=M[:3]), ValueError, r"mask: expected shape \[4, 4\], got \[3, 4\]"),
        (
            dict(mask={"doc_to_query": M[:, :1]}, directions=ALL),
            ValueError,
            r"mask\['doc_to_query'\]: expected shape \[4, 4\], got \[4, 1\]",
        ),
        (dict(mask=M[0, 0]), ValueError, r"mask: expected shape \[4, 4\], got \[\]"),
        (dict(dim_weights=1.0), TypeError, r"dim_weights: expected a sequence, got float"),
        (dict(mask={"doc_to_doc": M}), ValueError, r"mask: expected one of 'query_to_doc'"),
        (dict(dim_weights=(1.0,)), ValueError, r"dim_weights: expected shape \[2\], got \[1\]"),
        (dict(reduction="avg"), ValueError, r"reduction: expected one of 'mean', .* got 'avg'"),
    ],
)
def test_bad_input(kwargs, error, message):
    arguments = dict(queries=Q, documents=P, dims=(4, 8)) | kwargs
    with pytest.raises(error, match=message):
        matryoshka_info_nce(**arguments)
