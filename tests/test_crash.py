"""A save that is cut off: by a call that fails, by a power cut, by a kill. The folder holds the old
index or the new one, and the next save works and leaves no strays."""

import errno
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

from mrl_fast import MatryoshkaIndex, _tensorfile
from tests.disk import Disk, Failing, Platters, creates
from tests.index_model import (  # noqa: F401
    DIMS,
    ROOT,
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
    if first:
        return index, [None, model]
    index.save(folder)
    before = model.copy()
    index.compact()  # so that old files go
    change(index, model)
    return index, [before, model]


# --- calls that fail


@pytest.mark.parametrize("mode", ["before", "after", "stays"])
@pytest.mark.parametrize("first", [True, False], ids=["first save", "later save"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "disk full"), OSError(errno.EMFILE, "many files"), KeyboardInterrupt()],
    ids=["disk full", "too many files", "interrupted"],
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


# --- kills, in a process of its own, whose children share what it has imported

IDLE, WRITING, REPLACING, REPLACED = range(4)  # phases of a save


def advance(target, ids, step, as_ids):
    """What is done at a step to an index, or to its model, that holds these ids."""
    generator = torch.Generator().manual_seed(step)
    rows, few = torch.randint(1, 90, (2,), generator=generator).tolist()
    chosen = [ids[i] for i in torch.randperm(len(ids), generator=generator).tolist()]
    gone = max(len(ids) - 100, 0) + few // 30
    replaced = chosen[gone : gone + 3]
    x = vectors(rows + len(replaced), DIMS[-1], step)
    target.add(x[:rows])
    target.remove(as_ids(chosen[:gone]))
    target.update(as_ids(replaced), x[rows:])


def step_and_save(index, step, folder):
    advance(index, index.ids.tolist(), step, lambda ids: torch.tensor(ids, dtype=torch.int64))
    if step % 5 == 0:
        index.compact()
    index.save(folder)


class Child:
    """A fork that loads what the folder holds after a step and saves every further one, until it
    is killed."""

    def __init__(self, folder, step, disk=None):
        self.shared = mmap.mmap(-1, mmap.PAGESIZE)
        self.begun = step
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.work(folder, step, disk)
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    @property
    def begun(self):
        """The step whose save was begun last."""
        return int.from_bytes(self.shared[8:16], "little")

    @begun.setter
    def begun(self, step):
        self.shared[8:16] = step.to_bytes(8, "little")

    @property
    def phase(self):
        return self.shared[0]

    def during(self, function, phase, after=None):
        def call(*args):
            self.shared[0] = phase
            result = function(*args)
            self.shared[0] = phase if after is None else after
            return result

        return call

    def work(self, folder, step, disk):
        _tensorfile.write = self.during(_tensorfile.write, WRITING)
        os.replace = self.during(os.replace, REPLACING, REPLACED)
        index = MatryoshkaIndex.load(folder)
        with (disk or Disk()).watched():
            while True:
                step += 1
                self.begun = step
                step_and_save(index, step, folder)
                self.shared[0] = IDLE

    def is_killed(self):
        _, status = os.waitpid(self.pid, 0)
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_many(folder, kills):
    """Kills so many children at random moments, and one at every call of a save; prints how many
    in which phase."""
    torch.set_num_threads(1)
    folder, moments = Path(folder), random.Random(0)
    index, model = build(rows=100)
    index.save(folder)
    models, times, phases = [model], [], Counter()

    def state(step):
        while len(models) <= step:
            models.append(models[-1].copy())
            advance(models[-1], models[-2].ids, len(models) - 1, list)
        return models[step]

    def check(child):
        """Exactly the old or the new state; and the next save. Returns its step."""
        assert child.is_killed()
        steps, phase = [child.begun - 1, child.begun], child.phase
        steps = {WRITING: steps[:1], REPLACED: steps[1:]}.get(phase, steps)
        index = MatryoshkaIndex.load(folder, verify=True)
        step = next(s for s in steps if state(s).next_id == index._next_id)
        assert_same(index, state(step))
        step_and_save(index, step + 1, folder)
        assert not strays(folder)
        assert_same(MatryoshkaIndex.load(folder, verify=True), state(step + 1))
        return step + 1

    for step in range(1, 6):
        begin = time.perf_counter()
        step_and_save(index, step, folder)
        times.append(time.perf_counter() - begin)
    typical_s, step = sorted(times)[2], 5
    for _ in range(kills):
        child = Child(folder, step)
        while child.begun == step:
            assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
            time.sleep(1e-4)
        time.sleep(moments.uniform(0, 2 * typical_s))
        os.kill(child.pid, signal.SIGKILL)
        step = check(child)
        phases[child.phase] += 1
    every = 0
    for mode in ("before", "after"):
        for at in itertools.count():
            kill = Failing(at, lambda: os.kill(os.getpid(), signal.SIGKILL), mode)
            child, before = Child(folder, step, kill), step
            step = check(child)
            every += 1
            if child.begun > before + 1:  # it came to its second save
                break
    print(json.dumps([phases[phase] for phase in range(4)] + [every]))


def test_kills(tmp_path):
    kills = 200 * max(1, TIMES // 10)
    code = f"from tests.test_crash import kill_many; kill_many({str(tmp_path)!r}, {kills})"
    # Children are forked: no other threads.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *phases, every = json.loads(done.stdout)
    print("kills when idle, writing, replacing, replaced:", *phases, "; at a call:", every)
    assert sum(phases) == kills and every > 40
    assert phases[WRITING] > 0.2 * kills
