"""A saved index: what is written, when, and what comes back; whatever the disk does."""

import errno
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mrl_fast import MatryoshkaIndex, files
from mrl_fast import _tensorfile as tensorfile
from mrl_fast import manifest as manifests
from mrl_fast._types import Tuned
from tests.index_model import (  # noqa: F401
    DIMS,
    ROOT,
    Model,
    assert_same,
    build,
    change,
    names,
    one_thread,
    strays,
    vectors,
)


def content(folder):
    return {name: (folder / name).read_bytes() for name in names(folder)}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("rotation", [None, "pca"])
@pytest.mark.parametrize("prefix_dtype", ["float32", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_round_trip(metric, dtype, prefix_dtype, rotation, tmp_path, quick):
    options = dict(metric=metric, dtype=dtype, prefix_dtype=prefix_dtype, rotation=rotation)
    index, model = build(**options)
    change(index, model)
    index._tuned = Tuned([(5, 30), (20, 4)], 4, len(index))
    index.save(tmp_path)
    q = vectors(9, DIMS[-1], 1)
    for verify in (False, True):
        again = MatryoshkaIndex.load(tmp_path, verify=verify)
        assert_same(again, model)
        assert repr(again) == repr(index) and again.tuned == index.tuned
        if rotation:
            assert torch.equal(again.rotation, index.rotation)
        for how in ({"exact": True}, {}, {"stages": [(5, 50), (20, 10)]}):
            ours, theirs = index.search(q, 4, **how), again.search(q, 4, **how)
            assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.ids, theirs.ids)
    change(again, model, seed=6)
    again.save(tmp_path)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)


def test_without_vectors(tmp_path):
    MatryoshkaIndex(DIMS).save(tmp_path)
    again = MatryoshkaIndex.load(tmp_path, verify=True)
    assert len(again) == 0 and names(tmp_path) == ["manifest.json"]
    index = MatryoshkaIndex(DIMS, rotation="pca")
    index.fit(vectors(100, DIMS[-1], 0))
    index.save(tmp_path)
    again = MatryoshkaIndex.load(tmp_path, verify=True)
    assert torch.equal(again.rotation, index.rotation)
    index, model = build()
    index.remove(index.ids)
    index.save(tmp_path)  # removed rows and no others
    again = MatryoshkaIndex.load(tmp_path)
    assert len(again) == 0 and (again.search(vectors(1, DIMS[-1], 0), 2).ids == -1).all()
    again.compact()
    again.save(tmp_path)
    again = MatryoshkaIndex.load(tmp_path)
    again.add(vectors(2, DIMS[-1], 0))
    assert again.ids.tolist() == [150, 151]  # ids of removed vectors are not used again


def test_elsewhere_everything_is_written(tmp_path, quick):
    index, model = build()
    index.save(tmp_path / "a")
    index.save(tmp_path / "b")  # nothing has changed, and yet this folder has nothing
    assert_same(MatryoshkaIndex.load(tmp_path / "b", verify=True), model)
    change(index, model)
    index.save(tmp_path / "a")  # where it was saved before, but not last
    assert_same(MatryoshkaIndex.load(tmp_path / "a", verify=True), model)
    assert not strays(tmp_path / "a")


def test_a_rotation_that_was_fitted_anew(tmp_path, quick):
    index, model = build(rotation="pca")
    index.save(tmp_path)
    index.remove(index.ids)
    index.compact()
    index.fit(vectors(50, DIMS[-1], 3))
    index.add(vectors(9, DIMS[-1], 4))
    model.remove(model.ids)
    model.add(vectors(9, DIMS[-1], 4))
    index.save(tmp_path)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)
    assert not strays(tmp_path)


def test_an_index_is_replaced_by_another(tmp_path, quick):
    build(rows=500)[0].save(tmp_path)
    before = names(tmp_path)
    other, model = build(rows=3, metric="l2", prefix_dtype="int8", rotation="pca")
    other.save(tmp_path)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)
    assert not strays(tmp_path) and before[1] not in names(tmp_path)


def test_only_what_is_new_is_written(tmp_path, quick):
    index, model = build(rows=200)
    index.save(tmp_path)

    def state():
        status = {name: (tmp_path / name).stat() for name in names(tmp_path)}
        return {name: (s.st_mtime_ns, s.st_ino, s.st_size) for name, s in status.items()}

    def saved():
        """What is left of the files before, what is new, and the index that is loaded again."""
        before, bytes_before = state(), content(tmp_path)
        index.save(tmp_path)
        after, bytes_after = state(), content(tmp_path)
        kept = {name for name in before if name in after and name != "manifest.json"}
        assert all(before[name] == after[name] for name in kept)
        assert all(bytes_before[name] == bytes_after[name] for name in kept)
        assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)
        return kept, sorted(set(after) - set(before))

    first = "rows-00000001.safetensors"
    index.add(vectors(40, DIMS[-1], 1))
    model.add(vectors(40, DIMS[-1], 1))
    assert saved() == ({first}, ["rows-00000002.safetensors"])
    assert (tmp_path / "rows-00000002.safetensors").stat().st_size < 1.5 * 64 * 23 * 4
    index.remove(torch.tensor([3]))
    model.remove([3])
    assert saved()[1] == ["alive-00000003.safetensors"]
    assert saved() == (set(names(tmp_path)) - {"manifest.json"}, [])  # nothing has changed
    index = MatryoshkaIndex.load(tmp_path)  # which knows what is there
    index.update(torch.tensor([5]), vectors(1, DIMS[-1], 2))
    model.update([5], vectors(1, DIMS[-1], 2))
    kept, new = saved()
    assert first in kept and new == ["alive-00000005.safetensors", "rows-00000005.safetensors"]
    index.compact()
    kept, new = saved()
    assert new == ["rows-00000006.safetensors"] and not kept


# The files of 7 a tier, log(tiles) / log(8) tiers, and the manifest; a tile is 64 rows.
@pytest.mark.parametrize(("rows", "saves", "files"), [(1, 1000, 12), (64, 400, 23)])
def test_many_small_saves(rows, saves, files, tmp_path, quick):
    index, model = MatryoshkaIndex(DIMS), Model(DIMS[-1])
    most, written, before = 0, 0, set()
    for i in range(saves):
        x = vectors(rows, DIMS[-1], i)
        index.add(x)
        model.add(x)
        index.save(tmp_path)
        now = set(names(tmp_path))
        written += sum((tmp_path / name).stat().st_size for name in now - before)
        most, before = max(most, len(now)), now
    again = MatryoshkaIndex.load(tmp_path, verify=True)
    assert again.ids.tolist() == model.ids
    assert torch.equal(again.reconstruct(again.ids), model.matrix)
    assert most <= files
    tile = 64 * (20 + 3 + 2) * 4  # bytes: of vectors, norms and ids
    assert written < 4 * saves * tile


@pytest.mark.parametrize("prefix_dtype", ["float32", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_programs_can_read_the_files(dtype, prefix_dtype, tmp_path, quick):
    index, model = build(dtype=dtype, prefix_dtype=prefix_dtype, rotation="pca")
    change(index, model)
    index.save(tmp_path)
    block = index._store.snapshot.blocks[0]
    count = index._store.snapshot.count
    for name in names(tmp_path):
        if name == "manifest.json":
            continue
        header = int.from_bytes((tmp_path / name).read_bytes()[:8], "little")
        assert (8 + header) % 64 == 0
        with safe_open(tmp_path / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if name.startswith("rows"):
            assert torch.equal(tensors["ids"][:count], block.ids[:count])
            assert torch.equal(tensors["tail"][:count], block.tail[:count])
            assert torch.equal(tensors["stats"][:, :count], block.stats[:, :count])
            own = block.codes if prefix_dtype == "int8" else block.packed
            whole = count // 64
            stored = tensors["codes" if prefix_dtype == "int8" else "packed"]
            assert torch.equal(stored[:whole], own[:whole])
            assert not stored[whole:, :, count % 64 :].any()  # nothing else of our memory
            assert set(tensors) == {"ids", "tail", "stats"} | (
                {"codes"} if prefix_dtype == "int8" else {"packed"}
            )
        elif name.startswith("axes"):
            assert torch.equal(tensors["axes"], index.rotation)
        else:
            bits = np.unpackbits(tensors["alive"].numpy().view(np.uint8), bitorder="little")
            assert bits.sum() == len(index)


# --- what is no index


def test_what_cannot_be_loaded(tmp_path, quick):
    with pytest.raises(FileNotFoundError, match=f"path: .*, got {tmp_path}"):
        MatryoshkaIndex.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MatryoshkaIndex.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/manifest.json: expected a file to read"):
        MatryoshkaIndex.load(tmp_path / "file")
    with pytest.raises(ValueError, match="device: expected one of 'cpu', got 'cuda'"):
        MatryoshkaIndex.load(tmp_path, device="cuda")
    folder = tmp_path / "index"
    build()[0].save(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "metric": "ip"}))
    with pytest.raises(ValueError, match=f"{folder}/manifest.json: sha256: expected .*, got '"):
        MatryoshkaIndex.load(folder)
    changed = manifests.signed({**manifest, "version": 2})
    (folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"{folder}/manifest.json: version: expected 1, got 2"):
        MatryoshkaIndex.load(folder)
    nothing = tensorfile.write(
        folder / "alive-00000001.safetensors", {"alive": (torch.int64, (0,))}, []
    )
    entry = {"file": "alive-00000001.safetensors", "sha256": nothing}
    changed = manifests.signed({**manifest, "segments": [], "alive": entry})
    (folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="manifest.json: alive: expected none without rows"):
        MatryoshkaIndex.load(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "rows-00000001.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{folder}/rows-00000001.safetensors: expected a file"):
        MatryoshkaIndex.load(folder)


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


# --- others at the same folder


def test_a_lost_update_is_refused(tmp_path, quick):
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


def test_one_saves_at_a_time(tmp_path, quick):
    index, _ = build()
    index.save(tmp_path)
    other = threading.Thread(target=index.save, args=(tmp_path,))
    with files._locked(tmp_path):
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive() and len(names(tmp_path)) == 2
    other.join()


def test_saved_anew_while_it_is_opened(tmp_path, quick, monkeypatch):
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

    monkeypatch.setattr(files.manifests, "read", overtaken)
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


FULL = """
import resource, sys, torch
from mrl_fast import MatryoshkaIndex
index = MatryoshkaIndex((5, 20))
index.add(torch.randn(50, 20))
index.save(sys.argv[1])
kept = index.ids.clone()
index.add(torch.randn(10_000, 20))
for limit in (0, 1, 300, 4096, 500_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        index.save(sys.argv[1])
        raise AssertionError(limit)
    except OSError as error:
        print(limit, error.strerror)
    assert torch.equal(MatryoshkaIndex.load(sys.argv[1], verify=True).ids, kept)
    assert index.search(torch.zeros(1, 20), 3).ids.min() >= 0
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
index.save(sys.argv[1])
assert torch.equal(MatryoshkaIndex.load(sys.argv[1], verify=True).ids, index.ids)
"""


def test_files_that_may_not_grow(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "index")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(os.strerror(errno.EFBIG)) == 5
    assert not strays(tmp_path / "index")
