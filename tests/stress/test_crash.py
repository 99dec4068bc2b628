"""A save that is cut off: by a call that fails, by Ctrl-C, by a power cut. The folder holds the old
index or the new one, and the next save works and leaves no strays."""

import errno
import itertools
import os
import shutil
import stat
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mrl_fast import MatryoshkaIndex
from tests.helpers.disk import Disk, Failing, Platters, creates
from tests.helpers.index_model import (  # noqa: F401
    DIMS,
    TIMES,
    assert_same,
    build,
    change,
    names,
    one_thread,
    strays,
    vectors,
)


def state_of(folder, models):
    """Which of these states a folder holds; None is one without an index."""
    try:
        index = MatryoshkaIndex.load(folder, verify=True)
    except FileNotFoundError:
        return models.index(None)
    which = [i for i, model in enumerate(models) if model and model.ids == index.ids.tolist()]
    assert len(which) == 1
    assert_same(index, models[which[0]])
    return which[0]


def built(folder, first):
    """An index to be saved to a folder, and what the folder holds before and after."""
    index, model = build(rotation="pca")
    index.remove(index.ids[:1])
    model.remove(model.ids[:1])
    index.build_graph(progress=False)
    if first:
        return index, [None, model]
    index.save(folder)
    before = model.copy()
    index.compact()  # so that old files go
    change(index, model)
    index.build_graph(progress=False)
    return index, [before, model]


# --- calls that fail


@pytest.mark.parametrize("mode", ["before", "after", "stays"])
@pytest.mark.parametrize("first", [True, False], ids=["first save", "later save"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()],
    ids=["disk full", "interrupted"],
)
def test_any_call_that_fails(error, first, mode, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def fail():
        raise error

    outcomes, left = Counter(), 0
    for at in itertools.count():
        folder = tmp_path / str(at)
        index, models = built(folder, first)
        with Failing(at, fail, mode).watched() as disk:
            try:
                index.save(folder)
            except type(error) as raised:
                assert raised is error
        if not disk.failed:
            break
        state = state_of(folder, models)
        outcomes[state] += 1
        model = models[1]
        assert_same(index, model)
        if state == 0 and not first:
            left += bool(strays(folder, "manifest.json.new"))
        if at % 3 == 0:
            change(index, model, seed=6)
        elif at % 3 == 1:
            index.compact()
        index.save(folder)
        assert_same(MatryoshkaIndex.load(folder, verify=True), model)
        assert not strays(folder)
    assert outcomes[0] > 10 and outcomes[1] > 1, outcomes
    assert left <= 1 or mode == "stays"  # where the replacement fails nothing is deleted yet


def interrupted(call, at):
    """Whether Ctrl-C came, at a moment when Python looks for it: where functions are entered and
    where they return."""
    moments = itertools.count()

    def interrupt(frame, event, function):
        if event != "c_call" and function is not sys.setprofile and next(moments) == at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(interrupt)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


# Between open() and its with statement nothing but the garbage collector can close a file.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("what", ["first add", "add", "update", "remove", "compact", "save"])
def test_interrupted_at_any_moment(what, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    x, outcomes = vectors(70, DIMS[-1], 3), Counter()
    stride = {"first add": 11, "save": 23}.get(what, 5) if TIMES == 1 else 1
    for at in itertools.count(0, stride):
        index, model = build(rows=0 if what == "first add" else 70, rotation="pca")
        after = model.copy()
        if what in ("compact", "save"):
            index.save(tmp_path / str(at))
            index.remove(index.ids[:1])
            for state in (model, after):
                state.remove([0])
        elif what == "remove":
            after.remove([1, 3])
        elif what == "update":
            after.update([4, 2], x[:2])
        else:
            after.add(x)
        call = {
            "update": lambda: index.update(torch.tensor([4, 2]), x[:2]),  # noqa: B023
            "remove": lambda: index.remove(torch.tensor([1, 3])),  # noqa: B023
            "compact": lambda: index.compact(),  # noqa: B023
            "save": lambda: index.save(tmp_path / str(at)),  # noqa: B023
        }.get(what, lambda: index.add(x))  # noqa: B023
        if not interrupted(call, at):
            break
        now = model if index.ids.tolist() == model.ids else after
        outcomes[now is model] += 1
        assert_same(index, now)
        index.add(x[:5])
        now.add(x[:5])
        assert_same(index, now)
        index.save(tmp_path / str(at))
        assert_same(MatryoshkaIndex.load(tmp_path / str(at), verify=True), now)
        assert not strays(tmp_path / str(at))
    assert outcomes[True] > 5
    if "add" in what:  # the last moments are after it was done
        assert outcomes[False]


def test_room_is_made_before_more_is_taken(tmp_path):
    index, _ = build()
    index.save(tmp_path)
    (tmp_path / "rows-00000009.safetensors").write_text("left by a save that was killed")

    class Full(Disk):
        def before(self, name, *args):
            if name == "write":
                raise OSError(errno.ENOSPC, "disk full")

    index.add(vectors(1, DIMS[-1], 1))
    with Full().watched(), pytest.raises(OSError, match="disk full"):
        index.save(tmp_path)
    assert not strays(tmp_path)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_only_be_read(code, tmp_path):
    index, model = build()
    index.save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    class ReadOnly(Disk):
        def before(self, name, *args):
            if creates(name, *args) or name in ("replace", "unlink", "mkdir"):
                raise OSError(code, os.strerror(code))

    with ReadOnly().watched():
        again = MatryoshkaIndex.load(tmp_path, verify=True)
        assert_same(again, model)
        again.remove(again.ids[:1])
        with pytest.raises(OSError, match=os.strerror(code)):
            again.save(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_to_write(tmp_path):
    index, model = build()
    index.save(tmp_path)
    index.remove(index.ids[:1])
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            index.save(tmp_path)
        assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)
    finally:
        tmp_path.chmod(0o755)
    index.save(tmp_path)


# --- power cuts


@pytest.mark.parametrize("first", [True, False], ids=["first save", "later save"])
def test_a_power_cut_at_any_moment(first, tmp_path):
    folder, outcomes, seen = tmp_path / "new" / "index", [], {}
    index, models = built(folder, first)

    def cut(call, left):
        key = tuple(sorted(left.items()))
        if key not in seen:
            copy = tmp_path / "copy"
            copy.mkdir()
            for name, data in left.items():
                (copy / name).write_bytes(data)
            seen[key] = state_of(copy, models)
            shutil.rmtree(copy)
        outcomes.append((call, seen[key]))

    with Platters(folder, cut).watched() as disk:
        index.save(folder)
    assert ("replace", 0) in outcomes and ("replace", 1) in outcomes
    assert outcomes[-1] == outcomes[-4] == (outcomes[-1][0], 1)  # it has reached the disk
    if first:
        assert {path.stat().st_ino for path in (tmp_path, tmp_path / "new")} <= set(disk.synced)


def test_the_order_of_calls(tmp_path):
    index, model = build(rotation="pca")
    index.save(tmp_path)
    change(index, model)
    index.compact()
    index.remove(index.ids[:1])
    calls = []

    class Order(Disk):
        def after(self, name, *args):
            if name == "fsync":
                status = os.fstat(args[0])
                inodes = {path.stat().st_ino: path.name for path in tmp_path.iterdir()}
                folder = stat.S_ISDIR(status.st_mode)
                calls.append((name, "folder" if folder else inodes[status.st_ino]))
            elif name in ("replace", "unlink"):
                calls.append((name, Path(args[0]).name))
            elif name in ("write", "flush"):
                calls.append(("write", None))

    with Order().watched():
        index.save(tmp_path)
    assert [call for call, _ in itertools.groupby(calls)] == [
        ("write", None),
        ("fsync", "rows-00000002.safetensors"),
        ("write", None),
        ("fsync", "alive-00000002.safetensors"),
        ("fsync", "folder"),
        ("write", None),
        ("fsync", "manifest.json.new"),
        ("replace", "manifest.json.new"),
        ("fsync", "folder"),
        ("unlink", "rows-00000001.safetensors"),
    ]
