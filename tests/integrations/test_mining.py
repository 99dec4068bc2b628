"""mine_hard_negatives: the rows that sentence-transformers mines, from an index."""

# ruff: noqa: E402
# what may not be installed is asked for first

import random

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

from sentence_transformers import util

from mrl_fast import MatryoshkaIndex
from mrl_fast.integrations.sentence_transformers import mine_hard_negatives
from tests.helpers.mining import WIDTH, PairScorer, assert_same, bags, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def dataset():
    """200 rows of 150 anchors, of which one has four positives and one has a row twice; a positive
    belongs to two anchors."""
    anchors, positives = bags(150, seed=1), bags(200, seed=2)
    anchors += [*anchors[:47], *[anchors[60]] * 3]
    positives[10] = positives[11]
    positives[150], anchors[151] = positives[0], anchors[1]
    return datasets.Dataset.from_dict(
        {"extra": [*range(200)], "question": anchors, "answer": positives}
    )


COLUMNS = dict(anchor_column_name="question", positive_column_name="answer")


def both(dataset, model, *, index=None, seed=0, **options):
    options = COLUMNS | dict(verbose=False) | options
    random.seed(seed)
    theirs = util.mine_hard_negatives(dataset, model, **options)
    after = random.random()
    random.seed(seed)
    ours = mine_hard_negatives(dataset, model, **options, index=index)
    assert random.random() == after  # as many draws
    assert_same(ours, theirs)
    return ours


OPTIONS = {
    "default": {},
    "range": dict(range_min=2, range_max=30, num_negatives=7),
    "max_score": dict(max_score=0.3),
    "min_score": dict(min_score=0.35, num_negatives=12),
    "absolute": dict(absolute_margin=0.05),
    "zero margin": dict(absolute_margin=0, range_max=20),
    "relative": dict(relative_margin=0.05),
    "all limits": dict(
        max_score=0.5, min_score=0.1, absolute_margin=-0.3, relative_margin=-0.9, range_min=1
    ),
    "random": dict(sampling_strategy="random", range_max=40, num_negatives=5),
    "random of few": dict(sampling_strategy="random", range_max=12, min_score=0.4),
    "prompts": dict(query_prompt="w7 w8 ", corpus_prompt="w9 "),
    "prompt name": dict(query_prompt_name="asked", corpus_prompt_name="asked"),
    "corpus": dict(corpus=bags(300, seed=5)),
    "corpus of some positives": dict(corpus=[*bags(80, seed=2), *bags(20, seed=2)]),
    "more than there are": dict(range_max=500, num_negatives=220),
    "batches": dict(faiss_batch_size=7, batch_size=3),
    "faiss": dict(use_faiss=True),
}
FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_sentence_transformers(options, dataset, model):
    assert len(both(dataset, model, **options, output_scores=True)) > 0


@pytest.mark.parametrize("output_scores", [False, True])
@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("options", ["range", "min_score", "all limits", "random of few"])
def test_every_format(options, output_format, output_scores, dataset, model):
    options = OPTIONS[options] | dict(output_format=output_format, output_scores=output_scores)
    both(dataset, model, **options)


@pytest.mark.parametrize("sampling", ["top", "random"])
@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize(
    "options",
    [{}, dict(min_score=0.2), dict(relative_margin=0.1, max_score=0.9), dict(absolute_margin=0.2)],
)
def test_a_cross_encoder_scores_again(options, output_format, sampling, dataset, model):
    ours, theirs = PairScorer(), PairScorer()
    options = options | dict(sampling_strategy=sampling, output_format=output_format)
    options |= COLUMNS | dict(output_scores=True, verbose=False, range_max=25)
    random.seed(1)
    expected = util.mine_hard_negatives(dataset, model, cross_encoder=theirs, **options)
    random.seed(1)
    found = mine_hard_negatives(dataset, model, cross_encoder=ours, **options)
    assert_same(found, expected)
    assert ours.pairs < theirs.pairs or not theirs.pairs  # positives are scored once


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_other_similarities(similarity, dataset):
    model = tiny_model(similarity)
    for options in ({}, dict(absolute_margin=0.1), dict(relative_margin=0.1, min_score=-1.2)):
        both(dataset, model, **options, output_scores=True, num_negatives=5)


def test_positives_may_stay(dataset, model):
    options = dict(include_positives=True, output_scores=True, num_negatives=6)
    both(dataset, model, **options, output_format="n-tuple")
    with pytest.warns(UserWarning, match="output_format: 'triplet' is taken as 'n-tuple'"):
        mined = mine_hard_negatives(dataset, model, **COLUMNS, **options, verbose=False)
    assert mined.column_names[-2:] == ["negative_6", "scores"]


def test_deprecated_options(dataset, model):
    cases = {
        "as_triplets": (dict(as_triplets=False), dict(output_format="n-tuple")),
        "margin": (dict(margin=0.1), dict(absolute_margin=0.1)),
        "n-tuple-scores": (
            dict(output_format="n-tuple-scores"),
            dict(output_format="n-tuple", output_scores=True),
        ),
    }
    for old, (given, meant) in cases.items():
        with pytest.warns(FutureWarning, match=f"{old}.* is deprecated: pass") as caught:
            mined = mine_hard_negatives(dataset, model, **COLUMNS, **given, verbose=False)
        assert caught[0].filename == __file__
        assert_same(
            mined, util.mine_hard_negatives(dataset, model, **COLUMNS, **meant, verbose=False)
        )


def test_columns_are_the_first_two(model):
    pairs = datasets.Dataset.from_dict({"q": bags(30, 1), "a": bags(30, 2), "rest": [0] * 30})
    assert_same(
        mine_hard_negatives(pairs, model, verbose=False),
        util.mine_hard_negatives(pairs, model, verbose=False),
    )


def test_beyond_2048_candidates(model):
    """FAISS on a GPU returns at most 2,048."""
    pairs = datasets.Dataset.from_dict({"q": bags(20, 1), "a": bags(20, 2)})
    options = dict(corpus=bags(4000, 7), range_min=2500, num_negatives=600, use_faiss=True)
    mined = both(pairs, model, anchor_column_name="q", positive_column_name="a", **options)
    assert len(mined) == 20 * 600
    least = dict(corpus=bags(4000, 7), range_max=3990, min_score=0.0, sampling_strategy="random")
    both(pairs, model, anchor_column_name="q", positive_column_name="a", **least)


@pytest.mark.parametrize(
    "index",
    [
        dict(dims=(8, WIDTH), metric="cosine"),
        dict(dims=(WIDTH,), metric="ip", codes="bits"),
        dict(dims=(WIDTH,), metric="cosine", prefix_dtype="int8"),
    ],
    ids=["nested", "codes", "int8 prefix"],
)
def test_an_index_is_filled_once(index, dataset, model, monkeypatch):
    corpus = bags(300, seed=5)
    index = MatryoshkaIndex(**index)
    first = both(dataset, model, index=index, corpus=corpus, absolute_margin=0.1)
    assert len(index) == len({*corpus, *dataset["answer"]})
    for place in (0, 299, 300):
        text = [*dict.fromkeys([*corpus, *dataset["answer"]])][place]
        expected = torch.from_numpy(model.encode_document([text], normalize_embeddings=True))
        torch.testing.assert_close(index.reconstruct([place]), expected)
    monkeypatch.setattr(model, "encode_document", None)  # only queries are encoded
    options = COLUMNS | dict(corpus=corpus, absolute_margin=0.1, verbose=False)
    assert_same(mine_hard_negatives(dataset, model, **options, index=index), first)


def test_searches_are_plain(dataset, model, monkeypatch):
    index, asked = MatryoshkaIndex((8, WIDTH)), []
    search = MatryoshkaIndex.search
    monkeypatch.setattr(
        MatryoshkaIndex,
        "search",
        lambda self, q, k: asked.append((len(q), k)) or search(self, q, k),
    )
    both(dataset, model, index=index, faiss_batch_size=64)  # by stages where it is tuned
    # 3 negatives, and twice the 4 positives that a query has at most
    assert asked == [(64, 11), (64, 11), (22, 11)]


def test_vectors_may_be_whole_and_queries_prefixes(dataset, model):
    """An index of whole vectors, and a model that truncates: as if it truncated both."""
    index = MatryoshkaIndex((8, WIDTH))
    mine_hard_negatives(dataset, model, **COLUMNS, index=index, verbose=False)
    short = tiny_model()
    short.truncate_dim = 8
    found = mine_hard_negatives(
        dataset, short, **COLUMNS, index=index, verbose=False, output_scores=True, max_score=0.9
    )
    expected = util.mine_hard_negatives(
        dataset, short, **COLUMNS, verbose=False, output_scores=True, max_score=0.9
    )
    assert_same(found, expected)


def test_embeddings_are_kept_in_their_files(dataset, model, tmp_path, monkeypatch):
    for first, second in (
        (util.mine_hard_negatives, mine_hard_negatives),
        (mine_hard_negatives,) * 2,
    ):
        folder = tmp_path / first.__module__
        options = COLUMNS | dict(cache_folder=str(folder), verbose=False, corpus_prompt="w1 ")
        expected = first(dataset, model, **options)
        assert len([*folder.iterdir()]) == 2
        with monkeypatch.context() as patched:
            for name in ("encode_query", "encode_document"):
                patched.setattr(model, name, None)
            assert_same(second(dataset, model, **options), expected)
            assert_same(util.mine_hard_negatives(dataset, model, **options), expected)
    (file,) = folder.glob("query*")
    np.save(file, np.zeros((3, WIDTH), np.float32))
    with pytest.raises(
        ValueError, match=f"cache_folder: expected .* embeddings in {file}, got shape"
    ):
        mine_hard_negatives(dataset, model, **options)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"cache_folder: expected embeddings in {file}"):
        mine_hard_negatives(dataset, model, **options)


def test_processes_are_those_of_the_model(dataset, model, monkeypatch):
    events = []
    encode = {name: getattr(model, name) for name in ("encode_query", "encode_document")}
    for name, function in encode.items():
        monkeypatch.setattr(
            model, name,
            lambda texts, pool, f=function, n=name, **o: events.append((n, pool)) or f(texts, **o),
        )  # fmt: skip
    monkeypatch.setattr(model, "start_multi_process_pool", lambda devices: f"pool of {devices}")
    monkeypatch.setattr(
        model, "stop_multi_process_pool", lambda pool: events.append(("stop", pool))
    )
    scorer = PairScorer()
    options = COLUMNS | dict(verbose=False, cross_encoder=scorer, max_score=0.9)
    mine_hard_negatives(dataset, model, **options, use_multi_process=["cpu", "cpu"])
    pool = "pool of ['cpu', 'cpu']"
    assert events == [
        ("encode_document", pool),
        ("stop", pool),
        ("encode_query", pool),
        ("stop", pool),
    ]
    assert scorer.pools[-1] == ("stopped", ("pool", ["cpu", "cpu"]))
    assert all(pool == ("pool", ["cpu", "cpu"]) for pool in scorer.pools[:-1])


def test_what_is_said(dataset, model, capsys):
    mine_hard_negatives(dataset, model, **COLUMNS, max_score=0.2, num_negatives=4)
    out = capsys.readouterr().out.splitlines()
    mined = mine_hard_negatives(
        dataset, model, **COLUMNS, max_score=0.2, num_negatives=4, output_scores=True, verbose=False
    )
    assert capsys.readouterr().out == ""
    scores = np.array(mined["scores"])
    count, mean = (line.split() for line in out[1:3])
    assert count[2] == f"{len(mined):,}"
    assert [float(mean[2]), float(mean[3])] == pytest.approx(
        [scores[:, 1].mean(), (scores[:, 0] - scores[:, 1]).mean()], abs=1e-4
    )
    assert [line.split()[0] for line in out[:9]] == [
        "score", "count", "mean", "std", "min", "25%", "median", "75%", "max",
    ]  # fmt: skip
    assert out[9].startswith("max_score=0.2 left out ")
    mine_hard_negatives(dataset, model, **COLUMNS, max_score=-1.5)  # nothing is left
    assert "nan" in (out := capsys.readouterr().out) and " have fewer than 3 negatives" in out


BAD = {
    "dataset: expected a datasets.Dataset": (dict(dataset=[("a", "b")]), TypeError),
    "dataset: expected at least one row": (dict(dataset="empty"), ValueError),
    "dataset: expected at least two columns": (dict(dataset="one"), ValueError),
    "anchor_column_name: expected one of": (dict(anchor_column_name="query"), ValueError),
    "positive_column_name: expected another": (dict(positive_column_name="question"), ValueError),
    r"dataset\['extra'\]\[0\]: expected a str": (dict(positive_column_name="extra"), TypeError),
    "corpus: expected a sequence": (dict(corpus="text"), TypeError),
    r"corpus\[1\]: expected a str": (dict(corpus=["a", None]), TypeError),
    "range_min: expected an integer >= 0, got -1": (dict(range_min=-1), ValueError),
    "range_min: expected less than range_max=5": (dict(range_min=5, range_max=5), ValueError),
    "num_negatives: expected at most the 2 candidates": (
        dict(range_min=3, range_max=5), ValueError,
    ),
    "num_negatives: expected an integer >= 1": (dict(num_negatives=0), ValueError),
    "max_score: expected a number or None, got str": (dict(max_score="1"), TypeError),
    "relative_margin: expected a number or None, got nan": (
        dict(relative_margin=float("nan")), ValueError,
    ),
    "sampling_strategy: expected one of": (dict(sampling_strategy="best"), ValueError),
    "output_format: expected one of": (dict(output_format="pairs"), ValueError),
    "faiss_batch_size: expected an integer >= 1": (dict(faiss_batch_size=0), ValueError),
    "index: expected a MatryoshkaIndex": (dict(index=[]), TypeError),
    "index: expected a metric of cosine, ip": (
        dict(index=MatryoshkaIndex((8,), metric="l2")), ValueError,
    ),
    "index: expected a width of 24": (dict(index=MatryoshkaIndex((8,))), ValueError),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, dataset, model):
    options, error = BAD[message]
    given = {
        "empty": datasets.Dataset.from_dict({"question": [], "answer": []}),
        "one": datasets.Dataset.from_dict({"question": ["a"]}),
    }
    options = COLUMNS | options
    data = options.pop("dataset", dataset)
    if isinstance(data, str):
        data, options = given[data], {}
    with pytest.raises(error, match=message):
        mine_hard_negatives(data, model, **options, verbose=False)


def test_an_index_of_other_texts(dataset, model):
    index = MatryoshkaIndex((WIDTH,))
    index.add(torch.randn(5, WIDTH))
    with pytest.raises(ValueError, match="are missing, the first 5"):
        mine_hard_negatives(dataset, model, **COLUMNS, verbose=False, index=index)
    index.add(torch.randn(500, WIDTH))
    with pytest.raises(ValueError, match="pass the corpus that it was made of"):
        mine_hard_negatives(dataset, model, **COLUMNS, verbose=False, index=index)
    assert len(index) == 505


def test_other_similarities_are_refused(dataset):
    with pytest.raises(ValueError, match="model: expected a similarity of cosine, dot, euclidean"):
        mine_hard_negatives(dataset, tiny_model("manhattan"), **COLUMNS, verbose=False)


def test_a_cross_encoder_of_classes(dataset, model):
    class Classes(PairScorer):
        def predict(self, pairs, **options):
            return super().predict(pairs, **options)[:, None].expand(-1, 3)

    with pytest.raises(ValueError, match="cross_encoder: expected one score a pair"):
        mine_hard_negatives(
            dataset, model, **COLUMNS, verbose=False, cross_encoder=Classes(), max_score=0.5
        )
