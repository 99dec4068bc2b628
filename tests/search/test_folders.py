"""An index's folder that others use, too: their files, their saves, their loads meanwhile."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.disk import filesystem, folder
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.shared.types import Tuned
from tests.helpers.index_model import (  # noqa: F401
    ROOT,
    assert_same,
    build,
    change,
    content,
    names,
    one_thread,
    quick,
    strays,
)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", "mine"),
        ("rows-1.safetensors", "mine"),
        ("manifest.json", '{"name": "a web page"}'),
        ("manifest.json", "not even JSON"),
        ("manifest.json", '{"format": "mrl_fast index", "version": 2}'),
    ],
)
def test_other_peoples_files_are_left_alone(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=f"path: expected an index or an empty .*/{name}"):
        build()[0].save(tmp_path)
    assert content(tmp_path) == before
    if name != "manifest.json":
        # Beside an index they stay, too.
        (tmp_path / name).rename(tmp_path.parent / name)
        build()[0].save(tmp_path)
        (tmp_path.parent / name).rename(tmp_path / name)
        build()[0].save(tmp_path)
        assert (tmp_path / name).read_text() == text


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "index"):
        with pytest.raises(OSError):
            build()[0].save(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_lost_update_is_refused(tmp_path):
    one, model = build()
    one.save(tmp_path)
    other, others = MatryoshkaIndex.load(tmp_path), model.copy()
    change(one, model)
    one.save(tmp_path)
    change(other, others, seed=9)
    with pytest.raises(ValueError, match=r"generation 1\), got generation 2, which another has"):
        other.save(tmp_path)
    assert_same(other, others)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)
    one.save(tmp_path)  # it was not harmed by the attempt
    other.save(tmp_path / "elsewhere")
    assert_same(MatryoshkaIndex.load(tmp_path / "elsewhere", verify=True), others)
    assert not strays(tmp_path, "elsewhere")


def test_a_folder_has_one_name(tmp_path):
    index, model = build()
    index.save(tmp_path / "s")
    (tmp_path / "there").symlink_to(tmp_path / "s")
    for i, path in enumerate([tmp_path / "there", tmp_path / "s" / ".." / "s", tmp_path / "s"]):
        change(index, model, seed=i)
        index.save(path)
        assert_same(MatryoshkaIndex.load(tmp_path / "s", verify=True), model)


@pytest.mark.parametrize("how", ["saved", "loaded", "copied"])
def test_every_folder_is_remembered(how, tmp_path):
    one, model = build()
    one.save(tmp_path / "s")
    if how != "saved":
        one = MatryoshkaIndex.load(tmp_path / "s")
    other, others = MatryoshkaIndex.load(tmp_path / "s"), model.copy()
    change(other, others)
    other.save(tmp_path / "s")
    one.save(tmp_path / "elsewhere")
    if how == "copied":
        one = copy.copy(one)
    change(one, model, seed=9)
    with pytest.raises(ValueError, match=r"generation 1\), got generation 2, which another has"):
        one.save(tmp_path / "s")
    assert_same(MatryoshkaIndex.load(tmp_path / "s", verify=True), others)
    one.save(tmp_path / "elsewhere")
    assert_same(MatryoshkaIndex.load(tmp_path / "elsewhere", verify=True), model)
    build()[0].save(tmp_path / "s")  # a new one replaces what there is


@pytest.mark.parametrize("options", [{}, {"codes": "bits", "rotation": "pca"}], ids=str)
def test_a_save_that_changes_nothing_writes_nothing(options, tmp_path):
    one, model = build(**options)
    one._tuned = Tuned([(5, 40), (20, 4)], 4, len(one), 0.9)
    one.remove(model.ids[:1])
    one.save(tmp_path)
    before, other = content(tmp_path), MatryoshkaIndex.load(tmp_path)
    for same in (one, other, MatryoshkaIndex.load(tmp_path), copy.copy(one)):
        same.save(tmp_path)
        assert content(tmp_path) == before
    assert len(pickle.dumps(other)) < 1000
    other.remove(model.ids[1:2])
    other.save(tmp_path)  # nobody else is in its way
    for change_one in (lambda: other.add(one.reconstruct([2]), [999]),
                       lambda: other.remove([999]), other.compact,
                       lambda: setattr(other, "_tuned", None)):  # fmt: skip
        change_one()
        generation = other._saved.manifest["generation"]
        other.save(tmp_path)
        assert other._saved.manifest["generation"] == generation + 1
        again = MatryoshkaIndex.load(tmp_path, verify=True)
        assert torch.equal(again.ids, other.ids) and again.tuned == other.tuned


def test_a_tuned_index_is_saved_again(tmp_path):
    one, model = build()
    one._tuned = Tuned([(5, 40), (20, 4)], 4, len(one), 0.9)  # tuples, of which JSON makes lists
    for seed in (9, 10):
        one.save(tmp_path)
        change(one, model, seed)
    one.save(tmp_path)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)


def test_a_file_of_faiss_is_no_folder(tmp_path):
    (tmp_path / "x.faiss").write_bytes(b"IxF2")
    with pytest.raises(ValueError, match=r"x.faiss \(one of FAISS: .*read_index"):
        MatryoshkaIndex.load(tmp_path / "x.faiss")


def test_one_saves_at_a_time(tmp_path):
    index, _ = build()
    index.save(tmp_path)
    index.remove(index.ids[:1])
    other = threading.Thread(target=index.save, args=(tmp_path,))
    with filesystem.locked(tmp_path):
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive() and len(names(tmp_path)) == 2
    other.join()


def test_saved_anew_while_it_is_opened(tmp_path, monkeypatch):
    index, model = build()
    index.save(tmp_path)
    reads, read = [], manifests.read

    def overtaken(path):
        manifest = read(path)
        reads.append(manifest["generation"])
        if len(reads) == 1:  # between the manifest and its files, all of which go
            index.remove(index.ids[:1])
            index.compact()
            model.remove(model.ids[:1])
            index.save(tmp_path)
        return manifest

    monkeypatch.setattr(folder.manifests, "read", overtaken)
    assert_same(MatryoshkaIndex.load(tmp_path), model)
    assert reads[0] == 1 and reads[-1] == 2


SAVER = """
import os, sys, torch
from mrl_fast import MatryoshkaIndex
os.fsync = lambda _: None
torch.set_num_threads(1)
index = MatryoshkaIndex((5, 20))
state = 0
while True:  # at state s: the ids from s on, 70 of them, each a vector of its id
    wanted = torch.arange(state, state + 70)
    new = wanted[~index.contains(wanted)]
    index.add(new[:, None].float().expand(-1, 20).contiguous(), new)
    index.remove(index.ids[~torch.isin(index.ids, wanted)])
    if state % 3 == 0:
        index.compact()
    index.save(sys.argv[1])
    if state == 0:
        print("saved", flush=True)
    state += 1
"""


def test_loading_while_another_process_saves(tmp_path):
    command = [sys.executable, "-c", SAVER, str(tmp_path / "index")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as saver:
        try:
            assert saver.stdout.readline() == "saved\n"
            states, loads = set(), 0
            while loads < 300 or len(states) < 20:
                assert saver.poll() is None
                index = MatryoshkaIndex.load(tmp_path / "index", verify=loads % 2 == 0)
                loads += 1
                ids = index.ids
                state = int(ids.min())
                assert ids.sort().values.tolist() == list(range(state, state + 70))
                assert torch.equal(index.reconstruct(ids), ids[:, None].float().expand(-1, 20))
                assert state >= max(states, default=0)
                states.add(state)
        finally:
            saver.kill()
