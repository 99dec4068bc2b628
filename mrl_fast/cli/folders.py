"""The files of an index's folder, whether it holds one index or shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.disk import sharded_manifest as whole


def files_of(folder: Path) -> dict[str, int]:
    """The index's files, relative to its folder, and their bytes; its manifests among them."""
    names = {manifests.FILE}
    if is_sharded(folder):
        manifest = whole.read(folder)
        names.add(manifest["order"]["file"])
        for i, shard in enumerate(manifest["shards"]):
            its = (*manifests.files_of(shard), manifests.FILE)
            names.update(f"{whole.folder_of(i)}/{name}" for name in its)
    else:
        names.update(manifests.files_of(manifests.read(folder)))
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def is_sharded(folder: Path) -> bool:
    return manifests.format_of(folder) == whole.FORMAT


def manifest_of(folder: Path) -> dict[str, Any]:
    return whole.read(folder) if is_sharded(folder) else manifests.read(folder)


def parts_of(folder: Path) -> list[dict[str, Any]]:
    """The manifest of each shard, or of the one index."""
    manifest = manifest_of(folder)
    return manifest["shards"] if "shards" in manifest else [manifest]


def delete(folder: Path) -> None:
    """Deletes the index's files, and the folders of its shards."""
    names = files_of(folder)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for inner in {Path(name).parent for name in names} - {Path()}:
        (folder / inner).rmdir()
