"""The manifest of a folder of shards: JSON that is checked field by field before it is used.

It has each shard's own manifest in it, so that a shard that was saved when the whole was not yet is
opened as the whole has it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mrl_fast.search.disk import manifest as manifests

FORMAT = "mrl_fast sharded index"
VERSION = 1
FILE = manifests.FILE
FOLDER = re.compile(r"shard-\d{5}")
ORDER = re.compile(r"order-(\d{8})\.safetensors")
MOST = 1 << 12  # shards
ROUTES = ("turn", "id")  # by which a new row finds its shard
MANIFEST_BYTES = 1 << 26  # at most
FIELDS = (
    "format", "version", "generation", "route", "next_id", "next_place", "dealt", "tuned", "order",
    "shards", "sha256",
)  # fmt: skip
OPTIONS = ("dims", "metric", "dtype", "prefix_dtype", "codes", "rotation")


def new(**fields: Any) -> dict[str, Any]:
    """As it is read back: tuples are lists."""
    made = manifests.signed(stored({"format": FORMAT, "version": VERSION, **fields}))
    read_back = json.loads(json.dumps(made))
    return {**read_back, "shards": [manifests.completed(each) for each in read_back["shards"]]}


def stored(manifest: dict[str, Any]) -> dict[str, Any]:
    """The fields that are written: of each shard those that its version has."""
    return {**manifest, "shards": [manifests.stored(each) for each in manifest["shards"]]}


def folder_of(shard: int) -> str:
    return f"shard-{shard:05d}"


def rows_of(shard: dict[str, Any]) -> int:
    """How many rows a shard's files hold, removed ones among them."""
    return sum(segment["used"] for segment in shard["segments"])


def read(path: Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, of another version, or of one index.
    """
    return parse(path / FILE, manifests.text_in(path, MANIFEST_BYTES, "a sharded index"))


def text_of(manifest: dict[str, Any]) -> bytes:
    """What ``parse`` reads."""
    return json.dumps(stored(manifest), indent=1).encode()


def parse(file: Path, text: bytes) -> dict[str, Any]:
    """The manifest that ``file`` holds, checked; its shards' completed as of their version."""
    if len(text) > MANIFEST_BYTES:
        raise ValueError(f"{file}: size: expected at most {MANIFEST_BYTES} bytes, got more")
    try:
        manifest = json.loads(text)
        digest = manifests.signed(manifest)["sha256"] if isinstance(manifest, dict) else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(manifest).__name__}")
    _check(file, manifest, digest)
    return manifest


def read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return read(path)
    except (FileNotFoundError, ValueError):
        return None


def _check(file: Path, manifest: dict[str, Any], digest: str | None) -> None:
    def need(ok: Any, name: str, expected: str, got: Any) -> None:
        if not ok:
            raise ValueError(f"{file}: {name}: expected {expected}, got {repr(got)[:80]}")

    def whole(value: Any, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high

    need(manifest.get("format") == FORMAT, "format", repr(FORMAT), manifest.get("format"))
    version = manifest.get("version")
    need(type(version) is int and version == VERSION, "version", str(VERSION), version)
    need(manifest.get("sha256") == digest, "sha256", f"{digest}", manifest.get("sha256"))
    need(set(manifest) == set(FIELDS), "fields", ", ".join(FIELDS), sorted(map(str, manifest)))
    generation = manifest["generation"]
    need(whole(generation, 1, 10**8 - 1), "generation", "a number", generation)
    need(manifest["route"] in ROUTES, "route", " or ".join(ROUTES), manifest["route"])
    need(whole(manifest["next_id"], 0, 2**63 - 1), "next_id", "an id", manifest["next_id"])
    for name in ("next_place", "dealt"):
        need(whole(manifest[name], 0, (1 << 62) - 1), name, "a number of rows", manifest[name])
    shards = manifest["shards"]
    need(isinstance(shards, list) and 0 < len(shards) <= MOST, "shards", "a list", shards)
    for i, shard in enumerate(shards):
        need(isinstance(shard, dict), f"shards[{i}]", "a manifest", shard)
        text = json.dumps(shard).encode()
        shard_file = file.parent / folder_of(i) / FILE
        shards[i] = manifests.parse(shard_file, text)
        for name in OPTIONS:
            expected, got = shards[0][name], shards[i][name]
            need(got == expected, f"shards[{i}] {name}", f"{expected} as of the first", got)
    order = manifest["order"]
    keys = {"file", "sha256", "runs"}
    need(isinstance(order, dict) and set(order) == keys, "order", f"{sorted(keys)}", order)
    name, sha256, runs = order["file"], order["sha256"], order["runs"]
    need(isinstance(name, str) and ORDER.fullmatch(name), "order file", "a file of order", name)
    good = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
    need(good, "order sha256", "64 hexadecimal digits", sha256)
    counts = [rows_of(shard) for shard in shards]
    good = isinstance(runs, list) and len(runs) == len(shards)
    need(good, "order runs", f"a number for each of {len(shards)} shards", runs)
    for number, count in zip(runs, counts, strict=True):
        need(whole(number, min(count, 1), count), "order runs", f"at most {count}", number)
