"""Saves of a sharded index that fail, are cut off or killed: the folder holds old or new."""

import os
import shutil
import signal
import time

import pytest
import torch

from mrl_fast import MatryoshkaIndex, ShardedIndex
from mrl_fast.cli.folders import files_of
from tests.helpers.disk import Failing
from tests.helpers.index_model import DIMS, TIMES, one_thread, quick, vectors  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
SHARDS = 3


def made(seed=0):
    index = ShardedIndex(DIMS, shards=SHARDS)
    index.add(vectors(200, DIMS[-1], seed))
    return index


def change(index):
    x = vectors(90, DIMS[-1], 7)
    index.add(x[:80])
    index.remove([3, 50, 201])
    index.update([1, 2, 4], x[80:83])


def state(index):
    return index.ids.tolist(), index.reconstruct(index.ids).tolist()


def held(folder):
    """What a folder holds, whose every checksum is as it was written."""
    return state(MatryoshkaIndex.load(folder, verify=True))


def strays(folder):
    """Files that no manifest names."""
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return sorted(there - set(files_of(folder)))


@pytest.mark.parametrize("mode", ["before", "after", "stays"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_fails_anywhere(mode, error, tmp_path, quick):  # noqa: F811
    def fail():
        raise error

    source = tmp_path / "source"
    made().save(source)
    old, calls = held(source), 0
    changed = ShardedIndex.load(source)
    change(changed)
    new, at, step = state(changed), 0, 1 if TIMES > 1 else 9
    while True:
        folder = tmp_path / "folder"
        shutil.copytree(source, folder)
        index = ShardedIndex.load(folder)
        change(index)
        disk = Failing(at, fail, mode)
        try:
            with disk.watched():
                index.save(folder)
        except (OSError, KeyboardInterrupt):
            pass
        now = held(folder)
        assert now in (old, new)
        assert state(index) == new
        index.save(folder)  # goes on where it failed
        assert held(folder) == new
        assert not [name for name in os.listdir(folder) if name.endswith(".new")]
        shutil.rmtree(folder)
        if not disk.failed:
            break
        calls, at = calls + 1, at + step
    assert calls > 5


def test_another_process_goes_on_after_a_save_that_was_cut_off(tmp_path, quick):  # noqa: F811
    """A shard was saved and the whole was not: it is opened, and saved, as the whole has it."""
    folder = tmp_path / "folder"
    made().save(folder)
    old = held(folder)
    cut = ShardedIndex.load(folder)
    change(cut)
    cut._shards.shards[1].save(folder / "shard-00001", cut._left[folder]["shards"][1])
    assert held(folder) == old
    index = ShardedIndex.load(folder)
    index.add(vectors(5, DIMS[-1], 9))
    index.save(folder)
    assert held(folder) == state(index) and strays(folder) == []
    with pytest.raises(ValueError, match="as this index left it .*which another has saved"):
        cut.save(folder)
    assert held(folder) == state(index)


def save_for_ever(folder, pipe):
    """In a child, until it is killed."""
    index = ShardedIndex.load(folder)
    os.write(pipe, b"go")
    while True:
        index.add(torch.full((9, DIMS[-1]), float(len(index))))
        index.remove(index.ids[:2])
        index.save(folder)


def test_kills(tmp_path, quick):  # noqa: F811
    """The folder always verifies, and holds what one of the saves left."""
    folder = tmp_path / "folder"
    made().save(folder)
    generator = torch.Generator().manual_seed(0)
    saved = set()
    for _ in range(15 * TIMES):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                save_for_ever(folder, write)
            finally:
                os._exit(1)
        assert os.read(read, 2) == b"go"
        os.close(read)
        os.close(write)
        time.sleep(0.1 * float(torch.rand((), generator=generator)))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        index = MatryoshkaIndex.load(folder, verify=True)
        assert (len(index) - 200) % 7 == 0
        added = index.reconstruct(index.ids[index.ids >= 200])
        assert bool((added == added[:, :1]).all())
        saved.add(len(index))
    assert len(saved) > 3
    index.save(folder)
    assert strays(folder) == []


def test_folders_that_are_something_else(tmp_path, quick):  # noqa: F811
    index, one = made(), MatryoshkaIndex(DIMS)
    one.save(tmp_path / "one")
    index.save(tmp_path / "many")
    for folder, target in ((tmp_path / "one", index), (tmp_path / "many", one)):
        with pytest.raises(ValueError, match="path: expected an? .*index or an empty folder, got"):
            target.save(folder)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="empty folder, got .*thesis.txt"):
        index.save(tmp_path / "more")
    few = ShardedIndex(DIMS, shards=2)
    few.save(tmp_path / "many")  # another index, of fewer shards, replaces it
    assert sorted(os.listdir(tmp_path / "many"))[-2:] == ["shard-00000", "shard-00001"]
    assert held(tmp_path / "many") == ([], [])
    with pytest.raises(ValueError, match="generation 1.*, got generation 2.*another has saved"):
        index.save(tmp_path / "many")


def damaged(folder, text, change):
    file = folder / "manifest.json"
    assert text in file.read_text()
    file.write_text(file.read_text().replace(text, change, 1))


@pytest.mark.parametrize(
    ("text", "change", "said"),
    [
        ('"dealt": 200', '"dealt": 201', "manifest.json: sha256: expected "),
        ('"version": 1', '"version": 9', "manifest.json: version: expected 1, got 9"),
        ("{", "", "manifest.json: expected JSON"),
    ],
)
def test_damage_is_named(text, change, said, tmp_path, quick):  # noqa: F811
    made().save(tmp_path / "folder")
    damaged(tmp_path / "folder", text, change)
    with pytest.raises(ValueError, match=said):
        ShardedIndex.load(tmp_path / "folder")


def test_a_damaged_order_is_named(tmp_path, quick):  # noqa: F811
    folder = tmp_path / "folder"
    made().save(folder)
    (file,) = folder.glob("order-*")
    data = bytearray(file.read_bytes())
    data[-24:-16] = (1 << 61).to_bytes(8, "little")  # the last run begins beyond all rows
    file.write_bytes(data)
    with pytest.raises(ValueError, match="order-00000001.safetensors: order: expected runs of"):
        ShardedIndex.load(folder)
