"""The LangChain store: LangChain's own tests of a store, then ours."""

import asyncio
import importlib
import inspect
import sys
import threading

import pytest

pytest.importorskip("langchain_core")
standard = pytest.importorskip("langchain_tests.integration_tests.vectorstores")
from langchain_core.documents import Document  # noqa: E402
from langchain_core.embeddings import DeterministicFakeEmbedding  # noqa: E402
from langchain_core.indexing import InMemoryRecordManager, index  # noqa: E402
from langchain_core.vectorstores import InMemoryVectorStore  # noqa: E402

from mrl_fast.integrations.langchain import MatryoshkaVectorStore  # noqa: E402
from tests.helpers.langchain_store import TEXTS, Letters, in_threads, names, store  # noqa: E402

for each in vars(standard.VectorStoreIntegrationTests).values():
    if inspect.iscoroutinefunction(each):
        pytest.mark.asyncio(each)  # in place: the class may not override them


class TestStandard(standard.VectorStoreIntegrationTests):
    @pytest.fixture(params=[None, "dims"])
    def vectorstore(self, request):
        options = {"dims": (2, 6), "prefix_dtype": "int8"} if request.param else {}
        return MatryoshkaVectorStore(self.get_embeddings(), **options)


def test_scores_by_hand():
    found = store().similarity_search_with_score("a", 3)
    assert names(document for document, _ in found) == ["id0", "id1", "id2"]
    assert [score for _, score in found] == pytest.approx([2 / 5**0.5, 1 / 5**0.5, 0])
    (document, score), *_ = store(metric="l2").similarity_search_with_score("bbbb", 1)
    assert document.id == "id2" and score == -1
    (document, score), *_ = store(metric="ip").similarity_search_with_score("ccd", 1)
    assert document.id == "id3" and score == 6
    document, *_ = store().similarity_search_by_vector(Letters().embed_query("dddc"), 1)
    expected = Document(id="id4", page_content="ccd", metadata={"n": 4, "kind": "cd"})
    assert document == expected


def test_filters():
    found = store()
    assert names(found.similarity_search("ab", 9, filter={"kind": "cd"})) == ["id3", "id4"]
    assert names(found.similarity_search("c", 1, filter={"kind": "ab", "n": 2})) == ["id2"]
    assert found.similarity_search("c", 9, filter={"kind": "ab", "n": 4}) == []
    assert found.similarity_search("c", 9, filter={"missing": None}) == []
    odd = found.similarity_search("b", 9, filter=lambda document: document.metadata["n"] % 2)
    assert names(odd) == ["id1", "id3"]
    retriever = found.as_retriever(search_kwargs={"k": 1, "filter": {"kind": "cd"}})
    assert names(retriever.invoke("a")) == ["id3"]


def test_upsert_delete_and_what_is_the_callers():
    found, metadata = store(), {"n": 9, "tags": ["x"]}
    document = Document(id="id1", page_content="zzz", metadata=metadata)
    assert found.add_documents([document, Document(page_content="zzy")])[0] == "id1"
    metadata["n"] = 10
    metadata["tags"].append("y")
    (stored,) = found.get_by_ids(["id1"])
    assert stored == Document(id="id1", page_content="zzz", metadata={"n": 9, "tags": ["x"]})
    stored.metadata["n"] = 11
    found.similarity_search("z", 1)[0].metadata["n"] = 12
    assert found.get_by_ids(["id1"])[0].metadata == {"n": 9, "tags": ["x"]}
    assert names(found.similarity_search("z", 9))[0] == "id1" and len(found.index) == 6
    assert found.add_texts(["q", "r", "s"], ids=["x", "y", "x"]) == ["x", "y", "x"]
    assert found.get_by_ids(["x"])[0].page_content == "s"  # the last counts
    assert found.delete(["x", "id0", "nobody", "x"]) and len(found.index) == 6
    assert names(found.get_by_ids(["id0", "y", "id4"])) == ["y", "id4"]
    assert found.delete() and len(found.index) == 0 and found.similarity_search("a") == []
    assert found.add_texts(iter(["a"]), ids=["id0"]) == ["id0"]
    assert names(found.similarity_search("a")) == ["id0"]


def test_bad_input():
    found = store()
    for call, message in (
        (lambda: found.add_texts(["a"], ids=["1", "2"]), "ids: expected 1, one a text, got 2"),
        (lambda: found.add_texts(["a"], [{}, {}]), "metadatas: expected 1, one a text, got 2"),
        (lambda: found.similarity_search("a", 0), "k: expected an integer >= 1, got 0"),
        (lambda: found.similarity_search_by_vector([1.0]), "queries: expected width 26, got 1"),
        (lambda: found.similarity_search("a", stages=[(9, 9)]), r"stages\[0\] dim"),
        (lambda: MatryoshkaVectorStore(Letters(), metric="dot"), "metric: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'fetch'"):
        found.similarity_search("a", fetch=3)


def test_a_failed_add_changes_nothing():
    class Broken(Letters):
        def embed_documents(self, texts):
            return [
                [float("nan")] * 26 if text == "nan" else self.embed_query(text) for text in texts
            ]

    found = MatryoshkaVectorStore(Broken())
    with pytest.raises(ValueError, match="vectors: expected finite"):
        found.add_texts(["nan"])
    assert found.index is None and found.similarity_search("a") == []
    found.add_texts(["a", "b"], ids=["1", "2"])
    with pytest.raises(ValueError, match="vectors: expected finite"):
        found.add_texts(["c", "nan"], ids=["1", "3"])
    assert names(found.similarity_search("a", 9)) == ["1", "2"]
    assert [document.page_content for document in found._records.values()] == ["a", "b"]
    found._embedding.embed_documents = lambda texts: [[1.0] * 26]
    with pytest.raises(ValueError, match="embeddings: expected 2 rows, got 1"):
        found.add_texts(["c", "d"])


def test_equals_the_in_memory_store():
    embedding = DeterministicFakeEmbedding(size=128)
    texts = [f"text {i}" for i in range(200)]
    ids = [str(i) for i in range(200)]
    ours = MatryoshkaVectorStore.from_texts(texts, embedding, ids=ids)
    theirs = InMemoryVectorStore(embedding)
    theirs.add_texts(texts, ids=ids)
    assert ours.index.dims == (64, 128)
    for query in ("text three", "something else", "a third"):
        a, b = (x.similarity_search_with_score(query, 20) for x in (ours, theirs))
        assert names(document for document, _ in a) == names(document for document, _ in b)
        assert [score for _, score in a] == pytest.approx([score for _, score in b], abs=1e-6)
        for weight in (0.0, 0.3, 0.5, 1.0):
            options = dict(k=6, fetch_k=30, lambda_mult=weight)
            a, b = (x.max_marginal_relevance_search(query, **options) for x in (ours, theirs))
            assert names(a) == names(b)
    staged = ours.similarity_search("text 3", 5, stages=[(64, 200), (128, 5)])
    assert names(staged) == names(ours.similarity_search("text 3", 5))
    filtered = ours.max_marginal_relevance_search("text 3", filter=lambda d: d.id < "2")
    assert len(filtered) == 4 and all(document.id < "2" for document in filtered)


def test_relevance():
    assert store().similarity_search_with_relevance_scores("a", 1)[0][1] == pytest.approx(
        0.8944, abs=1e-4
    )
    opposite = store()._select_relevance_score_fn()
    assert opposite(-0.5) == 0 and opposite(1.0000001) == 1
    distance = store(metric="l2")._select_relevance_score_fn()
    assert distance(-2.0) == pytest.approx(0) and distance(-0.5) == pytest.approx(0.5)
    assert store(metric="ip")._select_relevance_score_fn()(0.25) == 0.25
    kept = store().similarity_search_with_relevance_scores("a", 5, score_threshold=0.4)
    assert names(document for document, _ in kept) == ["id0", "id1"]


def test_langchain_indexing():
    manager, found = InMemoryRecordManager(namespace="letters"), MatryoshkaVectorStore(Letters())
    manager.create_schema()
    documents = [Document(page_content=text, metadata={"source": text}) for text in TEXTS]

    def run(documents):
        options = dict(cleanup="full", source_id_key="source", key_encoder="sha256")
        return index(documents, manager, found, **options)

    assert run(documents)["num_added"] == 5 and len(found.index) == 5
    assert run(documents)["num_skipped"] == 5
    assert run(documents[1:])["num_deleted"] == 1 and len(found.index) == 4


def test_async_forms():
    async def use():
        found = await MatryoshkaVectorStore.afrom_texts(TEXTS, Letters(), ids=list("01234"))
        await found.adelete(["0"])
        assert names(await found.asimilarity_search("a", 1)) == ["1"]
        assert names(await found.amax_marginal_relevance_search("a", 1)) == ["1"]
        assert names(await found.aget_by_ids(["0", "4"])) == ["4"]

    asyncio.run(use())


def test_searching_while_documents_are_replaced():
    found, done = store(), threading.Event()

    def write():
        try:
            for i in range(300):
                found.add_texts(["ab" * (i + 2), "cd" * (i + 2)], ids=["id1", "id3"])
        finally:
            done.set()

    def read():
        while not done.is_set():
            for options in ({}, {"filter": lambda document: True}):
                assert sorted(names(found.similarity_search("abc", 9, **options))) == [
                    f"id{i}" for i in range(5)
                ]
            assert len(found.max_marginal_relevance_search("abc", 5)) == 5

    in_threads(write, read, read)


def test_without_langchain(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("langchain_core")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mrl_fast.integrations.langchain")
    with pytest.raises(ImportError, match=r"pip install 'mrl-fast\[langchain\]'"):
        importlib.import_module("mrl_fast.integrations.langchain")
