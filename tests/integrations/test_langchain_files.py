"""The LangChain store on disk: the old store or the new, whatever stops a save."""

import os
import re
import shutil
import subprocess
import sys
import threading
from datetime import date
from pathlib import Path

import pytest

pytest.importorskip("langchain_core")
from mrl_fast.integrations.langchain import MatryoshkaVectorStore  # noqa: E402
from mrl_fast.integrations.stores import records
from tests.helpers.langchain_store import Letters, contents, in_threads, names, store  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_save_and_load(tmp_path):
    found = store(dtype="float16", prefix_dtype="int8", dims=(8, 26))
    path = tmp_path / "deep" / "store"
    found.save_local(path)
    again = MatryoshkaVectorStore.load_local(path, Letters(), verify=True)
    assert again.index.dims == (8, 26) and again.index.prefix_dtype == "int8"
    a, b = (x.similarity_search_with_score("abcd", 9) for x in (found, again))
    assert a == b and len(a) == 5
    again.delete(["id0"])
    again.add_texts(["\u2028\ud800é\n"], [{"list": [1, None, {"x": 2.5}]}], ids=["id1"])
    again.save_local(path)
    third = MatryoshkaVectorStore.load_local(str(path), Letters())
    assert third.get_by_ids(["id1"]) == again.get_by_ids(["id1"])
    assert names(third._records.values()) == names(again._records.values())
    assert third.get_by_ids(["id0"]) == []
    assert sorted(os.listdir(path)) == ["index", "records.jsonl"]
    assert not any(b"pickle" in file.read_bytes() for file in path.rglob("*.*"))


def test_an_empty_store(tmp_path):
    with pytest.raises(ValueError, match="dims: expected dims, or a vector, before a save"):
        MatryoshkaVectorStore(Letters()).save_local(tmp_path)
    MatryoshkaVectorStore(Letters(), (2, 26)).save_local(tmp_path)
    again = MatryoshkaVectorStore.load_local(tmp_path, Letters())
    assert again.index.dims == (2, 26) and again.similarity_search("a") == []


def test_a_folder_that_was_deleted_is_written_again(tmp_path):
    found = store()
    for _ in range(2):
        found.save_local(tmp_path / "store")
        again = MatryoshkaVectorStore.load_local(tmp_path / "store", Letters())
        assert contents(again) == contents(found)
        shutil.rmtree(tmp_path / "store")


def test_a_save_appends(tmp_path):
    found = store()
    found.save_local(tmp_path)
    first = (tmp_path / "records.jsonl").read_bytes()
    found.add_texts(["new"], ids=["id1"])
    found.save_local(tmp_path)
    second = (tmp_path / "records.jsonl").read_bytes()
    assert second.startswith(first) and second.count(b"\n") == first.count(b"\n") + 1
    found.save_local(tmp_path)
    assert (tmp_path / "records.jsonl").read_bytes() == second


def test_what_is_replaced_is_dropped_at_last(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SLACK", 3)
    found = store()
    for i in range(40):
        found.add_texts([f"text {i}", f"more {i}"], ids=["id0", "id1"])
        found.save_local(tmp_path)
        assert (tmp_path / "records.jsonl").read_bytes().count(b"\n") < 20
        removed = re.search(r"(\d+) removed", repr(found.index))
        assert removed is None or int(removed[1]) < 12
    again = MatryoshkaVectorStore.load_local(tmp_path, Letters())
    assert sorted(names(again._records.values())) == [f"id{i}" for i in range(5)]
    assert again.get_by_ids(["id1"])[0].page_content == "more 39"


def test_another_store_is_replaced(tmp_path):
    store().save_local(tmp_path)
    other = MatryoshkaVectorStore.from_texts(["xyz"], Letters(), ids=["id3"])
    other.save_local(tmp_path)
    again = MatryoshkaVectorStore.load_local(tmp_path, Letters())
    assert names(again._records.values()) == ["id3"]
    assert (tmp_path / "records.jsonl").read_bytes().count(b"\n") == 2  # the others' are gone


def test_a_document_that_json_changes_is_refused(tmp_path):
    """One whose metadata were not checked when it was added, as nothing of ours does."""
    found = store()
    found.save_local(tmp_path)
    before = (tmp_path / "records.jsonl").read_bytes()
    found.add_texts(["fine", "bad"], ids=["fine", "bad"])
    _, document = found._records._entries[found._records._rows["bad"]]
    for metadata in ({"day": date(2024, 1, 1)}, {1: 2}, {"pair": (1, 2)}, {"x": float("nan")}):
        document.metadata = metadata
        with pytest.raises(ValueError, match="'bad': expected what JSON"):
            found.save_local(tmp_path)
        assert (tmp_path / "records.jsonl").read_bytes() == before
    found.delete(["bad"])
    found.save_local(tmp_path)
    assert len(MatryoshkaVectorStore.load_local(tmp_path, Letters()).index) == 6


@pytest.mark.parametrize("name", [".DS_Store", ".gitkeep", "Thumbs.db"])
def test_what_desktops_and_git_leave_in_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"theirs")
    found = store()
    found.save_local(tmp_path)
    (tmp_path / "index" / name).write_bytes(b"theirs")
    found.add_texts(["more"])
    found.save_local(tmp_path)
    store().save_local(tmp_path)
    assert len(MatryoshkaVectorStore.load_local(tmp_path, Letters()).index) == 5
    for folder in (tmp_path, tmp_path / "index"):
        assert (folder / name).read_bytes() == b"theirs"


def test_folders_that_are_not_stores(tmp_path):
    for call in (
        lambda path: MatryoshkaVectorStore.load_local(path, Letters()),
        lambda path: MatryoshkaVectorStore.load_local(path / "nowhere", Letters()),
    ):
        with pytest.raises(FileNotFoundError, match="path: expected a folder"):
            call(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="path: expected a store or an empty folder, got .*notes"):
        store().save_local(tmp_path)


def test_damage_is_named(tmp_path):
    store().save_local(tmp_path)
    file = tmp_path / "records.jsonl"
    good = file.read_text()
    for bad, message in (
        (good.replace("langchain", "llama_index"), "records.jsonl: expected .* in the first line"),
        (
            good.replace('"version":1', '"version":2'),
            "records.jsonl: expected .* in the first line",
        ),
        ("", "in the first line"),
        ("\n".join(good.split("\n")[:3]), "expected a record of row .*, got none"),
        (good.replace("id1", "id0"), "expected no name twice"),
        (good.replace('"page_content"', '"page"'), "records.jsonl: row "),
    ):
        file.write_text(bad)
        with pytest.raises(ValueError, match=message):
            MatryoshkaVectorStore.load_local(tmp_path, Letters())
    file.write_text(good)
    for part in tmp_path.glob("index/rows-*"):
        part.unlink()
    with pytest.raises(ValueError, match="rows-"):
        MatryoshkaVectorStore.load_local(tmp_path, Letters())


def test_two_that_save_to_one_folder(tmp_path):
    store().save_local(tmp_path)
    first, second = (MatryoshkaVectorStore.load_local(tmp_path, Letters()) for _ in range(2))
    first.add_texts(["first"], ids=["new"])
    second.add_texts(["second"], ids=["new"])
    first.save_local(tmp_path)
    with pytest.raises(ValueError, match="which another has saved"):
        second.save_local(tmp_path)
    again = MatryoshkaVectorStore.load_local(tmp_path, Letters())
    assert again.get_by_ids(["new"])[0].page_content == "first"


KILLED = """
import builtins, os, signal, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from tests.helpers import langchain_store as tests
folder = Path(sys.argv[2])
load = lambda path: tests.MatryoshkaVectorStore.load_local(path, tests.Letters(), verify=True)

def kill_at(point):  # before or after a call that changes files
    count = 0
    def pass_by():
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
    def wrap(function):
        def call(*args, **kwargs):
            pass_by()
            result = function(*args, **kwargs)
            pass_by()
            return result
        return call
    for name in ("fsync", "replace", "unlink", "mkdir", "open"):
        setattr(os, name, wrap(getattr(os, name)))
    builtins.open = wrap(open)

def check(folder, fresh):  # fresh: the folder has another store
    seen = []
    for point in range(1, 1000):
        path = folder / str(point)
        found = tests.store()
        found.save_local(path)
        old = tests.contents(found)
        if fresh:
            found = tests.store()
        found.delete(["id0"])
        found.add_texts(["replaced", "added"], ids=["id1", "id9"])
        new = tests.contents(found)
        if not (child := os.fork()):
            kill_at(point)
            found.save_local(path)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        again = load(path)
        assert tests.contents(again) in ((old, new) if status else (new,)), point
        seen.append(tests.contents(again) == new)
        again.add_texts(["later"], ids=["id1"])
        again.save_local(path)
        assert tests.contents(load(path)) == tests.contents(again), point
        if not status:
            break
    assert status == 0 and seen == sorted(seen) and not seen[0] and len(seen) > 20, seen

for fresh in (False, True):
    check(folder / str(fresh), fresh)
"""


def test_a_killed_save_leaves_the_old_store_or_the_new(tmp_path):
    command = [sys.executable, "-c", KILLED, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("who", ["saved", "loaded", "fresh"])  # who saves after that
def test_half_a_line_is_skipped(tmp_path, monkeypatch, who):
    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    found = store()
    found.save_local(tmp_path)
    with open(tmp_path / "records.jsonl", "ab") as file:
        file.write(b'[12,["id0",{"id":"id0","page_cont')
    again = MatryoshkaVectorStore.load_local(tmp_path, Letters())
    assert contents(again) == contents(found)
    found = {"saved": found, "loaded": again, "fresh": store()}[who]
    found.add_texts(["x", "y"])
    with monkeypatch.context() as stopping:
        stopping.setattr(records.Journal, "rewrite", stop)  # it is saved, but not yet tidied up
        try:
            found.save_local(tmp_path)
        except Stop:
            pass
    assert contents(MatryoshkaVectorStore.load_local(tmp_path, Letters())) == contents(found)
    found.save_local(tmp_path)
    assert contents(MatryoshkaVectorStore.load_local(tmp_path, Letters())) == contents(found)


def test_loading_while_another_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SLACK", 0)  # often rewritten
    found, done = store(), threading.Event()
    found.save_local(tmp_path)

    def write():
        try:
            for i in range(60):
                found.add_texts([f"ab {i}", f"cd {i}"], ids=["id1", "id3"])
                found.save_local(tmp_path)
        finally:
            done.set()

    def read():
        while not done.is_set():
            again = MatryoshkaVectorStore.load_local(tmp_path, Letters())
            texts = [document.page_content for document in again.get_by_ids(["id1", "id3"])]
            assert texts == ["abb", "ccc"] or texts[0][3:] == texts[1][3:]

    in_threads(write, read, read)
