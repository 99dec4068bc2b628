"""semantic_search by codes: what they rank, and what their candidates are scored by."""

import numpy as np
import pytest
import torch

from mrl_fast import MatryoshkaIndex, semantic_search
from tests.helpers.index_model import vectors

N, DIMS = 2000, (16, 48, 96)
BINARY, EIGHT = ("binary", "ubinary"), ("int8", "uint8")
OPTION = {p: {"codes": "bits"} for p in BINARY} | {p: {"prefix_dtype": "int8"} for p in EIGHT}
X, Q = vectors(N, 96, 0), vectors(12, 96, 1)


def make(precision, rows=X, dims=DIMS, **options):
    index = MatryoshkaIndex(dims, **OPTION[precision], **options)
    index.add(rows)
    return index


def ids(results):
    return [[hit["corpus_id"] for hit in hits] for hits in results]


def scores(results):
    return torch.tensor([[hit["score"] for hit in hits] for hits in results])


def recall(found, right):
    pairs = list(zip(ids(found), ids(right), strict=True))
    return sum(len({*a} & {*b}) for a, b in pairs) / sum(len(b) for _, b in pairs)


@pytest.mark.parametrize("precision", OPTION)
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_candidates_that_are_all_rows_leave_nothing_out(precision, metric):
    right = semantic_search(Q, X, score_function=metric)
    for corpus in (X, make(precision, metric=metric), make(precision, dims=(96,), metric=metric)):
        found = semantic_search(
            Q, corpus, score_function=metric, precision=precision, rescore_multiplier=N // 10
        )
        assert ids(found) == ids(right)
        torch.testing.assert_close(scores(found), scores(right), atol=1e-5, rtol=1e-5)


def decoded(precision, x):
    """What codes of unit vectors stand for, fp64."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    if precision in BINARY:
        return unit.sign()
    scale = unit.abs().amax(dim=1, keepdim=True) / 127
    return (unit / scale).round() * scale


@pytest.mark.parametrize("precision", OPTION)
@pytest.mark.parametrize("multiplier", [1, 2, 8, 20])
def test_recall_is_that_of_the_codes(precision, multiplier):
    right = semantic_search(Q, X)
    queries = decoded("int8", Q)  # which signs of rows are multiplied with too
    by_codes = (queries @ decoded(precision, X).T).topk(10 * multiplier).indices
    reached = torch.tensor(ids(right))[:, :, None] == by_codes[:, None, :]
    options = dict(precision=precision, rescore_multiplier=multiplier)
    found = semantic_search(Q, X, **options)
    expected = reached.any(dim=2).float().mean().item()  # signs: 0.29, 0.43, 0.83, 0.93
    assert recall(found, right) == pytest.approx(expected, abs=0.02)
    if precision in BINARY:  # an index codes all columns too
        assert semantic_search(Q, make(precision), **options) == found
    assert semantic_search(Q, make(precision, dims=(96,)), **options) == found


@pytest.mark.parametrize("precision", OPTION)
def test_without_rescoring_the_best_by_codes_are_left(precision):
    corpus = make(precision, dims=(96,))
    bits = 1 if precision in BINARY else 8
    expected = corpus.search(Q, 10, stages=[(96, bits, 10), (96, 10)])
    found = semantic_search(Q, corpus, precision=precision, rescore=False)
    assert ids(found) == expected.ids.tolist()
    torch.testing.assert_close(scores(found), expected.scores)
    assert semantic_search(Q, corpus, precision=precision, rescore_multiplier=1) == found
    exact, rescored = semantic_search(Q, X), semantic_search(Q, corpus, precision=precision)
    assert recall(found, exact) < recall(rescored, exact) or bits == 8


def test_the_codes_of_a_first_prefix():
    index = make("int8")
    options = dict(precision="int8", rescore_multiplier=5)
    found = index.search(Q, 10, stages=[(16, 8, 50), (96, 10)])
    assert found.stages == [(16, 8, 50), (96, 10)]
    assert ids(semantic_search(Q, index, **options)) == found.ids.tolist()
    assert torch.equal(found.ids, index.search(Q, 10, stages=[(16, 50), (96, 10)]).ids)
    head = index.search(Q, 10, stages=[(16, 8, 50), (16, 10)])  # the same dim again
    assert ids(semantic_search(Q, index, dim=16, **options)) == head.ids.tolist()
    assert ids(semantic_search(Q[:, :16], index, **options)) == head.ids.tolist()
    coded = index.explain([(16, 8, 50), (96, 10)]).rows
    assert coded == index.explain([(16, 50), (96, 10)]).rows


@pytest.mark.parametrize("precision", OPTION)
def test_prefixes(precision):
    """By a prefix, the corpus is as if it had no more columns."""
    short = semantic_search(Q[:, :48], X[:, :48].contiguous(), precision=precision)
    assert semantic_search(Q, X, dim=48, precision=precision) == short
    assert semantic_search(Q[:, :48], X, dim=48, precision=precision) == short
    if precision in BINARY:
        index = make(precision)
        for found in (
            semantic_search(Q, index, dim=48, precision=precision),
            semantic_search(Q[:, :48], index, precision=precision),
        ):
            assert recall(found, short) > 0.9  # centred by all columns, not by these


@pytest.mark.parametrize("precision", OPTION)
def test_few_rows_and_none(precision):
    options = dict(precision=precision, top_k=10)
    for corpus in (X[:4], make(precision, X[:4])):
        found = semantic_search(Q, corpus, **options)
        assert ids(found) == ids(semantic_search(Q, X[:4]))
        assert semantic_search(Q[:0], corpus, **options) == []
        (hits,) = semantic_search(Q[0], corpus, **options)  # one vector
        assert [hit["corpus_id"] for hit in hits] == ids(found)[0]
        assert ids(semantic_search(Q, corpus, rescore_multiplier=1 << 70, **options)) == ids(found)
    for corpus in (X[:0], make(precision, X[:0])):
        assert semantic_search(Q[:2], corpus, **options) == [[], []]


@pytest.mark.parametrize("precision", ["binary", "int8"])
def test_allowed_removed_and_other_dtypes(precision):
    index, few = make(precision), torch.arange(1, N, 3)
    index.remove(range(0, N, 2))
    left = few[few % 2 == 1]
    found = semantic_search(Q, index, allowed=few, precision=precision, rescore_multiplier=N)
    assert ids(found) == [left[row].tolist() for row in ids(semantic_search(Q, X[left]))]
    half = semantic_search(Q.half(), X.half(), precision=precision, rescore_multiplier=N)
    assert recall(half, semantic_search(Q.half(), X.half())) == 1
    arrays = semantic_search(Q.double().numpy(), X.double().tolist(), precision=precision)
    assert ids(arrays) == ids(semantic_search(Q, X, precision=precision))


def test_recall_is_at_least_sentence_transformers():
    """Theirs measures Hamming distances, and rescores by signs of the corpus; ours by vectors."""
    pytest.importorskip("faiss")
    library = pytest.importorskip("sentence_transformers.util.quantization")
    queries, corpus = Q.numpy(), X.numpy()
    packed = library.quantize_embeddings(corpus, "ubinary")
    for options in (dict(), dict(rescore_multiplier=8), dict(rescore=False)):
        theirs, *_ = library.semantic_search_faiss(
            queries, packed, corpus_precision="ubinary", **options
        )
        ours = semantic_search(queries, corpus, precision="ubinary", **options)
        right = semantic_search(queries, corpus)
        assert recall(ours, right) >= recall(theirs, right)


def test_float32_is_the_default():
    index = make("binary")
    for corpus in (X, index):
        plain = semantic_search(Q, corpus)
        assert semantic_search(Q, corpus, precision="float32", rescore=False) == plain
        assert semantic_search(Q, corpus, precision="float32", rescore_multiplier=7) == plain


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(precision="int4"), ValueError, "precision: expected one of 'float32', .* got 'int4'"),
        (dict(precision=8), TypeError, "precision: expected a str, got int"),
        (dict(precision=["binary"]), TypeError, "precision: expected a str, got list"),
        (dict(rescore=1), TypeError, "rescore: expected True or False, got int"),
        (dict(rescore_multiplier=0), ValueError, "rescore_multiplier: expected an integer >= 1"),
        (
            dict(rescore_multiplier=2.0),
            TypeError,
            "rescore_multiplier: expected .* got float",
        ),
        (dict(rescore_multiplier=True), TypeError, "rescore_multiplier: .* got bool"),
        (
            dict(precision="binary", stages=[(96, 10)]),
            ValueError,
            "precision: expected 'float32' where stages are given, got 'binary'",
        ),
        (dict(precision="int8", dim=97), ValueError, r"dim: expected an integer in \[1, 96\]"),
        (dict(precision="int8", dim=0), ValueError, r"dim: expected an integer in \[1, 96\]"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        semantic_search(Q, X, **options)


def test_bad_corpora():
    plain, bits, eight = MatryoshkaIndex(DIMS), make("binary"), make("int8")
    device = MatryoshkaIndex(DIMS, codes="bits", device="cuda")
    for corpus, precision, message in (
        (plain, "binary", "expected one of 'float32', by .* got 'binary', .* codes='bits' on the"),
        (plain, "int8", "expected one of 'float32', by .* which needs prefix_dtype='int8'$"),
        (bits, "uint8", "expected one of 'float32', 'binary', 'ubinary', by which .* got 'uint8'"),
        (eight, "ubinary", "expected one of 'float32', 'int8', 'uint8', by which .* got 'ubinary'"),
        (device, "binary", "expected one of 'float32', 'int8', 'uint8', by .* got 'binary'"),
    ):
        with pytest.raises(ValueError, match=f"precision: {message}"):
            semantic_search(Q, corpus, precision=precision)
    with pytest.raises(ValueError, match=r"dim: expected one of \(16, 48, 96\), got 32"):
        semantic_search(Q, bits, dim=32, precision="binary")
    with pytest.raises(ValueError, match="query_embeddings: expected width 96"):
        semantic_search(Q[:, :48], X, precision="binary")
    with pytest.raises(ValueError, match="corpus_embeddings: expected finite values"):
        semantic_search(Q, X * torch.nan, precision="int8")
    packed = np.packbits(X.numpy() > 0, axis=1)
    with pytest.raises(TypeError, match="corpus_embeddings: expected a floating-point .*uint8"):
        semantic_search(Q, packed, precision="ubinary")
    with pytest.raises(ValueError, match=r"stages\[0\] dim: expected 16 where 8 bits rank, got 48"):
        eight.search(Q, 10, stages=[(48, 8, 50), (96, 10)])
    with pytest.raises(ValueError, match=r"stages\[0\] bits: expected one of \(8,\), got 1"):
        eight.search(Q, 10, stages=[(16, 1, 50), (96, 10)])


@pytest.mark.parametrize("precision", EIGHT)
def test_a_device_ranks_by_its_first_prefix(precision):
    index = make(precision, device="cuda", rows=X[:300])
    found = semantic_search(Q[:2], index, precision=precision)
    expected = index.search(Q[:2], 10, stages=[(16, 20), (96, 10)])
    assert ids(found) == expected.ids.tolist()
