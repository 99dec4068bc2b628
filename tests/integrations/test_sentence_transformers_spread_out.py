"""GlobalOrthogonalRegularizationLoss over prefixes: the original on truncated embeddings."""

# ruff: noqa: E402
# what may not be installed is asked for first

import pytest
import torch

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score, manhattan_sim

from mrl_fast.integrations.sentence_transformers import GlobalOrthogonalRegularizationLoss
from tests.helpers.mining import WIDTH, bags, tiny_model

OPTIONS = {
    "default": {},
    "sum": dict(aggregation="sum", mean_weight=0.5),
    "second moment": dict(mean_weight=None, second_moment_weight=3.0),
    "dot": dict(similarity_fct=dot_score, second_moment_weight=0),
    "another similarity": dict(similarity_fct=manhattan_sim),
}


def embeddings():
    g = torch.Generator().manual_seed(0)
    middle = torch.randn(48, generator=g)
    return [(middle + torch.randn(20, 48, generator=g)).requires_grad_() for _ in range(3)]


def assert_same(ours, theirs, xs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=1e-7)
        for found, expected in zip(
            torch.autograd.grad(ours[name], xs, retain_graph=True),
            torch.autograd.grad(theirs[name], xs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_original(options):
    xs = embeddings()
    ours, theirs = (
        kind(None, **options)  # pyright: ignore[reportArgumentType]
        for kind in (GlobalOrthogonalRegularizationLoss, losses.GlobalOrthogonalRegularizationLoss)
    )
    assert_same(ours.compute_loss_from_embeddings(xs), theirs.compute_loss_from_embeddings(xs), xs)
    assert ours.get_config_dict() == theirs.get_config_dict()


@pytest.mark.parametrize("similarity", [cos_sim, dot_score])
def test_prefixes(similarity):
    xs, dims, weights = embeddings(), (48, 8, 24), (1.0, 0.5, 2.0)
    ours = GlobalOrthogonalRegularizationLoss(
        None, similarity, matryoshka_dims=dims, matryoshka_weights=weights
    )
    original = losses.GlobalOrthogonalRegularizationLoss(None, similarity)  # pyright: ignore
    parts = [original.compute_loss_from_embeddings([x[:, :d] for x in xs]) for d in dims]
    theirs = {
        name: sum(w * part[name] for w, part in zip(weights, parts, strict=True))
        for name in parts[0]
    }
    assert_same(ours.compute_loss_from_embeddings(xs), theirs, xs)
    assert ours.get_config_dict()["matryoshka_dims"] == (8, 24, 48)
    assert ours.get_config_dict()["matryoshka_weights"] == (0.5, 2.0, 1.0)


def test_texts():
    model = tiny_model()
    features = [model.preprocess(bags(9, seed)) for seed in (1, 2)]
    found = GlobalOrthogonalRegularizationLoss(model, matryoshka_dims=(8, WIDTH))(
        [dict(f) for f in features]
    )
    originals = losses.GlobalOrthogonalRegularizationLoss(model)
    columns = [model(dict(f))["sentence_embedding"] for f in features]
    for name in found:
        expected = sum(
            originals.compute_loss_from_embeddings([x[:, :d] for x in columns])[name]
            for d in (8, WIDTH)
        )
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(matryoshka_weights=(1,)), "matryoshka_weights: expected None without"),
        (dict(matryoshka_dims=(4, 8), matryoshka_weights=(1,)), "matryoshka_weights: expected 2"),
        (dict(matryoshka_dims=(4, 4)), "matryoshka_dims"),
        (
            dict(matryoshka_dims=(4,), similarity_fct=manhattan_sim),
            "matryoshka_dims: expected None",
        ),
        (dict(mean_weight=0, second_moment_weight=None), "At least one"),
        (dict(aggregation="max"), "aggregation must be"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        GlobalOrthogonalRegularizationLoss(None, **options)
