"""An index on disk: a folder of safetensors files that never change, and a manifest of them.

A save writes new files, has them reach the disk, then replaces the manifest: at every moment the
folder holds the old index or the new one. What was saved before is not written again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.disk import tensorfile
from mrl_fast.search.index.blocks import Block, Layout
from mrl_fast.search.index.snapshot import Snapshot, flags_of
from mrl_fast.shared.native import TILE

TIER = 7  # so many files no larger than what is added are written anew together with it

T = TypeVar("T")


class Saved(NamedTuple):
    """What an index has on disk."""

    path: Path
    manifest: dict[str, Any]
    alive: Tensor | None
    axes: Tensor | None


class Loaded(NamedTuple):
    saved: Saved
    blocks: list[Block]
    counts: list[int]


def save(
    path: Path,
    fields: dict[str, Any],
    layout: Layout,
    axes: Tensor | None,
    snapshot: Snapshot,
    unmoved: int,
    saved: Saved | None,
    replaced: Callable[[Saved], None],
) -> None:
    """Brings the folder to this state, writing what it does not have.

    Args:
        fields: The index's own, as JSON.
        axes: The rotation's.
        unmoved: The first rows that are as they are in ``saved``.
        replaced: Called as soon as the folder holds this state, whatever fails after that.

    Raises:
        ValueError: The folder holds something else, or what another has saved since.
        OSError: The folder cannot be written to or is full; it holds what it held before.
    """
    path = path.absolute()
    _make(path)
    with _locked(path):
        there = _there(path)
        known = _known(path, there, saved)
        generation = 1 + max(
            [there["generation"] if there else 0]
            + [int(name[2]) for name in map(manifests.NAME.fullmatch, os.listdir(path)) if name]
        )
        if there:
            _collect(path, there)
        written: list[Path] = []

        def put(kind: str, parts: tensorfile.Parts, pieces: Any) -> dict[str, Any]:
            file = path / f"{kind}-{generation:08d}.safetensors"
            written.append(file)
            return {"file": file.name, "sha256": tensorfile.write(file, parts, pieces)}

        try:
            segments, begin = [], 0
            if known:
                segments, begin = _kept(known["segments"], snapshot.count, unmoved)
            count = snapshot.count - begin
            if count:
                parts = layout.parts(count + -count % TILE)
                file = put("rows", parts, _pieces(parts, snapshot, begin))
                segments.append({"rows": count + -count % TILE, "used": count, **file})
            alive_file = axes_file = None
            if snapshot.live is not None:
                same = known if saved and saved.alive is snapshot.live else None
                parts = _alive_parts(snapshot.count)
                alive_file = same["alive"] if same else put("alive", parts, [snapshot.live])
            if axes is not None:
                same = known if saved and saved.axes is axes else None
                axes_file = same["axes"] if same else put("axes", _axes_parts(len(axes)), [axes])
            manifest = manifests.new(
                **fields, generation=generation, segments=segments, alive=alive_file, axes=axes_file
            )
            _sync(path)
            new = _write(path, manifest)
        except BaseException:
            for file in written:
                file.unlink(missing_ok=True)
            raise
        now = Saved(path, manifest, snapshot.live, axes)
        try:
            os.replace(new, path / manifests.FILE)
            replaced(now)
        except BaseException:  # which does not say that it was not done
            if manifests.read_or_none(path) == manifest:
                replaced(now)
            raise
        _sync(path)
        _collect(path, manifest)


def load(
    path: Path, make: Callable[[dict[str, Any]], tuple[T, Layout]], *, verify: bool
) -> tuple[T, Loaded]:
    """Opens what a folder holds; ``make`` an index of the manifest's fields.

    Raises:
        FileNotFoundError: There is no index.
        ValueError: Anything in a file is not as it must be; names the file and the field.
    """
    path = path.absolute()
    manifest = manifests.read(path)
    try:
        return _open(path, manifest, make, verify)
    except ValueError:
        # A file may be gone because somebody has just saved; then nobody may meanwhile.
        if manifests.read(path) == manifest:
            raise
    with _locked(path, fcntl.LOCK_SH):
        return _open(path, manifests.read(path), make, verify)


def _open(
    path: Path,
    manifest: dict[str, Any],
    make: Callable[[dict[str, Any]], tuple[T, Layout]],
    verify: bool,
) -> tuple[T, Loaded]:
    try:
        index, layout = make(manifest)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / manifests.FILE}: {error}") from error

    def read(entry: dict[str, Any], parts: tensorfile.Parts, scattered: str | None = None):
        sha256 = entry["sha256"] if verify else None
        return tensorfile.read(path / entry["file"], parts, sha256, scattered)

    blocks, counts = [], []
    for segment in manifest["segments"]:
        arrays = read(segment, layout.parts(segment["rows"]), "tail")
        blocks.append(Block(layout, segment["rows"], arrays))
        counts.append(segment["used"])
    alive = axes = None
    if manifest["alive"]:
        alive = read(manifest["alive"], _alive_parts(sum(counts)))["alive"].clone()
        count = sum(counts)
        if bool(flags_of(alive, len(alive) * TILE)[count:].any()):
            file = path / manifest["alive"]["file"]
            raise ValueError(f"{file}: alive: expected bits of {count} rows, got more")
    if manifest["axes"]:
        axes = read(manifest["axes"], _axes_parts(layout.width))["axes"].clone()
        if not bool(torch.isfinite(axes).all()):
            raise ValueError(f"{path / manifest['axes']['file']}: axes: expected finite values")
    return index, Loaded(Saved(path, manifest, alive, axes), blocks, counts)


def _kept(
    segments: list[dict[str, Any]], count: int, unmoved: int
) -> tuple[list[dict[str, Any]], int]:
    """The segments that stay, and the row from which on rows are to be written."""
    begin = unmoved if unmoved == count else unmoved - unmoved % TILE
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


def _pieces(parts: tensorfile.Parts, snapshot: Snapshot, begin: int) -> Iterator[Tensor]:
    """The bytes of ``parts`` for the rows from ``begin`` on, padded with zeros to whole tiles."""
    ranges, first = [], 0  # blocks with their rows
    for block, count in zip(snapshot.blocks, snapshot.counts, strict=True):
        if first + count > begin:
            ranges.append((block, max(begin - first, 0), count))
        first += count
    padding = -snapshot.count % TILE
    for name, (dtype, shape) in parts.items():
        if name == "stats":  # by statistic, then by row
            for stat in range(shape[0]):
                yield from (block.stats[stat, first:last] for block, first, last in ranges)
                yield torch.zeros(padding)
        elif name in ("packed", "codes"):
            for block, first, last in ranges:
                array: Tensor = block.arrays[name]
                yield array[first // TILE : last // TILE]
                if last % TILE:
                    tile = array[last // TILE].clone()
                    tile[:, last % TILE :] = 0
                    yield tile
        else:
            yield from (block.arrays[name][first:last] for block, first, last in ranges)
            yield torch.zeros(padding, *shape[1:], dtype=dtype)


def _alive_parts(count: int) -> tensorfile.Parts:
    return {"alive": (torch.int64, (-(-count // TILE),))}


def _axes_parts(width: int) -> tensorfile.Parts:
    return {"axes": (torch.float32, (width, width))}


def _known(path: Path, there: dict[str, Any] | None, saved: Saved | None) -> dict[str, Any] | None:
    """The manifest to go on from; None: everything is to be written."""
    if there is None or saved is None or saved.path != path:
        return None
    if there != saved.manifest:
        raise ValueError(
            f"path: expected {path} as this index left it (generation "
            f"{saved.manifest['generation']}), got generation {there['generation']}, which "
            "another has saved; load it, or save elsewhere"
        )
    return there


# --- the folder


def _make(path: Path) -> None:
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        _sync(folder.parent)


def _there(path: Path) -> dict[str, Any] | None:
    """The manifest; None in a folder that is new, or where a first save was cut off."""
    try:
        return manifests.read(path)
    except FileNotFoundError:
        for name in sorted(os.listdir(path)):
            if not manifests.NAME.fullmatch(name) and name != manifests.FILE + ".new":
                got = path / name
                raise ValueError(f"path: expected an index or an empty folder, got {got}") from None
        return None
    except ValueError as error:  # somebody else's manifest.json, perhaps
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise ValueError(f"path: expected an index or an empty folder, got {error}") from error


@contextmanager
def _locked(path: Path, mode: int = fcntl.LOCK_EX) -> Iterator[None]:
    """One writer at a time, of all processes."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, mode)
        yield
    finally:
        os.close(folder)


def _sync(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(path: Path, manifest: dict[str, Any]) -> Path:
    new = path / (manifests.FILE + ".new")
    text = json.dumps(manifest, indent=1).encode()
    manifests.parse(new, text)  # what cannot be read again must replace nothing
    with open(new, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return new


def _collect(path: Path, manifest: dict[str, Any]) -> None:
    """Deletes our files that the manifest does not name."""
    keep = manifests.files_of(manifest)
    for name in os.listdir(path):
        if manifests.NAME.fullmatch(name) and name not in keep:
            (path / name).unlink(missing_ok=True)
