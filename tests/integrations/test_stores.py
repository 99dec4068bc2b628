"""The LangChain and the LlamaIndex store alike: pickles and copies, with the records and
independent; other global states of torch, which change nothing."""

import copy
import multiprocessing
import pickle
import threading

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("llama_index.core")
from llama_index.core.schema import TextNode  # noqa: E402
from llama_index.core.vector_stores import VectorStoreQuery  # noqa: E402

from mrl_fast.integrations import langchain, llama_index  # noqa: E402
from tests.helpers.langchain_store import TEXTS, Letters, in_threads, store  # noqa: E402
from tests.helpers.torch_states import STATES  # noqa: E402

LETTERS = Letters()


class LangChain:
    """The few things that both kinds of stores can do."""

    new = staticmethod(lambda: langchain.MatryoshkaVectorStore(LETTERS))
    load = staticmethod(lambda path: langchain.MatryoshkaVectorStore.load_local(path, LETTERS))

    @staticmethod
    def add(found, name, text):
        found.add_texts([text], [{"text": text}], ids=[name])

    @staticmethod
    def all(found):
        """Names, metadata and scores of all, the best first; marginal relevance finds them too."""
        assert len(found.max_marginal_relevance_search("abcd", 99)) == len(found.index or ())
        hits = found.similarity_search_with_score("abcd", 99)
        return [(hit.id, hit.metadata, score) for hit, score in hits]

    remove = staticmethod(lambda found, name: found.delete([name]))
    save = staticmethod(lambda found, path: found.save_local(path))


class LlamaIndex:
    new = staticmethod(llama_index.MatryoshkaVectorStore)
    load = staticmethod(llama_index.MatryoshkaVectorStore.from_persist_path)

    @staticmethod
    def add(found, name, text):
        vector = LETTERS.embed_query(text)
        found.add([TextNode(id_=name, text=text, metadata={"text": text}, embedding=vector)])

    @staticmethod
    def all(found):
        result = found.query(VectorStoreQuery(LETTERS.embed_query("abcd"), 99))
        fields = zip(result.ids, result.nodes, result.similarities, strict=True)
        return [(name, node.metadata, score) for name, node, score in fields]

    remove = staticmethod(lambda found, name: found.delete_nodes([name]))
    save = staticmethod(lambda found, path: found.persist(path))


COPIES = {
    "pickle": lambda found: pickle.loads(pickle.dumps(found)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}
both = pytest.mark.parametrize("kind", [LangChain, LlamaIndex])
every_way = pytest.mark.parametrize("way", COPIES)


def filled(kind):
    found = kind.new()
    for i, text in enumerate(TEXTS):
        kind.add(found, f"id{i}", text)
    kind.remove(found, "id4")
    return found


@both
@every_way
def test_a_copy_has_the_records_and_is_independent(kind, way):
    found = filled(kind)
    before = kind.all(found)
    again = COPIES[way](found)
    assert type(again) is type(found) and kind.all(again) == before and len(before) == 4
    kind.add(again, "new", "abcd")
    kind.remove(again, "id0")
    assert kind.all(found) == before
    kind.add(found, "other", "dddd")
    assert [name for name, _, _ in kind.all(again)] == ["new", "id1", "id2", "id3"]
    assert {name for name, _, _ in kind.all(found)} == {"id0", "id1", "id2", "id3", "other"}


@both
@every_way
def test_a_copy_of_an_empty_store(kind, way):
    again = COPIES[way](kind.new())
    assert kind.all(again) == []
    kind.add(again, "id0", "abcd")
    assert [name for name, _, _ in kind.all(again)] == ["id0"]


@both
@every_way
@pytest.mark.parametrize("first", ["copy", "original"])
def test_copies_save_as_two_that_loaded(kind, way, first, tmp_path):
    found = filled(kind)
    kind.save(found, tmp_path)
    kind.add(found, "unsaved", "dcba")
    again = COPIES[way](found)
    kind.add(again, "new", "abcd")
    mine, other = (again, found) if first == "copy" else (found, again)
    kind.save(mine, tmp_path)
    assert kind.all(kind.load(tmp_path)) == kind.all(mine)
    kind.save(other, tmp_path / "other")  # to one folder it may be refused
    assert kind.all(kind.load(tmp_path / "other")) == kind.all(other)


@both
def test_a_store_in_another_process(kind):
    found = filled(kind)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(kind.all, (found,)) == kind.all(found)


@both
def test_what_cannot_be_pickled_is_not_left_out(kind, monkeypatch):
    found = filled(kind)

    def refuse(self):
        raise OSError("no room")

    monkeypatch.setattr(type(found._records), "__getstate__", refuse)
    with pytest.raises(OSError, match="no room"):
        pickle.dumps(found)


def test_a_pickle_of_a_store_that_changes():
    """One moment's: never the records of one and the index of another."""
    found, done = store(), threading.Event()

    def write():
        try:
            for i in range(200):
                found.add_texts(["ab" * (i + 2), "cd" * (i + 2)], ids=["id1", "id3"])
        finally:
            done.set()

    def read():
        while not done.is_set():
            again = pickle.loads(pickle.dumps(found))
            assert len(LangChain.all(again)) == len(again.index) == 5
            first, second = again.get_by_ids(["id1", "id3"])
            assert len(first.page_content) == len(second.page_content)

    in_threads(write, read)


@both
@pytest.mark.parametrize("state", STATES)
def test_global_states_of_torch(kind, state, tmp_path):
    expected = kind.all(filled(kind))
    with STATES[state]():
        found = filled(kind)
        assert kind.all(found) == expected
        kind.save(found, tmp_path)
        again = kind.load(tmp_path)
        assert kind.all(again) == expected
        begun = filled(kind)
    for each in (found, again, begun):  # what was begun in a state goes on outside it
        kind.add(each, "new", "abcd")
        kind.remove(each, "id0")
        assert [name for name, _, _ in kind.all(each)] == ["new", "id1", "id2", "id3"]
