"""semantic_search: sentence-transformers' results, from a corpus or an index."""

import numpy as np
import pytest
import torch

from mrl_fast import MatryoshkaIndex, funnel_search, semantic_search
from mrl_fast.search.semantic import SIMILARITIES


def vectors(rows, seed=0, width=96):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def cosines(queries, corpus):
    normalize = torch.nn.functional.normalize
    return normalize(queries.double(), dim=1) @ normalize(corpus.double(), dim=1).T


def split(results):
    ids = [[hit["corpus_id"] for hit in hits] for hits in results]
    return ids, torch.tensor([[hit["score"] for hit in hits] for hits in results])


def test_a_table_by_hand():
    corpus = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 0.0], [0.0, 0.0]])
    query = torch.tensor([1.0, 0.0])  # one query may be a vector
    half = pytest.approx(0.5**0.5)
    expected = [(0, 1.0), (3, 1.0), (2, half), (1, 0.0), (4, 0.0)]
    (hits,) = semantic_search(query, corpus)
    assert [(hit["corpus_id"], hit["score"]) for hit in hits] == expected
    assert all(type(hit["corpus_id"]) is int and type(hit["score"]) is float for hit in hits)
    (hits,) = semantic_search(query, corpus, top_k=2, score_function="dot_score")
    assert hits == [{"corpus_id": 2, "score": 3.0}, {"corpus_id": 0, "score": 1.0}]
    (hits,) = semantic_search(query, corpus, top_k=3, score_function="euclidean_sim")
    assert hits == [
        {"corpus_id": 0, "score": 0.0},
        {"corpus_id": 3, "score": 0.0},
        {"corpus_id": 4, "score": -1.0},
    ]


@pytest.mark.parametrize("name", ["cos_sim", "dot_score", "euclidean_sim"])
@pytest.mark.parametrize("top_k", [7, 500])  # more than there are
def test_equals_sentence_transformers(name, top_k):
    util = pytest.importorskip("sentence_transformers.util")
    queries, corpus = vectors(23, seed=1), vectors(300)
    options = dict(query_chunk_size=10, corpus_chunk_size=70, top_k=top_k)
    theirs = util.semantic_search(queries, corpus, score_function=getattr(util, name), **options)
    for function in (name, getattr(util, name)):
        ours = semantic_search(queries, corpus, score_function=function, **options)
        (ids, scores), (their_ids, their_scores) = split(ours), split(theirs)
        torch.testing.assert_close(scores, their_scores, atol=2e-5, rtol=1e-5)
        swapped = torch.tensor(ids) != torch.tensor(their_ids)  # where their rounding ties
        assert [sorted(row) for row in ids] == [sorted(row) for row in their_ids]
        assert swapped.float().mean() < 0.01


def test_default_is_theirs():
    util = pytest.importorskip("sentence_transformers.util")
    queries, corpus = vectors(4, seed=1).numpy(), list(vectors(50).numpy())
    ours, theirs = semantic_search(queries, corpus), util.semantic_search(queries, corpus)
    assert split(ours)[0] == split(theirs)[0] and len(ours[0]) == 10


def test_ties():
    util = pytest.importorskip("sentence_transformers.util")
    generator = torch.Generator().manual_seed(0)
    queries, corpus = (torch.randint(-1, 2, (n, 6), generator=generator).float() for n in (9, 200))
    queries[:, 0] = corpus[:, 0] = 1.0  # no vector is zero
    dot = dict(score_function="dot_score", top_k=20)
    ids, scores = split(semantic_search(queries, corpus, **dot))
    expected = (queries @ corpus.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(torch.tensor(ids), expected.indices[:, :20])
    theirs = util.semantic_search(queries, corpus, top_k=20, score_function=util.dot_score)
    assert torch.equal(scores, split(theirs)[1])


@pytest.mark.parametrize(("metric", "name"), {m: name for name, m in SIMILARITIES.items()}.items())
def test_an_index_is_a_corpus(metric, name):
    queries, corpus = vectors(5, seed=1), vectors(300)
    index = MatryoshkaIndex((16, 96), metric=metric)
    index.add(corpus, ids=torch.arange(300) * 7)
    expected = semantic_search(queries, corpus, score_function=name)
    for results in (
        semantic_search(queries, index),
        semantic_search(queries, index, score_function=name),
        semantic_search(queries, index, stages=[(16, 300), (96, 10)]),
    ):
        ids, scores = split(results)
        assert ids == [[7 * i for i in row] for row in split(expected)[0]]
        torch.testing.assert_close(scores, split(expected)[1], atol=1e-6, rtol=1e-5)


def test_an_index_is_searched_among_allowed_ids():
    queries, corpus = vectors(5, seed=1), vectors(300)
    index = MatryoshkaIndex((16, 96))
    index.add(corpus)
    few = torch.arange(7, 300, 13)
    expected = semantic_search(queries, corpus[few])
    for options in ({}, dict(stages=[(16, 300), (96, 10)])):
        ids, scores = split(semantic_search(queries, index, allowed=few, **options))
        assert ids == [few[row].tolist() for row in split(expected)[0]]
        torch.testing.assert_close(scores, split(expected)[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "metric"), [("cosine", "cosine"), ("dot", "ip"), ("euclidean", "l2")]
)
def test_a_models_similarity_is_its_score_function(name, metric):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(modules=[torch.nn.Identity()], similarity_fn_name=name)
    queries, corpus = vectors(5, seed=1), vectors(60)
    found = semantic_search(queries, corpus, score_function=model.similarity)
    assert found == semantic_search(queries, corpus, score_function=metric)
    theirs = library.util.semantic_search(queries, corpus, score_function=model.similarity)
    assert split(found)[0] == split(theirs)[0]
    index = MatryoshkaIndex((16, 96), metric="ip" if metric == "cosine" else "cosine")
    with pytest.raises(ValueError, match=f"score_function: .* got a model's similarity, '{name}'"):
        semantic_search(queries, index, score_function=model.similarity)
    model.similarity_fn_name = "manhattan"
    with pytest.raises(
        ValueError, match="score_function: .* got a model's similarity, 'manhattan'"
    ):
        semantic_search(queries, corpus, score_function=model.similarity)


def test_prefixes():
    queries, corpus = vectors(5, seed=1), vectors(300)
    index = MatryoshkaIndex((16, 96))
    index.add(corpus)
    short = semantic_search(queries[:, :16], corpus[:, :16].contiguous())
    assert semantic_search(queries, corpus, dim=16) == short
    assert semantic_search(queries[:, :16], corpus, dim=16) == short
    for found in (
        semantic_search(queries, index, dim=16),
        semantic_search(queries[:, :16], index),
        semantic_search(queries[:, :16].tolist(), index, dim=16),
    ):
        assert split(found)[0] == split(short)[0]
        torch.testing.assert_close(split(found)[1], split(short)[1], atol=1e-6, rtol=1e-5)
    assert split(short)[0] == cosines(queries[:, :16], corpus[:, :16]).topk(10).indices.tolist()
    stages = [(16, 60), (96, 12)]
    staged = semantic_search(queries, corpus, stages=stages)
    assert semantic_search(queries, index, stages=stages) == staged
    funnel = funnel_search(queries, corpus, [(16, 60), (96, 10)], metric="cosine")
    assert split(staged)[0] == funnel.ids.tolist()
    assert staged != semantic_search(queries, corpus)


def test_kinds():
    queries, corpus = vectors(3, seed=1), vectors(40)
    expected = semantic_search(queries, corpus)
    for convert in (torch.Tensor.numpy, torch.Tensor.tolist, list, lambda x: list(x.numpy())):
        assert semantic_search(convert(queries), convert(corpus)) == expected
    assert split(semantic_search(queries.double(), corpus.double()))[0] == split(expected)[0]
    assert semantic_search(queries[:0], corpus) == []
    assert semantic_search(queries, corpus[:0]) == [[], [], []]
    assert semantic_search(queries, MatryoshkaIndex((16, 96))) == [[], [], []]


def cos_sim(a, b):  # not sentence-transformers'
    return a @ b.T


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(score_function="manhattan_sim"), ValueError, "score_function: expected one of cos"),
        (dict(score_function=cos_sim), ValueError, "score_function: .* got <function cos_sim"),
        (dict(score_function=3), ValueError, "score_function: .* got 3"),
        (dict(score_function=["ip"]), ValueError, r"score_function: .* got \['ip'\]"),
        (dict(allowed=[3]), ValueError, "allowed: expected None where .* not a .*Index, got list"),
        (dict(top_k=0), ValueError, "top_k: expected an integer >= 1, got 0"),
        (dict(query_chunk_size=0), ValueError, "query_chunk_size: expected an integer >= 1"),
        (dict(corpus_chunk_size=1.5), TypeError, "corpus_chunk_size: expected an integer"),
        (dict(dim=16, stages=[(96, 9)]), ValueError, "dim: expected None where stages are given"),
        (dict(stages=[(96, 9)]), ValueError, "stages: expected a last keep of at least top_k=10"),
        (dict(dim=97), ValueError, r"dim: expected an integer in \[1, 96\], got 97"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        semantic_search(vectors(2), vectors(20), **options)


def test_bad_vectors():
    x, index = vectors(20), MatryoshkaIndex((16, 96), metric="ip")
    index.add(x)
    for queries, corpus, error, message in (
        (x[:, :5], x, ValueError, "query_embeddings: expected width 96 and .* got 5 .* dim=5"),
        (x, x.half(), ValueError, "query_embeddings: .* torch.float16 as corpus_emb.*float32"),
        (x * torch.nan, x, ValueError, "query_embeddings: expected finite values"),
        (x, x * torch.inf, ValueError, "expected finite values"),
        (x, x.to_sparse(), TypeError, "corpus_embeddings: expected a dense tensor"),
        (x, x[0], ValueError, r"corpus_embeddings: expected shape \[rows, width\]"),
        (x.int(), x, TypeError, "query_embeddings: expected a floating-point tensor"),
        ([[1.0], [1.0, 2.0]], x, ValueError, "query_embeddings: expected rows of one width"),
        ("text", x, TypeError, "query_embeddings: expected a tensor"),
        (x[:, :5], index, ValueError, r"queries: expected width 96, or of a .*\(16,\), got 5"),
    ):
        with pytest.raises(error, match=message):
            semantic_search(queries, corpus)
    message = "score_function: expected None or 'ip', the metric that .* got 'cos_sim'"
    with pytest.raises(ValueError, match=message):
        semantic_search(x, index, score_function="cos_sim")
    with pytest.raises(ValueError, match=r"dim: expected one of \(16, 96\), got 32"):
        semantic_search(x, index, dim=32)


def test_read_only_arrays_and_slices():
    x = vectors(50).numpy()
    wide = np.concatenate([x, x], axis=1)
    wide.flags.writeable = False
    assert semantic_search(wide[:3, :96], wide[:, :96]) == semantic_search(x[:3], x)
