"""The Matryoshka losses for sentence-transformers, against that library's own on a tiny encoder:
values, gradients, losses with no fused form, bad input."""

# ruff: noqa: F401, F811
# fixtures are imported

import copy
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as originals
from sentence_transformers.util import dot_score, euclidean_sim

from mrl_fast.integrations.sentence_transformers import Matryoshka2dLoss, MatryoshkaLoss
from mrl_fast.integrations.sentence_transformers.fused import fused_form
from tests.helpers.tiny_encoder import (
    ALL,
    CACHED,
    DIMS,
    MNRL,
    ROWS,
    assert_same_step,
    encoder,
    encoder_in,
    guide,
    one_thread,
    texts,
)

RANKING = {
    "default": {},
    "dot": dict(similarity_fct=dot_score, scale=15),
    "clip": dict(directions=ALL[::2], partition_mode="per_direction"),
    "gte": dict(
        directions=(*ALL, "query_to_doc"), hardness_mode="all_negatives", hardness_strength=3.0
    ),
    "hard": dict(hardness_mode="hard_negatives", hardness_strength=5.0),
    "in-batch": dict(hardness_mode="in_batch_negatives", hardness_strength=9.0),
}


@pytest.mark.parametrize("options", RANKING.values(), ids=RANKING)
@pytest.mark.parametrize("kind", [MNRL, CACHED])
def test_ranking_losses(kind, options, encoder):
    if kind is CACHED:
        options = options | dict(mini_batch_size=5)
    loss_fn = assert_same_step(
        lambda m: kind(m, **options), encoder, matryoshka_weights=[2, 1, 0.5]
    )
    assert fused_form(loss_fn.loss) is not None
    assert [*loss_fn.per_dim] == [*DIMS] and all(v > 0 for v in loss_fn.per_dim.values())


GIST = {
    "default": {},
    "absolute": dict(margin=0.05, temperature=0.05),
    "relative": dict(margin_strategy="relative", margin=0.1, contrast_anchors=False),
    "neither": dict(contrast_anchors=False, contrast_positives=False),
    "lenient": dict(margin=-0.2),  # above 1: not even a text itself is left out
}


@pytest.mark.parametrize("options", GIST.values(), ids=GIST)
@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("kind", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_gist_losses(kind, columns, options, encoder, guide):
    if kind.startswith("Cached"):
        options = options | dict(mini_batch_size=5)
    inner_of = lambda m: getattr(originals, kind)(m, guide, **options)  # noqa: E731
    assert fused_form(assert_same_step(inner_of, encoder, columns=columns).loss) is not None


def test_texts_that_the_guide_cannot_tell_apart(encoder, guide):
    """Equal cosines are no false negatives, whatever the last digit of a product is."""
    model = copy.deepcopy(encoder).eval()
    inner = originals.GISTEmbedLoss(model, guide, temperature=0.1)
    anchors, positives = texts(ROWS, 2)
    positives = [positives[i // 2] for i in range(ROWS)]
    anchors[3] = positives[3]
    features = [model.preprocess(column) for column in (anchors, positives)]
    values = [
        nested(model, inner, DIMS)([dict(f) for f in features], None)
        for nested in (MatryoshkaLoss, originals.MatryoshkaLoss)
    ]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


def test_gist_takes_two_or_three_columns(encoder, guide):
    features = [encoder.preprocess(column) for column in texts(ROWS, 4)]
    for nested in (MatryoshkaLoss, originals.MatryoshkaLoss):
        loss_fn = nested(encoder, originals.GISTEmbedLoss(encoder, guide), DIMS)
        with pytest.raises(ValueError, match="xpected 2 or 3"):
            loss_fn([dict(f) for f in features], None)


def test_a_guide_with_another_tokenizer(encoder, guide, tmp_path):
    other = encoder_in(tmp_path, width=32, seed=2).eval()
    vocabulary = other.tokenizer.get_vocab()
    other.tokenizer.add_tokens(["more"])
    assert other.tokenizer.get_vocab() != vocabulary
    loss_fn = assert_same_step(lambda m: originals.GISTEmbedLoss(m, other), encoder)
    assert loss_fn.loss.must_retokenize


LOOPS = {
    "triplet": (originals.TripletLoss, {}),
    "similarity": (MNRL, dict(similarity_fct=euclidean_sim)),
    "cached": (CACHED, dict(similarity_fct=euclidean_sim, mini_batch_size=5)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_losses_with_no_fused_form_run_in_a_loop(name, encoder):
    kind, options = LOOPS[name]
    with pytest.warns(UserWarning, match=f"{kind.__name__} has no fused form: it runs once for"):
        loss_fn = assert_same_step(
            lambda m: kind(m, **options), encoder, matryoshka_weights=[2, 1, 0.5]
        )
    total = sum(w * loss_fn.per_dim[d] for d, w in zip(DIMS, [2, 1, 0.5], strict=True))
    features = [loss_fn.model.preprocess(column) for column in texts(ROWS, 3)]
    torch.manual_seed(7)
    torch.testing.assert_close(loss_fn(features, None).detach(), total)  # and no second warning


def test_a_subclass_or_a_guide_that_is_the_model_is_not_what_is_fused(encoder):
    class Squared(MNRL):
        def compute_loss_from_embeddings(self, embeddings, labels):
            return super().compute_loss_from_embeddings(embeddings, labels).square()

    for inner_of in (Squared, lambda m: originals.GISTEmbedLoss(m, m)):
        with pytest.warns(UserWarning, match="has no fused form"):
            assert_same_step(inner_of, encoder)


def test_labels_of_full_width_are_cut_as_the_embeddings(encoder):
    with pytest.warns(UserWarning, match="MSELoss has no fused form"):
        assert_same_step(originals.MSELoss, encoder, columns=1, labels=torch.randn(ROWS, 48))


def test_2d_needs_layers():
    model = SentenceTransformer(modules=[torch.nn.Identity()])
    with pytest.raises(ValueError, match="model: expected one whose first module .* got Identity"):
        Matryoshka2dLoss(model, MNRL(model), list(DIMS))


@pytest.mark.parametrize("n_dims", [1, -1])
def test_2d(n_dims, encoder):
    nested = dict(nested=Matryoshka2dLoss, n_dims_per_step=n_dims, n_layers_per_step=1)
    loss_fn = assert_same_step(MNRL, encoder, **nested, layer_weighting="log")
    original = originals.Matryoshka2dLoss(encoder, MNRL(encoder), DIMS, layer_weighting="log")
    assert loss_fn.get_config_dict() == original.get_config_dict() | dict(n_dims_per_step=n_dims)
    assert loss_fn.citation == original.citation
    assert len(loss_fn.per_dim) == n_dims % 4
    model = loss_fn.model.eval()
    features = [model.preprocess(column) for column in texts(ROWS, 2)]
    last_layer = MatryoshkaLoss(model, MNRL(model), [*loss_fn.per_dim])
    last_layer([dict(f) for f in features], None)
    random.seed(7)
    loss_fn(features, None)
    torch.testing.assert_close(loss_fn.per_dim, last_layer.per_dim)


def test_evaluation_makes_no_graph(encoder):
    for inner_of in (MNRL, CACHED):
        values = []
        for nested in (MatryoshkaLoss, originals.MatryoshkaLoss):
            model = copy.deepcopy(encoder).eval()
            features = [model.preprocess(column) for column in texts(ROWS, 2)]
            with torch.no_grad():
                values.append(nested(model, inner_of(model), DIMS)(features, None))
        assert not values[0].requires_grad
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


def test_one_pair_and_dims_in_any_order(encoder, guide):
    """A guide that hides all there is but the positive; dims given twice and unsorted."""
    model = copy.deepcopy(encoder)
    dims, weights = [24, 48, 8, 24], [1.0, 2.0, 3.0, 4.0]
    loss_fn = MatryoshkaLoss(model, originals.GISTEmbedLoss(model, guide), dims, weights)
    assert (loss_fn.matryoshka_dims, loss_fn.matryoshka_weights) == ((48, 24, 24, 8), (2, 1, 4, 3))
    loss = loss_fn([model.preprocess(column) for column in texts(1, 2)], None)
    loss.backward()
    assert loss == 0 and all(
        p.grad.isfinite().all() for p in model[0].parameters() if p.grad is not None
    )
    features = [model.eval().preprocess(column) for column in texts(ROWS, 2)]
    ours, theirs = (
        nested(model, MNRL(model), dims, weights)
        for nested in (MatryoshkaLoss, originals.MatryoshkaLoss)
    )
    values = [loss_fn([dict(f) for f in features], None) for loss_fn in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    assert [*ours.per_dim] == [8, 24, 48]
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.citation == theirs.citation and isinstance(ours, originals.MatryoshkaLoss)


def test_other_precisions(encoder):
    """Autocast is as near to fp32 as the original's; float64 is not rounded to fp32."""
    model = copy.deepcopy(encoder).eval()
    features = [model.preprocess(column) for column in texts(ROWS, 2)]

    def value(nested):
        return nested(model, MNRL(model), DIMS)([dict(f) for f in features], None).detach()

    exact = value(originals.MatryoshkaLoss)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = value(MatryoshkaLoss), value(originals.MatryoshkaLoss)
    assert ours.dtype == torch.float32
    assert abs(ours - exact) <= 2 * abs(theirs - exact) + 0.02
    for kind in ("GISTEmbedLoss", "CachedGISTEmbedLoss"):
        wide = copy.deepcopy(encoder).double().eval()
        values = []
        for nested in (MatryoshkaLoss, originals.MatryoshkaLoss):
            inner = getattr(originals, kind)(wide, copy.deepcopy(encoder).eval(), temperature=0.1)
            loss_fn = nested(wide, inner, DIMS)
            values.append(loss_fn([dict(f) for f in features], None).detach())
        torch.testing.assert_close(*values)


# --- one cached loss of several nested ones ---


def test_nested_losses_that_share_a_cached_loss_keep_their_dims(encoder):
    model = copy.deepcopy(encoder).eval()
    features = [model.preprocess(column) for column in texts(ROWS, 2)]

    def value(loss_fn):
        model.zero_grad()
        loss = loss_fn([dict(f) for f in features], None)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for scale, fused in ((20, True), (3, False)):
        similarity = {} if fused else dict(similarity_fct=euclidean_sim)

        def cached(scale=scale, similarity=similarity):
            return CACHED(model, mini_batch_size=5, scale=scale, **similarity)

        inner = cached()
        wide = MatryoshkaLoss(model, inner, [48, 24])
        narrow = MatryoshkaLoss(model, inner, [8])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of losses that have no fused form
            for dims, loss_fn in (([48, 24], wide), ([8], narrow), ([48, 24], wide)):
                expected = value(originals.MatryoshkaLoss(model, cached(), dims))
                for ours, theirs in zip(value(loss_fn), expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
                assert set(loss_fn.per_dim) == set(dims)
            torch.testing.assert_close(value(inner), value(cached()))  # itself is not nested


@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss",
                                  "CachedMultipleNegativesRankingLoss"])  # fmt: skip
def test_losses_are_copied_and_pickled(encoder, kind):
    model = copy.deepcopy(encoder).eval()
    features = [model.preprocess(column) for column in texts(ROWS, 2)]
    loss_fn = MatryoshkaLoss(model, getattr(originals, kind)(model), DIMS)
    expected = loss_fn([dict(f) for f in features], None).detach()
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert other.loss.model is other.model is not model
        assert torch.equal(other([dict(f) for f in features], None).detach(), expected)


# --- bad input ---


def test_bad_input(encoder):
    inner = MNRL(encoder)
    for dims, weights, message in (
        ([], None, "at least one dimension in matryoshka_dims"),
        ([0, 48], None, "All dimensions passed to a matryoshka loss must be > 0"),
        ([8, 48], [1.0], "matryoshka_weights must be the same length"),
        ([8, 49], None, "matryoshka_dims cannot exceed the model's embedding dimension of 48"),
    ):
        with pytest.raises(ValueError, match=message):
            MatryoshkaLoss(encoder, inner, dims, weights)
    (column,) = texts(ROWS, 1)
    loss_fn = MatryoshkaLoss(encoder, inner, DIMS)
    with pytest.raises(ValueError, match="sentence_features: expected at least 2 columns, got 1"):
        loss_fn([encoder.preprocess(column)], None)
    loss_fn.matryoshka_dims = (96, 48, 8)
    with pytest.raises(
        ValueError, match="matryoshka_dims: expected widths of at most 48 .* got 96"
    ):
        loss_fn([encoder.preprocess(column), encoder.preprocess(column)], None)


def test_the_losses_alone_need_the_library():
    code = """
import sys
sys.modules["sentence_transformers"] = None
from mrl_fast.integrations import sentence_transformers as integration
print(integration.semantic_search)
try:
    integration.MatryoshkaLoss
except ImportError as error:
    print(error)
try:
    integration.TripletLoss
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'mrl-fast[sentence-transformers]'" in done.stdout
    assert "has no attribute 'TripletLoss'" in done.stdout
