"""Building an index from files, in steps that survive an interruption."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrl_fast.cli import folders, sidecars
from mrl_fast.cli.inputs import Vectors, naming_ids, naming_rows
from mrl_fast.cli.output import Checkpoints, note, progress
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.index.codes import MEAN_ROWS
from mrl_fast.search.sharded import ShardedIndex
from mrl_fast.shared.arrays import as_tensor

CHECKPOINT_BYTES = 1 << 28  # of vectors as fp32
FIT_BYTES = 1 << 28
PIECES = 4

AnyIndex = MatryoshkaIndex | ShardedIndex


def build(
    vectors: Vectors,
    out: Path,
    dims: list[int],
    settings: dict[str, Any],
    *,
    checkpoint: int | None,
    overwrite: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Builds an index of the vectors in a folder, or goes on with one that was begun; a summary."""
    if max(dims) != vectors.width:
        raise ValueError(
            f"--dims: expected the largest to be the vectors' width {vectors.width}, got {dims}"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got {out}, which is a file")
    begun, new, made = time.perf_counter(), False, not out.exists()
    shards = settings.pop("shards")
    index = (
        MatryoshkaIndex(dims, **settings)
        if shards is None
        else ShardedIndex(dims, shards=shards, **settings)
    )
    if (out / manifests.FILE).exists() and not overwrite:
        index = MatryoshkaIndex.load(out)
        asked = {"dims": tuple(sorted(dims)), "shards": shards, **settings}
        if asked["prefix_dtype"] is None:  # whatever it was begun with
            del asked["prefix_dtype"]
            if asked["codes"] is None:
                del asked["codes"]
        _check_same(index, asked, out)
        _check_rows(index, vectors, out)
    else:
        if index.config.rotation or index.codes:
            _fit(index, vectors)
        if overwrite and out.exists() and folders.is_sharded(out) != (shards is not None):
            raise ValueError(
                f"--overwrite: expected {out} to be {'sharded' if shards else 'one index'} as what "
                "replaces it, got another kind: delete it first"
            )
        if new := not (out / manifests.FILE).exists():
            index.save(out)
    done = len(index)
    if done < vectors.rows:
        if done:
            note(f"going on after {done:,} rows", quiet)
        checkpoint = checkpoint or max(1, CHECKPOINT_BYTES // (4 * vectors.width))
        try:
            if not overwrite:
                sidecars.begin(out, vectors)
            index = _append_all(index, vectors, out, checkpoint, overwrite, quiet)
        except BaseException:
            if new:
                _undo_an_empty_build(out, made)
            raise
    sidecars.finish(out)
    return {
        "index": out, "rows": len(index), "added": len(index) - done, "dims": index.dims,
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def _fit(index: AnyIndex, vectors: Vectors) -> None:
    rows = FIT_BYTES // (4 * vectors.width) if index.config.rotation else MEAN_ROWS
    samples = vectors.matrix(max(1, rows))
    with naming_rows(vectors, samples, 0):
        index.fit(samples)


def _undo_an_empty_build(out: Path, made: bool) -> None:
    """Leaves a folder that was new as if nothing had been asked for, where no row was saved."""
    if not len(MatryoshkaIndex.load(out)):
        sidecars.remove(out)
        folders.delete(out)
        if made:
            out.rmdir()


def _append_all(
    index: AnyIndex,
    vectors: Vectors,
    out: Path,
    checkpoint: int,
    overwrite: bool,
    quiet: bool,
) -> AnyIndex:
    """Adds the rows that are missing.

    Saves and opens the index anew every ``checkpoint`` rows, so that no more of them are in memory.
    An index that is overwritten stays until the first save.
    """
    saved, again = len(index), "the same command"
    if overwrite:
        again += " without --overwrite"
    # At least PIECES a checkpoint: where files end, chunks are smaller, and few rows are left out.
    chunk = max(1, checkpoint // max(PIECES, -(-checkpoint // vectors.chunk_rows)))
    checkpoints = Checkpoints("build", vectors.rows, saved, quiet)
    try:
        bars = progress("build", vectors.rows, done=saved, quiet=quiet)
        with naming_ids(vectors), bars as bar:
            for part, ids, row in vectors.chunks(chunk, saved):
                if ids is None:
                    ids = np.arange(row, row + len(part))
                with naming_rows(vectors, part, row, index.dtype):
                    index.add(part, ids)
                bar.update(len(part))
                if len(index) + chunk > saved + checkpoint or len(index) == vectors.rows:
                    if overwrite and not saved:
                        sidecars.begin(out, vectors)
                    index.save(out)
                    index = MatryoshkaIndex.load(out)
                    saved = len(index)
                    checkpoints.passed(saved)
    except KeyboardInterrupt:  # it may come after a save whose rows are not counted here yet
        if not saved and not sidecars.unfinished(out):
            raise KeyboardInterrupt(f"{out} is as it was") from None
        saved = len(MatryoshkaIndex.load(out))
        raise KeyboardInterrupt(
            f"{saved:,} of {vectors.rows:,} rows are in {out}; {again} goes on after them"
        ) from None
    return index


def _check_same(index: AnyIndex, wanted: dict[str, Any], out: Path) -> None:
    """The index has the dims and settings that were asked for."""
    for name, value in wanted.items():
        there = getattr(index, name, None)  # one index has no shards
        if name == "rotation":
            there = None if there is None else "pca"
        if there != value:
            raise ValueError(
                f"--{name.replace('_', '-')}: expected {_word(there)} as in {out}, got "
                f"{_word(value)}; "
                "--overwrite builds anew"
            )


def _word(setting: Any) -> str:
    if setting is None:
        return "none"
    return ",".join(map(str, setting)) if isinstance(setting, tuple) else str(setting)


def _check_rows(index: AnyIndex, vectors: Vectors, out: Path) -> None:
    """The index holds the source's first rows, as far as its first and its last vector show."""
    if index.removed:
        raise ValueError(
            f"--out: expected {out} as it was built, got {index.removed:,} rows removed since; "
            "--overwrite builds anew"
        )
    count = len(index)
    if count > vectors.rows:
        raise ValueError(
            f"--out: expected at most the {vectors.rows:,} rows of {vectors.name} in {out}, got "
            f"{count:,}; --overwrite builds anew"
        )
    ids, coded = index.ids, index.dtype == "int8"
    dtype = torch.finfo(getattr(torch, "float32" if coded else index.dtype))
    for row in sorted({0, count - 1}) if count else ():
        part, given, _ = next(vectors.chunks(1, row))
        there, here = index.reconstruct(ids[row : row + 1]), as_tensor(part, "vectors").float()
        norm = float(torch.linalg.vector_norm(here))
        moved = float(torch.linalg.vector_norm(there - here))
        # Rounding to the dtype, and in fp32 where the rows were rotated there and back.
        rounding = dtype.eps * (norm + dtype.tiny * vectors.width**0.5) + 1e-5 * norm
        if coded:  # each value by half a 127th of the largest at most
            rounding += vectors.width**0.5 * norm / 254
        if int(ids[row]) != (row if given is None else given[0]) or not moved <= rounding:
            raise ValueError(
                f"--out: expected {out} to hold the first rows of {vectors.name}, got another "
                f"vector or id than in row {row:,}; --overwrite builds anew"
            )
