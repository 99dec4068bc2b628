"""Vectors and ids in files, read a chunk at a time: one module a format, and the table of them.

A size that a file states in its header is compared with the file's own size before it is used.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mrl_fast.search.readers import npy
from mrl_fast.search.readers.base import Source, existing


class Format(NamedTuple):
    """The module that reads a format, imported when it is needed: its package may be an extra.

    Attributes:
        vectors: The options of its ``open_vectors``; None: the format holds no vectors.
        integers: The options of its ``read_integers``; None: the format holds no integers.
    """

    module: str
    vectors: tuple[str, ...] | None = None
    integers: tuple[str, ...] | None = None


PARQUET = (".parquet", ".pq")
FORMATS = {
    ".npy": Format("npy", vectors=(), integers=()),
    ".fvecs": Format("vecs", vectors=()),
    ".bvecs": Format("vecs", vectors=()),
    ".ivecs": Format("vecs", integers=()),
    ".safetensors": Format("safetensors", vectors=("key",)),
    ".txt": Format("text", integers=()),
    **dict.fromkeys(PARQUET, Format("parquet", ("column", "id_column"), ("id_column",))),
}


def open_vectors(
    path: str | os.PathLike[str],
    column: str | None = None,
    key: str | None = None,
    id_column: str | None = None,
) -> Source:
    """Opens a file of vectors without reading them.

    Args:
        path: ``.npy``: an array ``[n, D]`` of floats or bytes. ``.fvecs``, ``.bvecs``: rows of an
            int32 D and D floats or bytes. ``.safetensors``: a tensor ``[n, D]``. ``.parquet``: a
            column of lists of D floats.
        column: Parquet's column, ``meta.emb`` for a field of structs; default: the only one that
            holds lists of floats.
        key: The tensor's name; default: the only ``[n, D]`` tensor of floats.
        id_column: Parquet's column of ids, integers.

    Returns:
        Source: ``rows``, ``width`` and ``chunks``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another format, or a file that is damaged or empty; names the file.
        ModuleNotFoundError: What reads this format is not installed.
    """
    options = {"column": column, "key": key, "id_column": id_column}
    source = _read(existing(path), "vectors", "open_vectors", options)
    if not source.rows or not source.width:
        got = f"[{source.rows}, {source.width}]"
        raise ValueError(f"{source.path}: expected at least one vector, got shape {got}")
    return source


def read_ids(path: str | os.PathLike[str], column: str | None = None) -> np.ndarray:
    """Ids ``[n]`` int64, all at once.

    Args:
        path: ``.npy`` of integers ``[n]``, ``.ivecs`` of width 1, ``.txt`` with one a line, or
            ``.parquet``.
        column: Parquet's column.

    Raises:
        FileNotFoundError, ValueError: As in ``open_vectors``.
    """
    ids = _read(existing(path), "integers", "read_integers", {"id_column": column})
    if ids.ndim == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    if ids.ndim != 1:
        raise ValueError(f"{path}: expected ids [n], got shape {list(ids.shape)}")
    return ids


def read_selection(
    path: str | os.PathLike[str], size: int, column: str | None = None
) -> np.ndarray:
    """Ids ``[n]`` int64 as of ``read_ids``, or a mask ``[size]`` bool of an index's rows.

    Args:
        path: As of ``read_ids``, but ``.npy`` of uint8 is no ids; or ``.npy`` ``[size]`` of bool,
            or of uint8 that are 0 or 1.

    Raises:
        FileNotFoundError, ValueError: As in ``open_vectors``; a mask of another size.
    """
    file = existing(path)
    mask = npy.read_mask(file, size) if file.suffix.lower() == ".npy" else None
    return read_ids(file, column) if mask is None else mask


def holds_vectors(path: Path) -> bool:
    """Whether a file of this name may hold vectors."""
    row = FORMATS.get(path.suffix.lower())
    return row is not None and row.vectors is not None


def options_of(path: Path) -> tuple[str, ...]:
    """The options that ``open_vectors`` takes for this file."""
    row = FORMATS.get(path.suffix.lower())
    return (row and row.vectors) or ()


def read_neighbours(path: str | os.PathLike[str]) -> np.ndarray:
    """The true neighbours of queries, ``[queries, k]`` int64, all at once: ``.ivecs`` or ``.npy``.

    Raises:
        FileNotFoundError, ValueError: As in ``open_vectors``.
    """
    ids = _read(existing(path), "integers", "read_integers", {})
    if ids.ndim != 2:
        raise ValueError(f"{path}: expected ids [queries, k], got shape {list(ids.shape)}")
    return ids


def _read(file: Path, what: str, function: str, given: dict[str, str | None]) -> Any:
    """Calls a function of the format's module with the options that it takes."""
    suffix = file.suffix.lower()
    formats = {name: row for name, row in FORMATS.items() if getattr(row, what) is not None}
    if suffix not in formats:
        expected = f"{what} in one of {', '.join(formats)}"
        raise ValueError(f"{file}: expected {expected}, got {suffix or 'no'!r}")
    takes = getattr(formats[suffix], what)
    for name, value in given.items():
        if value is not None and name not in takes:
            raise ValueError(f"{file}: {name}: expected none for {suffix}, got {value!r}")
    module = import_module(f"mrl_fast.search.readers.{formats[suffix].module}")
    return getattr(module, function)(file, **{name: given.get(name) for name in takes})
