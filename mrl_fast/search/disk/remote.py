"""Indexes in object stores and other far file systems, by fsspec: copied to this machine, then
mapped.

An index's files never change, so that a copy is made once: of a new manifest only those are read
that the last one did not name with the same checksum.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mrl_fast.search.disk import filesystem
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.disk import sharded_manifest as whole

CACHE = "MRL_FAST_CACHE"  # names the folder of copies, where it is set
PIECE_BYTES = 1 << 24  # read at a time


def is_remote(path: Any) -> bool:
    """Whether a path is a URL, as of ``s3://bucket/index``."""
    return isinstance(path, str) and "://" in path


def fetched(url: str) -> Path:
    """The local copy of an index, as its manifest is now; files that are there are not read again.

    Args:
        url: Of a folder that an index was saved to, in any scheme that fsspec has a package for.

    Returns:
        A folder below ``$MRL_FAST_CACHE``, or else ``~/.cache/mrl_fast``, one for each URL.

    Raises:
        ModuleNotFoundError: fsspec, or its package for the scheme, is not installed.
        FileNotFoundError: There is no index.
        ValueError: An unknown scheme; a file that is not as its manifest says; names it.
        OSError: Of the far file system, or of this one.
    """
    system, root = _opened(url)
    cache = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "mrl_fast")
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    folder = Path(os.path.realpath(cache / f"{name}-{root.rstrip('/').rpartition('/')[2]}"))
    filesystem.make_folder(folder)
    with filesystem.locked(folder):
        text = _read(system, f"{root}/{manifests.FILE}", url)
        there = _copied(url, folder)
        for path, sha256 in _entries(url, text):
            to = folder / path
            if sha256 is None or sha256 != there.get(path) or not to.exists():
                filesystem.make_folder(to.parent)
                _copy(system, f"{root}/{path}", to, sha256)
        _replace(folder / manifests.FILE, text)
    return folder


def _opened(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{url}: needs fsspec: pip install 'mrl-fast[remote]'", name="fsspec"
        ) from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # of a scheme
        raise ModuleNotFoundError(f"{url}: {error}", name="fsspec") from error


def _entries(url: str, text: bytes) -> Iterator[tuple[str, str | None]]:
    """The files that a manifest names, relative to it, and their checksums; None of those that are
    replaced."""
    file = Path(f"{url.rpartition('://')[2]}/{manifests.FILE}")
    if manifests.format_in(text) != whole.FORMAT:
        yield from manifests.entries_of(manifests.parse(file, text))
        return
    manifest = whole.parse(file, text)
    yield manifest["order"]["file"], manifest["order"]["sha256"]
    for i, shard in enumerate(manifest["shards"]):
        folder = whole.folder_of(i)
        yield from ((f"{folder}/{name}", sha256) for name, sha256 in manifests.entries_of(shard))
        yield f"{folder}/{manifests.FILE}", None


def _copied(url: str, folder: Path) -> dict[str, str | None]:
    """The files of the copy, and their checksums: another index may have come to the same URL."""
    try:
        return dict(_entries(url, (folder / manifests.FILE).read_bytes()))
    except (FileNotFoundError, ValueError):
        return {}


def _read(system: Any, path: str, url: str) -> bytes:
    try:
        with system.open(path, "rb") as file:
            return file.read(whole.MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"path: expected a folder that holds an index, got {url}") from None


def _copy(system: Any, path: str, to: Path, sha256: str | None) -> None:
    """Copies a file, which is there once all of it is."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".fetch-") as apart:
        new = Path(apart) / to.name
        with system.open(path, "rb") as source, filesystem.synced(new, "xb") as target:
            while piece := source.read(PIECE_BYTES):
                digest.update(piece)
                target.write(piece)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ValueError(f"{path}: expected sha256 {sha256}, got {digest.hexdigest()}")
        os.replace(new, to)


def _replace(file: Path, text: bytes) -> None:
    new = file.with_name(file.name + ".new")
    with filesystem.synced(new, "wb") as target:
        target.write(text)
    os.replace(new, file)
    filesystem.sync_folder(file.parent)
