"""The LlamaIndex store, by itself and under a VectorStoreIndex."""

import asyncio
import importlib
import os
import sys
from datetime import date

import numpy as np
import pytest

pytest.importorskip("llama_index.core")
from llama_index.core import Document, StorageContext, VectorStoreIndex  # noqa: E402
from llama_index.core import load_index_from_storage as load_index  # noqa: E402
from llama_index.core.base.embeddings.base import BaseEmbedding  # noqa: E402
from llama_index.core.schema import (  # noqa: E402
    ImageNode,
    IndexNode,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores import (  # noqa: E402
    MetadataFilter,
    MetadataFilters,
    SimpleVectorStore,
    VectorStoreQuery,
)
from llama_index.core.vector_stores.types import VectorStoreQueryMode  # noqa: E402

from mrl_fast.integrations.llama_index import MatryoshkaVectorStore  # noqa: E402


class Letters(BaseEmbedding):
    """How often each of 26 letters occurs."""

    def _get_query_embedding(self, query):
        return [float(query.count(chr(ord("a") + i))) for i in range(26)]

    def _get_text_embedding(self, text):
        return self._get_query_embedding(text)

    async def _aget_query_embedding(self, query):
        return self._get_query_embedding(query)


EMBED = Letters()
METADATA = [
    {"n": 0, "kind": "ab", "tags": ["x", "y"]},
    {"n": 1, "kind": "ab", "tags": ["y"], "note": "Hello there"},
    {"n": 2, "kind": "ab", "tags": []},
    {"n": 3.5, "kind": "cd", "note": "hello"},
    {"n": "four", "kind": "cd", "tags": ["x"]},
]


def nodes():
    made = []
    for i, (text, metadata) in enumerate(
        zip(["aab", "abb", "bbb", "ccc", "ccd"], METADATA, strict=True)
    ):
        node = TextNode(
            id_=f"id{i}", text=text, metadata=metadata, embedding=EMBED.get_text_embedding(text)
        )
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"doc{i // 2}")
        made.append(node)
    return made


def store(**options):
    made = MatryoshkaVectorStore(**options)
    assert made.add(nodes()) == [f"id{i}" for i in range(5)]
    return made


def asked(found, text="abcd", k=9, **options):
    mode = options.pop("mode", "default")
    kwargs = options.pop("kwargs", {})
    query = VectorStoreQuery(
        EMBED.get_query_embedding(text), k, mode=VectorStoreQueryMode(mode), **options
    )
    return found.query(query, **kwargs)


def ids(nodes):
    return [node.node_id for node in nodes]


def test_scores_by_hand():
    result = asked(store(), "a", 3)
    assert result.ids == ids(result.nodes) == ["id0", "id1", "id2"]
    assert result.similarities == pytest.approx([2 / 5**0.5, 1 / 5**0.5, 0])
    assert result.nodes[0].embedding is None and result.nodes[0].text == "aab"
    assert asked(store(metric="l2"), "bbbb", 1).similarities == [-1]
    assert asked(store(metric="ip", dims=(2, 26)), "ccd", 1).similarities == [6]
    assert asked(MatryoshkaVectorStore()).nodes == []
    assert asked(store(dims=(2, 26)), "c", kwargs={"stages": [(2, 9)]}).similarities == [0] * 5


def where(key, operator, value):
    return MetadataFilter(key=key, operator=operator, value=value)


def all_of(*filters, condition="and"):
    return MetadataFilters(filters=list(filters), condition=condition)


@pytest.mark.parametrize(
    ("key", "operator", "value", "expected"),
    [
        ("kind", "==", "ab", "012"),
        ("n", "==", 1, "1"),
        ("kind", "!=", "ab", "34"),
        ("note", "!=", "hello", "0124"),  # also where there is none
        ("n", ">", 1, "23"),  # "four" is no number
        ("n", ">=", 1, "123"),
        ("n", "<", 2, "01"),
        ("n", "<=", 2, "012"),
        ("n", "in", [0, 2], "02"),
        ("kind", "in", ["cd", "ef"], "34"),
        ("n", "nin", [0, 2], "134"),
        ("tags", "any", ["x", "z"], "04"),
        ("tags", "all", ["x", "y"], "0"),
        ("tags", "contains", "y", "01"),
        ("note", "text_match", "ello", "13"),
        ("note", "text_match", "hello", "3"),
        ("note", "text_match_insensitive", "HELLO", "13"),
        ("tags", "text_match", "x", ""),
        ("tags", "is_empty", None, "23"),
        ("doc_id", "==", "doc1", "23"),
        ("ref_doc_id", "in", ["doc0", "doc2"], "014"),
        ("missing", "==", 1, ""),
        ("missing", "==", None, ""),
    ],
)
def test_operators(key, operator, value, expected):
    found, filters = store(), all_of(where(key, operator, value))
    wanted = [f"id{i}" for i in expected]
    assert sorted(asked(found, filters=filters).ids) == wanted
    assert ids(found.get_nodes(filters=filters)) == wanted
    simple = SimpleVectorStore()
    simple.add(nodes())
    try:
        theirs = asked(simple, filters=filters).ids
    except TypeError:  # where a type does not fit it raises, and ours does not match
        return
    assert sorted(theirs) == wanted


def test_filters_within_filters():
    found = store()
    ab, cd = where("kind", "==", "ab"), where("kind", "==", "cd")
    for filters, expected in (
        (all_of(ab, where("n", ">", 0)), "12"),
        (all_of(cd, where("n", "==", 0), condition="or"), "034"),
        (all_of(all_of(ab, where("n", "<", 1)), cd, condition="or"), "034"),
        (all_of(ab, all_of(where("n", "==", 0), where("n", "==", 2), condition="or")), "02"),
        (all_of(where("n", "==", 0), cd, condition="not"), "12"),
        (all_of(all_of(cd, condition="not"), where("n", "!=", 0)), "12"),
        (all_of(ab, condition=None), "012"),
        (all_of(), "01234"),
    ):
        assert sorted(asked(found, filters=filters).ids) == [f"id{i}" for i in expected]


def test_nodes_and_documents_to_search():
    found = store()
    assert asked(found, "a", node_ids=["id4", "id2", "none"]).ids == ["id2", "id4"]
    assert asked(found, "a", doc_ids=["doc1"]).ids == ["id2", "id3"]
    assert asked(found, "a", node_ids=["id2"], doc_ids=["doc0"]).ids == []
    assert asked(found, "a", node_ids=["none"]).ids == asked(found, "a", doc_ids=[]).ids == []
    assert len(asked(found, "a", node_ids=[]).ids) == 5  # what an index hands on without any
    both = all_of(where("n", "==", 3.5))
    assert asked(found, "a", doc_ids=["doc1"], filters=both).ids == ["id3"]
    assert ids(found.get_nodes(["id3", "none", "id0", "id3"])) == ["id3", "id0"]
    assert ids(found.get_nodes(["id3", "id0"], both)) == ["id3"] and len(found.get_nodes()) == 5


def test_marginal_relevance():
    found = store()
    assert asked(found, "aabbbc", 3).ids == ["id1", "id0", "id2"]
    assert asked(found, "aabbbc", 3, mode="mmr", mmr_threshold=1.0).ids == ["id1", "id0", "id2"]
    result = asked(found, "aabbbc", 3, mode="mmr", mmr_threshold=0.1)
    assert result.ids[:2] == ["id1", "id3"] and result.similarities[1] == pytest.approx(14**-0.5)
    near = {"mmr_prefetch_factor": 1.0, "mmr_threshold": 0.1}
    assert sorted(asked(found, "aabbbc", 3, mode="mmr", kwargs=near).ids) == ["id0", "id1", "id2"]
    only = all_of(where("kind", "==", "cd"))
    assert sorted(asked(found, "aabbbc", 3, mode="mmr", filters=only).ids) == ["id3", "id4"]


def test_bad_queries():
    found = store()
    for mode in ("sparse", "hybrid", "text_search", "svm"):
        with pytest.raises(ValueError, match=f"mode: expected 'default' or 'mmr', got '{mode}'"):
            asked(found, mode=mode)
    with pytest.raises(ValueError, match="query_embedding: expected an embedding, got None"):
        found.query(VectorStoreQuery())
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        asked(found, k=0)
    with pytest.raises(ValueError, match="embedding not set"):
        found.add([TextNode(text="a")])
    with pytest.raises(ValueError, match="metric: expected one of"):
        MatryoshkaVectorStore(metric="dot")


def test_replace_delete_clear():
    found = store()
    (node,) = found.get_nodes(["id1"])
    node.metadata["n"] = 99  # a copy
    assert found.get_nodes(["id1"])[0].metadata["n"] == 1
    node.embedding = EMBED.get_text_embedding("zzz")
    found.add([node])
    assert asked(found, "z", 1).nodes[0].metadata["n"] == 99 and len(found.client) == 5
    found.delete("doc0")
    found.delete("nothing")
    assert sorted(ids(found.get_nodes())) == ["id2", "id3", "id4"] == sorted(asked(found).ids)
    found.delete_nodes(["id2", "id3"], all_of(where("kind", "==", "cd")))
    assert sorted(ids(found.get_nodes())) == ["id2", "id4"]
    found.delete_nodes(filters=all_of(where("n", "==", 2)))
    with pytest.raises(ValueError, match=r"node_ids: expected node_ids or filters.*clear\(\)"):
        found.delete_nodes()
    assert asked(found).ids == ["id4"]
    found.clear()
    assert found.get_nodes() == [] and asked(found).ids == []
    assert found.add(nodes()[:1]) == ["id0"] and asked(found).ids == ["id0"]


def every_kind():
    image = ImageNode(id_="image", image="aGk=", text="a", embedding=EMBED.get_text_embedding("a"))
    index = IndexNode(id_="index", index_id="x", text="b", embedding=EMBED.get_text_embedding("b"))
    document = Document(id_="document", text="c", embedding=EMBED.get_text_embedding("c"))
    return [image, index, document]


def test_persist(tmp_path):
    found = store(dtype="float16", dims=(2, 26))
    found.add(every_kind())
    path = str(tmp_path / "deep" / "store")
    found.persist(path)
    again = MatryoshkaVectorStore.from_persist_path(path, verify=True)
    assert again.get_nodes() == found.get_nodes() and len(again.get_nodes()) == 8
    assert [type(node) for node in again.get_nodes()] == [type(node) for node in found.get_nodes()]
    a, b = asked(found), asked(again)
    assert a.ids == b.ids and a.similarities == b.similarities and a.nodes == b.nodes
    again.delete("doc1")
    again.persist(path)
    assert len(MatryoshkaVectorStore.from_persist_path(path).get_nodes()) == 6
    assert sorted(os.listdir(path)) == ["index", "records.jsonl"]


class OwnNode(TextNode):
    more: int = 1


def test_what_is_not_persisted(tmp_path):
    found = store()
    found.add([OwnNode(id_="x", text="a", embedding=EMBED.get_text_embedding("a"))])
    with pytest.raises(ValueError, match="'x': expected what JSON can hold, got .* got OwnNode"):
        found.persist(tmp_path / "store")
    with pytest.raises(FileNotFoundError):
        MatryoshkaVectorStore.from_persist_path(tmp_path / "store")
    with pytest.raises(ValueError, match="fs: expected None, for local files, got object"):
        store().persist(tmp_path / "store", fs=object())


def related_to(document, **metadata):
    """A node of a document, which hands its metadata on."""
    document = Document(id_=document, text="", metadata=metadata)
    node = TextNode(id_="x", text="a", embedding=EMBED.get_text_embedding("a"))
    node.relationships[NodeRelationship.SOURCE] = document.as_related_node_info()
    node.relationships[NodeRelationship.CHILD] = [document.as_related_node_info()]
    return node


def test_metadata_become_what_json_holds(tmp_path):
    given = {"n": np.int64(3), "x": np.float32(0.5), "pair": (1, 2), "array": np.arange(2)}
    expected = {"n": 3, "x": 0.5, "pair": [1, 2], "array": [0, 1]}
    node = related_to("doc", **given)
    node.metadata = given
    found = MatryoshkaVectorStore()
    found.add([node])
    (kept,) = found.get_nodes()
    for metadata in (
        kept.metadata, kept.source_node.metadata, kept.child_nodes[0].metadata
    ):  # fmt: skip
        assert metadata == expected and type(metadata["n"]) is int
    assert asked(found, "a", filters=all_of(where("n", "in", [3, 4]))).ids == ["x"]
    found.persist(tmp_path / "store")
    assert MatryoshkaVectorStore.from_persist_path(tmp_path / "store").get_nodes() == [kept]
    assert isinstance(node.metadata["n"], np.int64)  # the caller's stay


@pytest.mark.parametrize("value", [float("nan"), np.float64("inf"), date(2024, 1, 1), {1: 2}, b"x"])
def test_metadata_that_json_cannot_hold_are_refused_at_once(value):
    found, node = store(), nodes()[0]
    node.metadata["key"] = value
    with pytest.raises(ValueError, match=r"^node 'id0': metadata\['key'\]: expected"):
        found.add([nodes()[1], node])
    with pytest.raises(
        ValueError, match=r"^node 'x': related node 'doc': metadata\['key'\]: expected"
    ):
        found.add([related_to("doc", key=value)])
    assert ids(found.get_nodes()) == [f"id{i}" for i in range(5)]


@pytest.fixture
def documents():
    return [
        Document(id_=f"doc{i}", text=text, metadata={"kind": kind})
        for i, (text, kind) in enumerate([("aab", "v"), ("bbb", "c"), ("ccd", "c")])
    ]


class Whole:
    """One node a document, without a splitter, whose tokenizer would have to be loaded."""

    def __call__(self, documents, **kwargs):
        made = []
        for document in documents:
            node = TextNode(text=document.text, id_=f"{document.id_}-0")
            node.metadata = dict(document.metadata)
            node.excluded_embed_metadata_keys = ["kind"]
            node.relationships[NodeRelationship.SOURCE] = document.as_related_node_info()
            made.append(node)
        return made


def test_under_a_vector_store_index(tmp_path, documents):
    found = MatryoshkaVectorStore()
    context = StorageContext.from_defaults(vector_store=found)
    options = dict(embed_model=EMBED, transformations=[Whole()])
    index = VectorStoreIndex.from_documents(documents, storage_context=context, **options)
    assert len(found.client) == 3 and not context.docstore.docs  # the store has the nodes

    def retrieved(index, text, **options):
        return [(hit.node.text, hit.score) for hit in index.as_retriever(**options).retrieve(text)]

    assert retrieved(index, "b", similarity_top_k=2) == [
        ("bbb", pytest.approx(1)), ("aab", pytest.approx(5**-0.5)),
    ]  # fmt: skip
    only = all_of(where("kind", "==", "c"))
    assert [text for text, _ in retrieved(index, "a", filters=only)] == ["bbb", "ccd"]
    mmr = dict(vector_store_query_mode="mmr", similarity_top_k=2)
    kwargs = {"vector_store_kwargs": {"mmr_threshold": 0.1}}
    assert [text for text, _ in retrieved(index, "ab", **mmr, **kwargs)] == ["aab", "ccd"]

    index.insert(Document(id_="doc3", text="zz", metadata={}))
    index.delete_ref_doc("doc1")
    assert sorted(ids(found.get_nodes())) == ["doc0-0", "doc2-0", "doc3-0"]
    index.update_ref_doc(Document(id_="doc3", text="yy"))
    assert retrieved(index, "y", similarity_top_k=1) == [("yy", pytest.approx(1))]
    index.delete_nodes(["doc2-0"])
    retriever = index.as_retriever(similarity_top_k=5)
    assert len(asyncio.run(retriever.aretrieve("c"))) == 2

    context.persist(str(tmp_path))
    context.persist(str(tmp_path))  # again, onto itself
    loaded = MatryoshkaVectorStore.from_persist_dir(str(tmp_path))
    assert loaded.get_nodes() == found.get_nodes()
    again = VectorStoreIndex.from_vector_store(loaded, embed_model=EMBED)
    assert retrieved(again, "y", similarity_top_k=1) == [("yy", pytest.approx(1))]
    context = StorageContext.from_defaults(persist_dir=str(tmp_path), vector_store=loaded)
    again = load_index(context, embed_model=EMBED)
    assert retrieved(again, "y", similarity_top_k=1) == [("yy", pytest.approx(1))]


def test_async_forms():
    async def use():
        found = MatryoshkaVectorStore()
        assert await found.async_add(nodes()) == [f"id{i}" for i in range(5)]
        await found.adelete("doc0")
        await found.adelete_nodes(["id4"])
        query = VectorStoreQuery(EMBED.get_query_embedding("c"), 9)
        assert (await found.aquery(query)).ids == ["id3", "id2"]
        await found.aclear()
        assert await found.aget_nodes() == []

    asyncio.run(use())


def test_without_llama_index(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "llama_index"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mrl_fast.integrations.llama_index")
    with pytest.raises(ImportError, match=r"pip install 'mrl-fast\[llama-index\]'"):
        importlib.import_module("mrl_fast.integrations.llama_index")
