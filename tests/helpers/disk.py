"""What a save does to the disk, call by call: watched, made to fail, or cut off."""

import builtins
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest

from mrl_fast.search.disk import filesystem, tensorfile
from mrl_fast.search.disk import manifest as manifests


class Disk:
    """Calls ``before`` and ``after`` each call of a save with its name and its arguments; what they
    raise is raised in the save."""

    def before(self, name, *args):
        pass

    def after(self, name, *args):
        pass

    @contextmanager
    def watched(self):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "replace", "unlink", "mkdir", "open"):
                patch.setattr(os, name, self.wrapped(name, getattr(os, name)))
            for module in (filesystem, tensorfile, manifests):
                patch.setattr(module, "open", self.open, raising=False)
            yield self

    telling = False  # what ``before`` and ``after`` do themselves is not watched

    def tell(self, told, name, *args):
        if not self.telling:
            self.telling = True
            try:
                told(name, *args)
            finally:
                self.telling = False

    def wrapped(self, name, function):
        def call(*args, **kwargs):
            self.tell(self.before, name, *args)
            result = function(*args, **kwargs)
            self.tell(self.after, name, *args)
            return result

        return call

    def open(self, path, mode):
        file = self.wrapped("open", builtins.open)(path, mode)
        return file if "r" in mode else File(self, file)


class File:
    def __init__(self, disk, file):
        self.file, self.fileno = file, file.fileno
        self.flush = disk.wrapped("flush", file.flush)
        self.whole = disk.wrapped("write", file.write)

    def write(self, data):
        try:
            self.whole(data)
        except BaseException:
            self.file.write(data[: len(data) // 2])  # a disk is full in the middle of a file
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def creates(name, *args):
    return name == "open" and isinstance(args[1], str) and "r" not in args[1]


class Failing(Disk):
    """Calls ``fail`` at call number ``at``: before the call does its work, or after it; with mode
    "stays", as where a disk stays full, before it and every later one."""

    def __init__(self, at, fail, mode):
        self.at, self.fail, self.mode, self.calls, self.failed = at, fail, mode, -1, False

    def before(self, name, *args):
        self.calls += 1
        if self.mode != "after":
            self.may_fail()

    def after(self, name, *args):  # not called where a call raises
        if self.mode == "after":
            self.may_fail()

    def may_fail(self):
        if self.calls >= self.at and (self.mode == "stays" or not self.failed):
            self.failed = True
            self.fail()


class Platters(Disk):
    """What a power cut may leave of a folder: of a file, what it held when it was last synced; of
    the folder's entries, those of its last sync, with or without what was done since."""

    def __init__(self, folder, cut):
        self.folder, self.cut = folder, cut
        self.held = {ino: [path.read_bytes()] for ino, path in self.paths()}
        self.entries = self.now()
        self.synced = []  # folders, by inode

    def paths(self):
        if self.folder.exists():
            yield from ((path.stat().st_ino, path) for path in self.folder.iterdir())

    def now(self):
        return {path.name: self.held[ino] for ino, path in self.paths()}

    def after(self, name, *args):
        if creates(name, *args):
            self.held[Path(args[0]).stat().st_ino] = [b""]
        elif name == "fsync":
            status = os.fstat(args[0])
            if not stat.S_ISDIR(status.st_mode):
                path = next(path for ino, path in self.paths() if ino == status.st_ino)
                self.held[status.st_ino][0] = path.read_bytes()
            elif self.folder.exists() and os.path.samestat(status, self.folder.stat()):
                self.entries = self.now()
            else:
                self.synced.append(status.st_ino)
        now = self.now()
        replaced = {name: now[name] for name in now if name == manifests.FILE}
        for left in (
            self.entries,
            now,
            {**self.entries, **replaced},
            {name: held for name, held in self.entries.items() if name in now},
        ):
            self.cut(name, {name: held[0] for name, held in left.items()})
