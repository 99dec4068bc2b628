"""Ctrl-C while files are written and verified: it is heard soon, however large they are."""

import signal
import time

import pytest
import torch

from mrl_fast.search.disk import tensorfile
from tests.helpers.disk import Disk
from tests.helpers.index_model import quick  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick")


def heard_s(call):
    """Seconds of this process from Ctrl-C, which comes at once, to KeyboardInterrupt."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGPROF, interrupt)
    begun = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 0.02)
    try:
        call()
    except KeyboardInterrupt:
        return time.process_time() - begun
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    raise AssertionError("it ended before Ctrl-C came")


def test_ctrl_c_is_heard_while_a_file_is_verified(tmp_path):
    parts = {"x": (torch.uint8, (2 << 30,))}
    with open(tmp_path / "x", "wb") as file:  # a sparse file
        file.write(tensorfile.header(parts))
        file.truncate(file.tell() + (2 << 30))
    file = tensorfile.TensorFile(tmp_path / "x", parts, "0" * 64)
    assert heard_s(file.verify) < 0.5


def test_little_waits_for_the_disk_at_any_time(tmp_path, monkeypatch):
    """A sync cannot be interrupted: there are many, of few bytes each."""
    waiting = []

    class Waiting(Disk):
        unsynced = 0

        def after(self, name, *args):
            if name == "write":
                self.unsynced += len(args[0])
            elif name == "fsync":
                self.unsynced = 0
            waiting.append(self.unsynced)

    monkeypatch.setattr(tensorfile, "HASHED_BYTES", 1 << 10)
    monkeypatch.setattr(tensorfile, "UNSYNCED_BYTES", 1 << 12)
    x = torch.arange(10_000)
    with Waiting().watched():
        tensorfile.write(tmp_path / "x", {"x": (torch.int64, (10_000,))}, {"x": [x]})
    assert waiting.count(0) > 10 and max(waiting) < (1 << 12) + (1 << 10)
    assert waiting[-1] == 0
