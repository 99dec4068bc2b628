"""File systems that lack locks, syncs or maps; folders that hold more than an index; what torch
makes by default. What a save writes stays the same, and can be loaded."""

import errno
import fcntl
import gc
import mmap
import os
import stat
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.integrations.stores.journal import Journal, line_of
from mrl_fast.integrations.stores.records import Codec, Records
from mrl_fast.search.disk import filesystem, folder
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.disk.filesystem import FileSystemWarning
from tests.helpers.disk import Disk
from tests.helpers.index_model import (  # noqa: F401
    DIMS,
    assert_same,
    build,
    change,
    content,
    names,
    one_thread,
    quick,
    strays,
    vectors,
)
from tests.helpers.torch_states import STATES

pytestmark = pytest.mark.usefixtures("quick", "nothing_said")

LACKING = [
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EPERM,
    errno.ENOSYS,
    errno.ENOLCK,
]
REAL = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ESTALE]


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(filesystem, "_warned", set())


def fails(code, only_folders):
    """A call for a file descriptor that the file system answers with an error."""

    def call(descriptor, *_):
        if not only_folders or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))

    return call


@contextmanager
def lacking(operation, code):
    with pytest.MonkeyPatch.context() as patch:
        if operation == "lock":
            patch.setattr(fcntl, "flock", fails(code, True))
        else:
            patch.setattr(os, "fsync", fails(code, operation == "sync a folder"))
        yield


def store():
    records = Records(Codec("test", str, str), DIMS, {})
    records.put(["a", "b"], vectors(2, DIMS[-1], 0), ["A", "B"])
    return records


# --- operations that a file system does not have


@pytest.mark.parametrize("code", LACKING, ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", ["lock", "sync a folder", "sync"])
def test_it_is_done_without_and_said_once_a_folder(operation, code, tmp_path):
    index, model = build()
    with lacking(operation, code):
        for name in ("a", "b"):
            path = tmp_path / name
            path.mkdir()
            with pytest.warns(
                FileSystemWarning, match=f"{path}: .* {operation[:4]} .*, got "
            ) as said:
                index.save(path)
            assert len(said) == 1
            index.remove(index.ids[:1])
            model.remove(model.ids[:1])
            index.save(path)  # a second warning would raise here
            assert_same(MatryoshkaIndex.load(path, verify=True), model)
            assert not strays(path)


@pytest.mark.parametrize("code", REAL, ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", ["lock", "sync a folder", "sync"])
def test_real_errors_name_the_path(operation, code, tmp_path):
    index, model = build()
    index.save(tmp_path)
    change(index, model)
    before = content(tmp_path)
    with lacking(operation, code), pytest.raises(OSError, match=str(tmp_path)) as error:
        index.save(tmp_path)
    assert error.value.errno == code and content(tmp_path) == before


def test_a_full_disk_names_the_file(tmp_path):
    class Full(Disk):
        def before(self, name, *args):
            if name == "write":
                raise OSError(errno.ENOSPC, "disk full")

    with Full().watched(), pytest.raises(OSError, match="disk full.*rows-00000001.safetensors"):
        build()[0].save(tmp_path)


def test_a_warning_that_is_made_an_error_breaks_nothing(tmp_path):
    index, model = build()
    index.save(tmp_path)
    change(index, model)
    for operation in ("lock", "sync a folder", "sync"):
        filesystem._warned.clear()
        with lacking(operation, errno.EINVAL), warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(FileSystemWarning):
                index.save(tmp_path)
    index.save(tmp_path)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)
    assert not strays(tmp_path)


def test_loading_takes_no_lock(tmp_path, monkeypatch):
    index, model = build()
    index.save(tmp_path / "index")
    store().save(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fails(errno.EIO, True))
        assert_same(MatryoshkaIndex.load(tmp_path / "index"), model)
        loaded = Records(Codec("test", str, str), None, {})
        loaded.load(tmp_path / "store", verify=True)
        assert loaded.values() == ["A", "B"]
    with filesystem.locked(tmp_path / "index"), filesystem.locked(tmp_path / "store"):
        MatryoshkaIndex.load(tmp_path / "index")
        Records(Codec("test", str, str), None, {}).load(tmp_path / "store", verify=True)


def test_a_store_that_is_saved_while_it_is_loaded(tmp_path, monkeypatch):
    """Between the index and the records, which are written anew without those of the old index."""
    saving = store()
    saving.save(tmp_path)
    load, loads = MatryoshkaIndex.load, []

    def overtaken(*args, **options):
        index = load(*args, **options)
        loads.append(index)
        if len(loads) == 1:
            saving.put(["a", "b"], vectors(2, DIMS[-1], 1), ["A2", "B2"])
            saving.save(tmp_path)
            saving._journal.rewrite(saving._lines(saving._entries))
        return index

    monkeypatch.setattr(MatryoshkaIndex, "load", overtaken)
    loaded = Records(Codec("test", str, str), None, {})
    loaded.load(tmp_path, verify=False)
    assert loaded.values() == ["A2", "B2"] and len(loads) == 2


def test_records_that_come_while_others_are_read(tmp_path, monkeypatch):
    """The next append must not take the file for one that it has read to its end."""
    journal = Journal(tmp_path / "records", "test")
    journal.append([line_of([1, "a"])])
    assert journal.unchanged
    fstat = os.fstat

    def overtaken(descriptor):
        with open(tmp_path / "records", "ab") as file:
            file.write(b'[2, "half a li')
        return fstat(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", overtaken)
        assert journal.read({1}) == {1: "a"}
    assert not journal.unchanged
    journal.append([line_of([3, "c"])])
    assert journal.read({1, 3}) == {1: "a", 3: "c"}


def test_a_folder_that_never_rests(tmp_path, monkeypatch):
    index, _ = build()
    index.save(tmp_path)
    tries, opened = [], folder.Files.opened

    def overtaken(*args):
        with monkeypatch.context() as patch:  # the save opens its files, too
            patch.setattr(folder.Files, "opened", opened)
            tries.append(len(index))
            index.add(index.reconstruct(index.ids[:1]))  # on a fast machine very often
            index.remove(index.ids[:1])
            index.compact()
            index.save(tmp_path)
        return opened(*args)

    monkeypatch.setattr(manifests, "PATIENCE_S", 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(folder.Files, "opened", overtaken)
        with pytest.raises(ValueError, match=f"{tmp_path}: expected a folder that rests"):
            MatryoshkaIndex.load(tmp_path)
    assert len(tries) > 1
    MatryoshkaIndex.load(tmp_path)


def test_no_shared_maps_and_no_advice(tmp_path, monkeypatch):
    class Map(mmap.mmap):
        def __new__(cls, descriptor, size, flags, protection):
            if flags & mmap.MAP_SHARED:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            return super().__new__(cls, descriptor, size, flags, protection)

        def madvise(self, *_):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    index, model = build()
    index.save(tmp_path)
    monkeypatch.setattr(mmap, "mmap", Map)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)


# --- folders


@pytest.mark.parametrize(
    "name",
    [".DS_Store", ".gitkeep", ".nfs000000000123", "Thumbs.db", "desktop.ini", "lost+found"],
)
def test_clutter_is_left_alone(name, tmp_path):
    index, model = build()
    for save, path in ((index.save, tmp_path / "index"), (store().save, tmp_path / "store")):
        path.mkdir()
        (path / name).write_text("theirs")
        for _ in range(2):
            save(path)
        assert (path / name).read_text() == "theirs"
    assert_same(MatryoshkaIndex.load(tmp_path / "index", verify=True), model)


# --- what cannot be read again replaces nothing


def test_a_file_that_is_gone_is_not_named_again(tmp_path):
    index, model = build()
    index.save(tmp_path)
    change(index, model)
    (tmp_path / "rows-00000001.safetensors").unlink()
    manifest = (tmp_path / manifests.FILE).read_bytes()
    with pytest.raises(FileNotFoundError, match="rows-00000001.safetensors"):
        index.save(tmp_path)
    assert names(tmp_path) == [manifests.FILE]
    assert (tmp_path / manifests.FILE).read_bytes() == manifest
    index.save(tmp_path / "elsewhere")  # it still maps the file
    assert_same(MatryoshkaIndex.load(tmp_path / "elsewhere", verify=True), model)


@pytest.mark.parametrize("wrong", [lambda x: x.double(), lambda x: x[:, 1:], lambda x: x[:, :0]])
def test_tensors_that_are_not_as_the_header_says(wrong, tmp_path, monkeypatch):
    index, model = build()
    index.save(tmp_path)
    before = content(tmp_path)
    index.add(vectors(3, DIMS[-1], 1))
    arrays = index._rows.snapshot.blocks[-1].arrays
    monkeypatch.setitem(arrays, "tail", wrong(arrays["tail"]))
    with pytest.raises(TypeError, match="rows-00000002.safetensors: tail: expected .*, got "):
        index.save(tmp_path)
    assert content(tmp_path) == before


def test_a_file_of_another_process_is_not_deleted(tmp_path, monkeypatch):
    """Where folders cannot be locked, two may choose the same name."""
    index, model = build()
    index.save(tmp_path)
    change(index, model)
    theirs = tmp_path / "rows-00000002.safetensors"
    collect = folder.collect

    def overtaken(*args):
        collect(*args)
        theirs.write_text("theirs")

    monkeypatch.setattr(folder, "collect", overtaken)
    with pytest.raises(FileExistsError):
        index.save(tmp_path)
    assert theirs.read_text() == "theirs"


# --- torch's defaults


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("options", [{}, {"prefix_dtype": "int8", "rotation": "pca"}], ids=str)
def test_the_same_bytes_whatever_torch_makes_by_default(state, options, tmp_path):
    index, model = build(**options)
    change(index, model)
    index.save(tmp_path / "plain")
    with STATES[state]():
        index.save(tmp_path / "saved")
        again = MatryoshkaIndex.load(tmp_path / "plain", verify=True)
    assert content(tmp_path / "saved") == content(tmp_path / "plain")
    now = again._rows.snapshot
    kept = [now.live, now.blocks[0].suffix, again.rotation]
    assert not any(x.is_inference() for x in kept if x is not None)
    change(again, model, seed=9)  # outside of it
    assert_same(again, model)
    again.save(tmp_path / "plain")
    assert_same(MatryoshkaIndex.load(tmp_path / "plain", verify=True), model)


@pytest.mark.parametrize("prefix_dtype", ["float32", "int8"])
def test_no_memory_is_written_that_nobody_filled(prefix_dtype, tmp_path):
    def save(path):
        index, model = build(prefix_dtype=prefix_dtype)
        change(index, model)
        index.save(path)
        return content(path)

    plain = save(tmp_path / "plain")
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    try:
        assert save(tmp_path / "filled") == plain
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_lock_that_was_left_to_the_collector(tmp_path):
    """An interrupt while a save lets go of its lock leaves the lock in a cycle of references."""
    index, _ = build()
    index.save(tmp_path)
    held = [filesystem.locked(tmp_path)]
    held.append(held)
    held[0].__enter__()
    gc.disable()  # or it might run before the save
    try:
        del held
        saver = threading.Thread(target=index.save, args=(tmp_path,), daemon=True)
        saver.start()
        saver.join(30)
        assert not saver.is_alive()
    finally:
        gc.enable()
