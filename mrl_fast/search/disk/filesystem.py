"""Locks, syncs and new folders on file systems that may lack some of them.

CIFS, FUSE, VirtualBox and some NFS cannot lock or sync a folder. A save does without and warns,
once a folder and process. A disk that is full, read-only or damaged raises, with the path.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# Errors of an operation that a file system lacks, or lacks for folders.
LACKING = {
    errno.EBADF,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,
}
# Files, beside hidden ones, that desktops and file systems put into folders people call empty.
CLUTTER = {"desktop.ini", "ehthumbs.db", "icon\r", "lost+found", "thumbs.db"}
# Operations, and the consequence where one is lacking.
LOCK = "lock a folder", "let only one process at a time save to it"
SYNC = "sync files and folders", "a power cut may undo or damage what was saved last"

_warned: set[tuple[Path, str]] = set()


class FileSystemWarning(UserWarning):
    """A file system lacks an operation that makes saving safer."""


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, and has them reach the disk."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def files_that_matter(folder: Path) -> list[str]:
    """Names in a folder but for hidden files and clutter, which are nobody's work."""
    names = sorted(os.listdir(folder))
    return [name for name in names if name[0] != "." and name.lower() not in CLUTTER]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Has one process at a time write to a folder."""
    opened = None
    try:
        with _if_there_is(folder, *LOCK):
            opened = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                gc.collect()  # frees the lock of a save that was interrupted while releasing it
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        if opened is not None:
            os.close(opened)


def sync_folder(folder: Path) -> None:
    """Has the folder's list of files reach the disk."""
    with _if_there_is(folder, *SYNC):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def sync_file(file: IO[bytes], path: Path) -> None:
    """Has what was written to a file reach the disk."""
    file.flush()
    with _if_there_is(path.parent, *SYNC):
        os.fsync(file.fileno())


@contextmanager
def synced(path: Path, mode: str) -> Iterator[IO[bytes]]:
    """A file to write to, opened as ``mode`` says. After the with statement it is on disk."""
    with _naming(path), open(path, mode) as file:
        yield file
        sync_file(file, path)


@contextmanager
def _if_there_is(folder: Path, operation: str, otherwise: str) -> Iterator[None]:
    """Does without an operation that the folder's file system lacks, and warns once."""
    try:
        with _naming(folder):
            yield
    except OSError as error:
        if error.errno not in LACKING:
            raise
        if (folder, operation) not in _warned:
            _warned.add((folder, operation))
            warnings.warn(
                f"{folder}: expected a file system that can {operation}, got "
                f"{error.strerror}: {otherwise}",
                FileSystemWarning,
                stacklevel=2,
            )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to errors of file descriptors, which have none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
