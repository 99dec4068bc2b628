"""What users of LangChain's FAISS store are used to: filters, thresholds, ids and metadata."""

import json
from datetime import date, datetime

import numpy as np
import pytest

pytest.importorskip("langchain_core")
from langchain_core.documents import Document  # noqa: E402

from mrl_fast.integrations.langchain import MatryoshkaVectorStore  # noqa: E402
from mrl_fast.shared.types import Tuned  # noqa: E402
from tests.helpers.langchain_store import Letters, names, store  # noqa: E402

PAGES = [
    {"page": 1, "kind": "x"},
    {"page": 2, "kind": "x", "tags": ["a", "b"]},
    {"page": 3, "kind": "y", "tags": ["a"]},
    {"page": "four", "kind": "y"},
    {"kind": "z", "page": None},
    {"kind": "z"},
]


@pytest.fixture(scope="module")
def pages():
    return MatryoshkaVectorStore.from_texts(list("abcdef"), Letters(), PAGES, ids=list("012345"))


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({}, "012345"),
        ({"page": 1}, "0"),
        ({"page": [1, 2]}, "01"),
        ({"page": (1, 2)}, "01"),
        ({"page": {1, "four"}}, "03"),
        ({"page": range(2, 9)}, "12"),
        ({"page": np.array([1, 3])}, "02"),
        ({"page": np.int64(2)}, "1"),
        ({"page": list(range(2, 99))}, "12"),
        ({"page": []}, ""),
        ({"page": [1, 2], "kind": ["x", "y"]}, "01"),
        ({"tags": ["a"]}, "2"),  # equal to it
        ({"tags": [["a"], ["a", "b"]]}, "12"),
        ({"page": None}, "4"),
        ({"page": [None, 1]}, "04"),
        ({"page": {"$eq": 2}}, "1"),
        ({"page": {"$eq": None}}, "45"),
        ({"page": {"$neq": 2}}, "02345"),
        ({"page": {"$neq": None}}, "0123"),
        ({"page": {"$gt": 1}}, "12"),
        ({"page": {"$gte": 2, "$lt": 3}}, "1"),
        ({"page": {"$lte": 2}}, "01"),
        ({"page": {"$in": [1, "four"]}}, "03"),
        ({"page": {"$in": np.arange(2, 4)}}, "12"),
        ({"page": {"$nin": [1, "four"]}}, "1245"),
        ({"$or": [{"page": 1}, {"kind": "z"}]}, "045"),
        ({"$and": [{"page": {"$gt": 1}}, {"kind": "x"}]}, "1"),
        ({"$not": {"kind": "x"}}, "2345"),
        ({"$not": {"$or": [{"kind": "x"}, {"page": 3}]}}, "345"),
        ({"kind": ["y", "z"], "$or": [{"page": 3}, {"page": None}]}, "24"),
        ({"$and": []}, "012345"),
        ({"$or": []}, ""),
        (lambda document: document.metadata.get("page") == 1, "0"),
    ],
)
def test_filters(pages, filter, expected):
    assert sorted(names(pages.similarity_search("a", 9, filter=filter))) == list(expected)
    found = pages.max_marginal_relevance_search("a", 9, 9, filter=filter)
    assert sorted(names(found)) == list(expected)


@pytest.mark.parametrize(
    ("filter", "error", "message"),
    [
        ("kind", TypeError, "filter: expected a dict or a function of a Document, got str"),
        ([{"page": 1}], TypeError, "filter: expected a dict or a function of a Document, got list"),
        ({"$nor": [{}]}, ValueError, r"filter\['\$nor'\]: expected one of \$and, \$or, \$not, got"),
        ({"page": {"$ne": 1}}, ValueError, r"filter\['page'\]: expected one of \$eq, .* '\$ne'"),
        ({"page": {"$gt": 1, "x": 2}}, ValueError, r"filter\['page'\]: expected one of .* 'x'"),
        ({"page": {"$in": 1}}, TypeError, r"filter\['page'\]\['\$in'\]: expected a list, got int"),
        ({"page": {"$in": "ab"}}, TypeError, r"\['\$in'\]: expected a list, got str"),
        ({"$and": {"page": 1}}, TypeError, r"filter\['\$and'\]: expected a list of filters"),
        ({"$or": ["page"]}, TypeError, r"filter\['\$or'\]\[0\]: expected a dict, got str"),
        ({"$not": [1]}, TypeError, r"filter\['\$not'\]: expected a dict, got list"),
        ({"page": date(2024, 1, 1)}, ValueError, r"filter\['page'\]: expected what JSON can hold"),
        ({"page": {"$gt": float("nan")}}, ValueError, r"\['\$gt'\]: expected a number that JSON"),
    ],
)
def test_filters_that_would_find_nothing_are_refused(pages, filter, error, message):
    with pytest.raises(error, match=f"^{message}" if message.startswith("filter") else message):
        pages.similarity_search("a", filter=filter)


def test_keywords_of_faiss():
    found = store()
    wanted = {"kind": ["cd"]}
    assert names(found.similarity_search("c", 9, wanted, 1)) == ["id3", "id4"]
    for options in (
        {"filter": wanted, "fetch_k": 1},
        {"filter": wanted, "score_threshold": 0.9},
        {"fetch_k": 2, "score_threshold": 0.8},
    ):
        expected = ["id3"] if options.get("score_threshold") == 0.9 else ["id3", "id4"]
        assert names(found.similarity_search("c", 9, **options)) == expected
        vector = Letters().embed_query("c")
        assert names(found.similarity_search_by_vector(vector, 9, **options)) == expected
        with_score = found.similarity_search_with_score("c", 9, **options)
        assert names(document for document, _ in with_score) == expected
    retriever = found.as_retriever(search_kwargs={"k": 9, "score_threshold": 0.9, "fetch_k": 50})
    assert names(retriever.invoke("c")) == ["id3"]
    assert names(found.max_marginal_relevance_search("c", 9, 9, score_threshold=0.8)) == [
        "id3", "id4",
    ]  # fmt: skip


def test_a_threshold_keeps_what_reaches_it():
    found = store(metric="l2")
    scores = dict(
        (document.id, score) for document, score in found.similarity_search_with_score("bbb", 5)
    )
    assert scores["id2"] == 0 and scores["id1"] == -2
    for threshold, expected in ((-2, ["id2", "id1"]), (-1.9, ["id2"]), (np.float32(0), ["id2"])):
        assert names(found.similarity_search("bbb", 5, score_threshold=threshold)) == expected
    with pytest.raises(ValueError, match="score_threshold: expected at most 0, .* got 0.5"):
        found.similarity_search("bbb", score_threshold=0.5)
    with pytest.raises(ValueError, match="score_threshold: expected a finite number, got nan"):
        found.similarity_search("bbb", score_threshold=float("nan"))
    with pytest.raises(TypeError, match="score_threshold: expected a number, got list"):
        found.similarity_search("bbb", score_threshold=[1])


# --- metadata


def test_metadata_become_what_json_holds(tmp_path):
    found = store()
    given = {
        "int": np.int64(3), "half": np.float16(0.5), "bool": np.bool_(True), "text": np.str_("é"),
        "array": np.arange(4).reshape(2, 2), "pair": (1, (np.int8(2), None)),
        "in": [{"x": np.uint64(7)}],
    }  # fmt: skip
    expected = {
        "int": 3, "half": 0.5, "bool": True, "text": "é",
        "array": [[0, 1], [2, 3]], "pair": [1, [2, None]], "in": [{"x": 7}],
    }  # fmt: skip
    found.add_documents([Document(id="new", page_content="a", metadata=given)])
    (document,) = found.get_by_ids(["new"])
    assert document.metadata == expected
    assert json.loads(json.dumps(document.metadata)) == expected  # which numpy's refuse
    assert names(found.similarity_search("a", filter={"int": 3})) == ["new"]
    found.save_local(tmp_path)
    assert MatryoshkaVectorStore.load_local(tmp_path, Letters()).get_by_ids(["new"]) == [document]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"x": float("nan")}, r"metadata\['x'\]: expected a number that JSON can hold, got nan"),
        ({"x": float("inf")}, r"metadata\['x'\]: expected a number that JSON can hold, got inf"),
        ({"x": np.float32("nan")}, r"metadata\['x'\]: expected a number that JSON can hold"),
        ({"x": {"y": [1, np.nan]}}, r"metadata\['x'\]\['y'\]\[1\]: expected a number"),
        ({"x": np.array([0, np.inf])}, r"metadata\['x'\]\[1\]: expected a number"),
        ({"day": date(2024, 1, 1)}, r"metadata\['day'\]: .* got date; its isoformat\(\) is text"),
        ({"at": datetime(2024, 1, 1)}, r"metadata\['at'\]: .* got datetime; its isoformat\(\)"),
        ({"at": np.datetime64("2024-01-01", "ns")}, r"metadata\['at'\]: .* got datetime64"),
        ({"x": {1, 2}}, r"metadata\['x'\]: expected what JSON can hold .* got set"),
        ({"x": b"1"}, r"metadata\['x'\]: .* got bytes"),
        ({"x": np.complex64(1)}, r"metadata\['x'\]: .* got complex64"),
        ({"x": {1: 2}}, r"metadata\['x'\]: expected keys of text, got 1"),
        ({1: 2}, "metadata: expected keys of text, got 1"),
        (None, "metadata: expected a dict, got NoneType"),
        ([1], "metadata: expected a dict, got list"),
    ],
)
def test_metadata_that_json_cannot_hold_are_refused_at_once(metadata, message):
    found = store()
    found._embedding = None  # nothing is embedded before
    with pytest.raises(ValueError, match=f"^document 'bad': {message}"):
        found.add_texts(["fine", "bad"], [{}, metadata], ids=["fine", "bad"])
    assert len(found.index) == 5 and found.get_by_ids(["fine", "bad"]) == []


def test_metadata_of_too_many_levels():
    deep = {}
    for _ in range(100_000):
        deep = {"x": deep}
    with pytest.raises(ValueError, match="document 'bad': metadata: expected fewer levels"):
        store().add_texts(["a"], [deep], ids=["bad"])


# --- ids


def test_ids_of_other_kinds():
    pandas = pytest.importorskip("pandas")
    expected = ["0", "7"]
    for ids in (
        [0, 7], (0, 7), range(0, 14, 7), np.array([0, 7], np.int32), np.array([0, 7], np.uint64),
        np.array(["0", "7"]), pandas.Series([0, 7]), pandas.Series(["0", "7"]),
    ):  # fmt: skip
        found = store()
        assert found.add_texts(["zz", "zy"], ids=ids) == expected
        assert names(found.get_by_ids(ids)) == names(found.get_by_ids(expected)) == expected
        assert names(found.similarity_search("z", 2)) == expected
        assert found.delete(ids) and found.get_by_ids(expected) == []
    assert len(set(store().add_texts(["a", "b", "c"], ids=[None, "", None]))) == 3
    for call in (store().delete, store().get_by_ids, lambda ids: store().add_texts("abc", ids=ids)):
        with pytest.raises(TypeError, match="ids: expected a list of ids, got one str: 'id1'"):
            call("id1")
        for bad, kind in ((1.5, "float"), (True, "bool"), (b"1", "bytes")):
            with pytest.raises(
                TypeError, match=rf"ids\[1\]: expected text or an integer, got {kind}"
            ):
                call(["0", bad, "2"])


def test_equal_scores_are_in_the_order_of_adding():
    ids = [f"{i}" for i in range(200)]
    found = MatryoshkaVectorStore.from_texts(["abc"] * 200, Letters(), ids=ids)
    found.add_texts(["abc"], ids=["17"])
    order = [*ids[:17], *ids[18:], "17"]
    assert names(found.similarity_search("ab", 201)) == order
    assert names(found.max_marginal_relevance_search("ab", 201, 201, 1.0)) == order


def test_a_tuned_store_that_filters_is_exact_and_warns_of_nothing():
    found = store()
    found.index._tuned = Tuned([(found.index.dims[0], 1)], 1, len(found.index))
    best = found.similarity_search_with_score("abcd", 1, filter=lambda metadata: True)
    exact = found.similarity_search_with_score("abcd", 1, exact=True)
    assert [(hit.id, score) for hit, score in best] == [(hit.id, score) for hit, score in exact]
