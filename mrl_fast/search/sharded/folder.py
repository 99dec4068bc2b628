"""A folder of shards, each a whole index's folder, and one manifest of all that is replaced last:
at every moment the folder holds the old index or the new one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mrl_fast.search.disk import filesystem, tensorfile
from mrl_fast.search.disk import folder as index_folder
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.disk import sharded_manifest as whole
from mrl_fast.search.sharded.order import RowOrder

Entry = dict[str, Any]
# Saves a shard to a folder, in which the files of a manifest, if there is one, are kept; the new
# manifest.
SaveShard = Callable[[Path, Entry | None], Entry]


class Contents(NamedTuple):
    """What a folder is to hold beside the shards' own files.

    Attributes:
        fields: The manifest's fields of the whole index, as JSON.
        orders: Of the rows of each shard.
    """

    fields: dict[str, Any]
    orders: Sequence[RowOrder]


def save(
    path: Path,
    contents: Contents,
    shards: Sequence[SaveShard],
    known: Sequence[Entry | None],
    left: Mapping[Path, Entry],
    replaced: Callable[[Path, Entry], None],
) -> None:
    """Brings the folder to this state; files that did not change are not written again.

    Args:
        known: Each shard's manifest, as it was saved or loaded last.
        left: The manifest of every folder that the index saved to or was loaded from.
        replaced: Called as soon as the folder holds this state, whatever fails after that.

    Raises:
        ValueError: The folder holds something else, or an index that another has saved since.
        OSError: The folder cannot be written to or is full; it holds what it held before.
    """
    path = Path(os.path.realpath(path))  # one folder has one name
    filesystem.make_folder(path)
    with filesystem.locked(path):
        there = _there(path)
        index_folder.check_left(path, there, left.get(path))
        if there:
            _clean(path, there)
            restore_shards(path, there, known)
        kept = there["shards"] if there else []
        saved = [
            save_shard(path / whole.folder_of(i), kept[i] if i < len(kept) else None)
            for i, save_shard in enumerate(shards)
        ]
        generation = 1 + max([there["generation"] if there else 0, *_generations(path)])
        new = path / (whole.FILE + ".new")
        written = [new]
        try:
            order, is_new = _order(path, contents.orders, generation, there)
            written += [path / order["file"]] if is_new else []
            manifest = whole.new(
                **contents.fields, generation=generation, order=order, shards=saved
            )
            if there and manifests.same_but_generation(manifest, there):
                replaced(path, there)
                return
            text = whole.text_of(manifest)
            whole.parse(new, text)  # one that cannot be read again replaces nothing
            with filesystem.synced(new, "wb") as file:
                file.write(text)
            filesystem.sync_folder(path)
        except BaseException:
            for each in written:
                each.unlink(missing_ok=True)
            raise
        try:
            os.replace(new, path / whole.FILE)
            replaced(path, manifest)
        except BaseException:
            # An error or an interrupt may arrive after the manifest was replaced.
            if whole.read_or_none(path) == manifest:
                replaced(path, manifest)
            raise
        filesystem.sync_folder(path)
        _clean(path, manifest)
        for i, shard in enumerate(saved):
            index_folder.collect(path / whole.folder_of(i), shard)


def orders_of(path: Path, manifest: Entry, *, verify: bool) -> list[RowOrder]:
    """Of the rows of each shard.

    Raises:
        ValueError: The file is not as the manifest says; names it.
    """
    entry, counts = manifest["order"], [whole.rows_of(shard) for shard in manifest["shards"]]
    ends = np.cumsum(entry["runs"])
    parts = {"order": (torch.int64, (int(ends[-1]), 3))}
    file = tensorfile.TensorFile(path / entry["file"], parts, entry["sha256"])
    if verify:
        file.verify()
    runs = file.tensors["order"].numpy().copy()
    orders: list[RowOrder] = []
    for mine, count in zip(np.split(runs, ends[:-1]), counts, strict=True):
        try:
            orders.append(RowOrder.checked(mine, count, manifest["next_place"]))
        except ValueError as error:
            raise ValueError(f"{file.path}: order: {error}") from None
    return orders


def restore_shards(path: Path, manifest: Entry, known: Sequence[Entry | None]) -> None:
    """Has each shard's folder name the files that the whole's manifest names, where a save of the
    whole was cut off before that was replaced; but for those whose manifest is ``known``."""
    for i, shard in enumerate(manifest["shards"]):
        folder = path / whole.folder_of(i)
        now = manifests.read_or_none(folder)
        mine = known[i] if i < len(known) else None
        if now is not None and now not in (shard, mine):
            new = folder / (manifests.FILE + ".new")
            with filesystem.synced(new, "wb") as file:
                file.write(manifests.text_of(shard))
            os.replace(new, folder / manifests.FILE)
            filesystem.sync_folder(folder)


def _order(
    path: Path, orders: Sequence[RowOrder], generation: int, there: Entry | None
) -> tuple[Entry, bool]:
    """The entry of the file of orders, and whether the file is new."""
    runs = np.concatenate([order.runs for order in orders])
    counts = [len(order.runs) for order in orders]
    if there and there["order"]["runs"] == counts:
        try:
            before = orders_of(path, there, verify=False)
        except ValueError:
            before = []
        if len(before) == len(orders) and np.array_equal(
            np.concatenate([order.runs for order in before]), runs
        ):
            return there["order"], False
    name = f"order-{generation:08d}.safetensors"
    parts = {"order": (torch.int64, (len(runs), 3))}
    digest = tensorfile.write(path / name, parts, {"order": [torch.from_numpy(runs)]})
    return {"file": name, "sha256": digest, "runs": counts}, True


def _there(path: Path) -> Entry | None:
    """The folder's manifest; None in a new folder, or where a first save was cut off."""
    try:
        return whole.read(path)
    except FileNotFoundError:
        for name in filesystem.files_that_matter(path):
            ours = whole.FOLDER.fullmatch(name) or whole.ORDER.fullmatch(name)
            if not ours and name != whole.FILE + ".new":
                raise ValueError(
                    f"path: expected a sharded index or an empty folder, got {path / name}"
                ) from None
        return None
    except ValueError as error:
        raise ValueError(
            f"path: expected a sharded index or an empty folder, got {error}"
        ) from error


def _generations(path: Path) -> list[int]:
    names = filter(None, map(whole.ORDER.fullmatch, os.listdir(path)))
    return [int(name[1]) for name in names]


def _clean(path: Path, manifest: Entry) -> None:
    """Deletes files and folders of ours that the manifest does not name."""
    keep = {manifest["order"]["file"], *map(whole.folder_of, range(len(manifest["shards"])))}
    for name in os.listdir(path):
        if whole.ORDER.fullmatch(name) and name not in keep:
            (path / name).unlink(missing_ok=True)
        elif whole.FOLDER.fullmatch(name) and name not in keep:
            _remove_shard(path / name)


def _remove_shard(folder: Path) -> None:
    for name in os.listdir(folder):
        if manifests.NAME.fullmatch(name) or name.startswith(manifests.FILE):
            (folder / name).unlink(missing_ok=True)
    if not os.listdir(folder):
        folder.rmdir()
