"""Processes that are killed while they save: what they leave is the old index or the new one, and
the next save works and leaves no strays.

They are forked from a process of their own, and share what it has imported.
"""

import itertools
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.disk import tensorfile
from tests.helpers.disk import Disk, Failing
from tests.helpers.index_model import (
    DIMS,
    ROOT,
    TIMES,
    assert_same,
    build,
    strays,
    vectors,
)

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
    if step % 3 == 0:
        index.build_graph(progress=False)
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
        tensorfile.write = self.during(tensorfile.write, WRITING)
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
        step = next(s for s in steps if state(s).next_id == index._rows.next_id)
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
        if moments.random() < 0.5:
            time.sleep(moments.uniform(0, 2 * typical_s))
        else:  # how much of a save is writing depends on the machine
            while child.phase != WRITING:
                pass
            time.sleep(moments.uniform(0, 0.1 * typical_s))
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
    kills = 60 if TIMES == 1 else 20 * TIMES
    code = f"from tests.stress.test_kills import kill_many; kill_many({str(tmp_path)!r}, {kills})"
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
