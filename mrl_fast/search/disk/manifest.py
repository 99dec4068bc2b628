"""The manifest of a saved index: JSON that is checked field by field before it is used."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mrl_fast.search.index.blocks import VERSION
from mrl_fast.search.index.graph import ENTRIES
from mrl_fast.shared.native import TILE

FORMAT = "mrl_fast index"
VERSIONS = tuple(range(1, VERSION + 1))  # that can be read
FILE = "manifest.json"
NAME = re.compile(r"(rows|alive|axes|graph)-(\d{8})\.safetensors")
MANIFEST_BYTES = 1 << 20  # at most; parsed, it may take 25 times that
ROWS = (1 << 32) - 1  # at most
INDEX_FIELDS = ("dims", "metric", "dtype", "prefix_dtype", "codes", "rotation", "next_id", "tuned")
FIELDS = ("format", "version", "generation", *INDEX_FIELDS, "segments", "alive", "axes", "sha256")
PATIENCE_S = 20.0  # to wait for a folder that is saved to again and again

T = TypeVar("T")


def new(version: int, **fields: Any) -> dict[str, Any]:
    """As it is read back: tuples are lists."""
    manifest = signed({"format": FORMAT, "version": version, **fields})
    return completed(json.loads(json.dumps(manifest)))


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of its other fields."""
    plain = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def same_but_generation(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one == {**other, **{name: one[name] for name in ("generation", "sha256")}}


def read(path: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another version.
    """
    return parse(path / FILE, text_in(path, MANIFEST_BYTES, "an index"))


def text_in(path: Path, most: int, held: str) -> bytes:
    """What a folder's manifest says, of at most so many bytes, or one more.

    Args:
        held: What the folder should hold, for messages.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It cannot be read.
    """
    file = path / FILE
    try:
        with open(file, "rb") as opened:
            return opened.read(most + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"path: expected a folder that holds {held}, got {path}") from None
    except NotADirectoryError:
        raise ValueError(
            f"path: expected a folder that MatryoshkaIndex.save made, got a file: {path} (one of "
            "FAISS: MatryoshkaIndex.from_faiss(faiss.read_index(...)))"
        ) from None
    except OSError as error:
        raise ValueError(f"{file}: expected a file to read, got {error.strerror}") from error


def parse(file: Path, text: bytes) -> dict[str, Any]:
    """The manifest that ``file`` holds, checked."""
    if len(text) > MANIFEST_BYTES:
        raise ValueError(f"{file}: size: expected at most {MANIFEST_BYTES} bytes, got more")
    try:
        manifest = json.loads(text)
        digest = signed(manifest)["sha256"] if isinstance(manifest, dict) else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(manifest).__name__}")
    _check(file, manifest, digest)
    return completed(manifest)


def completed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an index of any version, with those added that its version did not have."""
    return {"codes": None, "graph": None, **fields}


def stored(manifest: dict[str, Any]) -> dict[str, Any]:
    """The fields that are written: those that its version has, and a graph where there is one."""
    without = [
        *(["codes"] if manifest["version"] == 1 else []),
        *([] if manifest["graph"] else ["graph"]),
    ]
    return {name: value for name, value in manifest.items() if name not in without}


def text_of(manifest: dict[str, Any]) -> bytes:
    """What ``parse`` reads."""
    return json.dumps(stored(manifest), indent=1).encode()


def format_of(path: Path) -> str | None:
    """The format that a folder's manifest names; None where there is nothing of the kind."""
    try:
        with open(path / FILE, "rb") as opened:
            return format_in(opened.read())
    except OSError:
        return None


def format_in(text: bytes) -> str | None:
    """As ``format_of``, in what such a file holds."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    named = fields.get("format") if isinstance(fields, dict) else None
    return named if isinstance(named, str) else None


def read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return read(path)
    except (FileNotFoundError, ValueError):
        return None


def settled(
    path: Path,
    use: Callable[[dict[str, Any]], T],
    read: Callable[[Path], dict[str, Any]],
) -> T:
    """``use`` of a folder's manifest; once more if it failed and the folder was saved to meanwhile.

    Args:
        read: The folder's manifest.

    Raises:
        FileNotFoundError: There is no manifest.
        ValueError: As ``use`` raises; or the folder was saved to for all of PATIENCE_S.
    """
    manifest, begun = read(path), time.monotonic()
    while True:
        try:
            return use(manifest)
        except ValueError as error:
            now = read(path)
            if now == manifest:
                raise
            if time.monotonic() - begun > PATIENCE_S:
                raise ValueError(
                    f"{path}: expected a folder that rests for the time of a load, got a new "
                    f"manifest again and again for {PATIENCE_S:.0f} s"
                ) from error
            manifest = now


def files_of(manifest: dict[str, Any]) -> set[str]:
    return {name for name, _ in entries_of(manifest)}


def entries_of(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The files, and their checksums."""
    entries = [*manifest["segments"], *(manifest.get(name) for name in ("alive", "axes", "graph"))]
    return [(entry["file"], entry["sha256"]) for entry in entries if entry]


def _check(file: Path, manifest: dict[str, Any], digest: str | None) -> None:
    """Checks the fields; of INDEX_FIELDS most are checked by the index that is made of them."""

    def need(ok: Any, name: str, expected: str, got: Any) -> None:
        if not ok:
            raise ValueError(f"{file}: {name}: expected {expected}, got {repr(got)[:80]}")

    def whole(value: Any, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high

    def names_file(entry: Any, name: str, kind: str, keys: set[str]) -> None:
        need(isinstance(entry, dict) and set(entry) == keys, name, f"{sorted(keys)}", entry)
        matched = NAME.fullmatch(entry["file"]) if isinstance(entry["file"], str) else None
        need(matched and matched[1] == kind, f"{name} file", f"a file of {kind}", entry["file"])
        sha256 = entry["sha256"]
        good = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
        need(good, f"{name} sha256", "64 hexadecimal digits", sha256)

    get = manifest.get
    need(get("format") == FORMAT, "format", repr(FORMAT), get("format"))
    known = get("version") in VERSIONS and type(get("version")) is int
    need(known, "version", " or ".join(map(str, VERSIONS)), get("version"))
    need(get("sha256") == digest, "sha256", f"{digest}", get("sha256"))
    fields = set(FIELDS).difference(["codes"] if manifest["version"] == 1 else [])
    need(
        set(manifest) - {"graph"} == fields, "fields", ", ".join(FIELDS), sorted(map(str, manifest))
    )
    need(whole(get("generation"), 1, 10**8 - 1), "generation", "a number", get("generation"))
    need(whole(get("next_id"), 0, 2**63 - 1), "next_id", "an id", get("next_id"))
    segments = manifest["segments"]
    need(isinstance(segments, list), "segments", "a list", segments)
    for i, segment in enumerate(segments):
        name = f"segments[{i}]"
        names_file(segment, name, "rows", {"file", "sha256", "rows", "used"})
        rows, used = segment["rows"], segment["used"]
        need(whole(rows, TILE, ROWS + 1), f"{name} rows", "a number of rows", rows)
        need(rows % TILE == 0, f"{name} rows", f"a multiple of {TILE}", rows)
        need(whole(used, 1, rows), f"{name} used", f"1 to {rows}", used)
        last = i == len(segments) - 1
        need(last or used % TILE == 0, f"{name} used", f"a multiple of {TILE}", used)
    total = sum(segment["used"] for segment in segments)
    need(total <= ROWS, "segments", f"at most {ROWS} rows", total)
    if manifest["alive"] is not None:
        need(segments, "alive", "none without rows", manifest["alive"])
        names_file(manifest["alive"], "alive", "alive", {"file", "sha256"})
    has_axes = manifest["rotation"] is not None or manifest.get("codes") is not None
    if manifest["axes"] is not None:
        names_file(manifest["axes"], "axes", "axes", {"file", "sha256"})
        need(has_axes, "axes", "none without a rotation or codes", manifest["axes"])
    else:
        need(not (has_axes and segments), "axes", "a file where rows are rotated or coded", None)
    if (graph := manifest.get("graph")) is not None:
        names_file(graph, "graph", "graph", {"file", "sha256", "rows", "entries"})
        need(whole(graph["rows"], 1, total), "graph rows", f"1 to {total}", graph["rows"])
        entries = graph["entries"]
        need(whole(entries, 1, ENTRIES), "graph entries", f"1 to {ENTRIES}", entries)
