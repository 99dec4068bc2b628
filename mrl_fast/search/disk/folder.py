"""An index on disk: a folder of safetensors files that never change, and a manifest of them.

A save writes new files, has them reach the disk, then replaces the manifest: at every moment the
folder holds the old index or the new one. Files that were saved before are not written again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mrl_fast.search.disk import filesystem, tensorfile
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.disk.contents import (
    Contents,
    Files,
    IndexFile,
    alive_file,
    axes_file,
    graph_file,
    rows_file,
)
from mrl_fast.search.index.blocks import Block, Layout
from mrl_fast.search.index.graph import RowGraph
from mrl_fast.shared.native import TILE

# Where this many of the last files are each no larger than what is added, they are merged with it.
TIER = 7

T = TypeVar("T")
Entry = dict[str, Any]  # a manifest, or a file in it


class Saved(NamedTuple):
    """What a folder holds of an index since its last save or load."""

    path: Path
    manifest: dict[str, Any]
    alive: Tensor | None
    axes: Tensor | None
    graph: RowGraph | None


def save(
    path: Path,
    contents: Contents,
    saved: Saved | None,
    saved_prefix_rows: int,
    left: Mapping[Path, Entry],
    replaced: Callable[[Saved], None],
    kept: Entry | None = None,
) -> None:
    """Brings the folder to this state, writing what it does not have: nothing, where it has all.

    Args:
        saved: What the index saved or loaded last.
        saved_prefix_rows: How many of the first rows are still as they are in ``saved``.
        left: The manifest of every folder that the index saved to or was loaded from.
        replaced: Called as soon as the folder holds this state, whatever fails after that.
        kept: A manifest whose files stay, too, until ``collect``.

    Raises:
        ValueError: The folder holds something else, or an index that another has saved since.
        OSError: The folder cannot be written to or is full; it holds what it held before.
    """
    path = Path(os.path.realpath(path))  # one folder has one name
    filesystem.make_folder(path)
    with filesystem.locked(path):
        there = _there(path)
        check_left(path, there, left.get(path))
        known = saved if there and saved and saved.path == path else None
        new = _NewFiles(path, there)
        if there:
            collect(path, there, kept)  # makes room before more is taken
        try:
            manifest = new.write(contents, known, saved_prefix_rows)
            filesystem.sync_folder(path)
            with _os_errors():  # files that cannot be read again replace nothing
                Files.opened(path, manifest, contents.layout)
            if known and manifests.same_but_generation(manifest, known.manifest):
                replaced(known)
                return
            new.write_manifest(manifest)
        except BaseException:
            new.discard()
            raise
        now = Saved(path, manifest, contents.alive, contents.axes, contents.graph)
        try:
            os.replace(new.manifest, path / manifests.FILE)
            replaced(now)
        except BaseException:
            # An error or an interrupt may arrive after the manifest was replaced.
            if manifests.read_or_none(path) == manifest:
                replaced(now)
            raise
        filesystem.sync_folder(path)
        collect(path, manifest, kept)


def load(
    path: Path,
    make: Callable[[dict[str, Any]], tuple[T, Layout]],
    *,
    verify: bool,
    manifest: Entry | None = None,
) -> tuple[T, Contents, Saved]:
    """Opens what a folder holds. It needs no lock: where a save replaces files meanwhile, it
    begins anew.

    Args:
        make: Makes an index of the manifest's fields.
        manifest: Opens the files of this one, where another manifest names it.

    Returns:
        The index without rows, what the folder holds of it, and what ``save`` needs.

    Raises:
        FileNotFoundError: There is no index.
        ValueError: Anything in a file is not as it must be; names the file and the field.
    """
    path = Path(os.path.realpath(path))  # one folder has one name

    def read(manifest: dict[str, Any]) -> tuple[T, Contents, Saved]:
        try:
            index, layout = make({name: manifest[name] for name in manifests.INDEX_FIELDS})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path / manifests.FILE}: {error}") from error
        # All files are opened before any is read: an open file stays readable if it is deleted.
        files = Files.opened(path, manifest, layout)
        if verify:
            files.verify()
        contents = _contents(files, manifest, layout)
        saved = Saved(path, manifest, contents.alive, contents.axes, contents.graph)
        return index, contents, saved

    with torch.inference_mode(False):  # the index outlives the call
        if manifest is None:
            return manifests.settled(path, read, manifests.read)
        return read(manifest)


def _contents(files: Files, manifest: dict[str, Any], layout: Layout) -> Contents:
    segments = manifest["segments"]
    counts = [segment["used"] for segment in segments]
    alive = axes = None
    if files.alive:
        alive = files.alive.tensors["alive"].clone()
        padding = -sum(counts) % TILE  # bits of the last word
        if (int(alive[-1]) & (1 << TILE) - 1) >> TILE - padding:
            count = sum(counts)
            raise ValueError(f"{files.alive.path}: alive: expected bits of {count} rows, got more")
    if files.axes:
        axes = files.axes.tensors["axes"].clone()
        if not bool(torch.isfinite(axes).all()):
            raise ValueError(f"{files.axes.path}: axes: expected finite values")
    layout.use(axes)
    if files.axes and layout.signs is not None and not bool((layout.signs.abs() == 1).all()):
        raise ValueError(f"{files.axes.path}: axes: expected signs, 1 and -1, in the last row")
    blocks = []
    for file, used in zip(files.rows, counts, strict=True):
        try:
            blocks.append(Block.of_version(manifest["version"], layout, file.tensors, used))
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None
    fields = {name: manifest[name] for name in manifests.INDEX_FIELDS}
    graph = files.graph and RowGraph(manifest["graph"]["rows"], layout, files.graph.tensors)
    return Contents(fields, layout, blocks, counts, alive, axes, graph)


class _NewFiles:
    """The files that a save writes."""

    def __init__(self, path: Path, there: dict[str, Any] | None):
        names = filter(None, map(manifests.NAME.fullmatch, os.listdir(path)))
        used = [there["generation"] if there else 0, *(int(name[2]) for name in names)]
        self.path, self.generation = path, 1 + max(used)
        self.manifest = path / (manifests.FILE + ".new")
        self._written: list[Path] = []

    def write(
        self, contents: Contents, saved: Saved | None, saved_prefix_rows: int
    ) -> dict[str, Any]:
        """Writes what ``saved`` does not have; returns the manifest."""
        layout, count = contents.layout, sum(contents.counts)
        old = (
            saved.manifest
            if saved
            else {"segments": [], "alive": None, "axes": None, "graph": None}
        )
        segments, begin = _kept(old["segments"], count, saved_prefix_rows if saved else 0)
        if begin < count:
            used = count - begin
            rows = used + -used % TILE
            file = self._put(rows_file(layout, rows), contents.pieces(begin))
            segments.append({"rows": rows, "used": used, **file})

        def put(file: IndexFile, tensor: Tensor | None) -> Entry | None:
            if tensor is None:
                return None
            same = saved is not None and tensor is getattr(saved, file.kind)
            return old[file.kind] if same else self._put(file, {file.kind: [tensor]})

        graph = contents.graph
        if graph is None or (saved is not None and graph is saved.graph):
            graph_entry = graph and old["graph"]
        else:
            file = graph_file(layout, graph.rows, graph.entries)
            written = self._put(file, {name: [x] for name, x in graph.arrays.items()})
            graph_entry = {"rows": graph.rows, "entries": graph.entries, **written}
        return manifests.new(
            layout.version,
            **contents.fields,
            generation=self.generation,
            segments=segments,
            alive=put(alive_file(count), contents.alive),
            axes=put(axes_file(layout, layout.version), contents.axes),
            **({} if graph is None else {"graph": graph_entry}),
        )

    def _put(self, file: IndexFile, pieces: Any) -> Entry:
        path = self.path / f"{file.kind}-{self.generation:08d}.safetensors"
        self._written.append(path)
        try:
            return {"file": path.name, "sha256": tensorfile.write(path, file.parts, pieces)}
        except FileExistsError:  # another process made it, where folders cannot be locked
            self._written.remove(path)
            raise

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        text = manifests.text_of(manifest)
        manifests.parse(self.manifest, text)  # one that cannot be read again replaces nothing
        self._written.append(self.manifest)
        with filesystem.synced(self.manifest, "wb") as file:
            file.write(text)

    def discard(self) -> None:
        for path in self._written:
            path.unlink(missing_ok=True)


def _kept(segments: list[Entry], count: int, saved_prefix_rows: int) -> tuple[list[Entry], int]:
    """The segments that stay, and the first of the rows to be written."""
    begin = saved_prefix_rows
    if begin != count:
        begin -= begin % TILE
    kept, first = [], 0
    for segment in segments:
        used = min(segment["used"], begin - first)
        if used > 0:
            kept.append({**segment, "used": used})
            first += used
    while begin < count:
        small = 0
        while small < len(kept) and kept[-1 - small]["used"] <= count - begin:
            small += 1
        if small < TIER:
            break
        begin -= sum(segment["used"] for segment in kept[-small:])
        del kept[-small:]
    return kept, begin


def check_left(path: Path, there: Entry | None, left: Entry | None) -> None:
    """Raises where the folder does not hold what the index left in it."""
    if there and left and there != left:
        raise ValueError(
            f"path: expected {path} as this index left it (generation {left['generation']}), got "
            f"generation {there['generation']}, which another has saved; load it, or save elsewhere"
        )


def _there(path: Path) -> dict[str, Any] | None:
    """The folder's manifest; None in a new folder, or where a first save was cut off."""
    try:
        with _os_errors():
            return manifests.read(path)
    except FileNotFoundError:
        for name in filesystem.files_that_matter(path):
            if not manifests.NAME.fullmatch(name) and name != manifests.FILE + ".new":
                got = path / name
                raise ValueError(f"path: expected an index or an empty folder, got {got}") from None
        return None
    except ValueError as error:  # somebody else's manifest.json, perhaps
        raise ValueError(f"path: expected an index or an empty folder, got {error}") from error


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raises a file that cannot be read as the OSError that it is, not as damage."""
    try:
        yield
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def collect(path: Path, manifest: Entry, kept: Entry | None = None) -> None:
    """Deletes our files that neither manifest names."""
    keep = manifests.files_of(manifest) | (manifests.files_of(kept) if kept else set())
    for name in os.listdir(path):
        if manifests.NAME.fullmatch(name) and name not in keep:
            (path / name).unlink(missing_ok=True)
