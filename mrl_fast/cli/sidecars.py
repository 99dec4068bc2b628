"""What commands keep in an index's folder beside the index, as JSON.

The index's own files and its manifest have no place for it. An index in a folder, of any version,
passes other files over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mrl_fast.cli.inputs import Vectors
from mrl_fast.cli.output import replacing

UNFINISHED = "unfinished.json"  # while a build is not done: its source and rows
COLUMNS = "columns.json"  # what a build was told to read of its source, where it was told
OPTIONS = ("column", "key", "id_column")


def unfinished(folder: Path) -> dict[str, Any] | None:
    """The ``source`` and ``rows`` of a build that is not done; None where there is none."""
    found = _read(folder / UNFINISHED)
    if found is None:
        return None
    try:
        return {"source": str(found["source"]), "rows": int(found["rows"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / UNFINISHED}: expected a source and rows, got {error}"
        ) from None


def columns(folder: Path) -> dict[str, str]:
    """Options by name."""
    found = _read(folder / COLUMNS) or {}
    for name, value in found.items():
        if name not in OPTIONS or not isinstance(value, str):
            raise ValueError(
                f"{folder / COLUMNS}: expected names for {', '.join(OPTIONS)}, got "
                f"{name!r}: {value!r}"
            )
    return found


def check_finished(folder: Path) -> None:
    if unfinished(folder):
        raise ValueError(f"{folder}: expected a whole index, got an unfinished build: run it again")


def begin(folder: Path, vectors: Vectors) -> None:
    """Notes that a build begins, and what it was told."""
    _write(folder / UNFINISHED, {"source": vectors.where, "rows": vectors.rows})
    if vectors.told:
        _write(folder / COLUMNS, vectors.told)
    else:
        (folder / COLUMNS).unlink(missing_ok=True)


def finish(folder: Path) -> None:
    (folder / UNFINISHED).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    for name in (UNFINISHED, COLUMNS):
        (folder / name).unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def _write(file: Path, content: dict[str, Any]) -> None:
    with replacing(file) as new:
        new.write_text(json.dumps(content))
