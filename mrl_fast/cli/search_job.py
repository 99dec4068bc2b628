"""Searching an index for the queries of a file; tuning it to them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrl_fast.cli.inputs import Vectors, check_width, naming_rows
from mrl_fast.cli.output import progress, replacing, shows_progress
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.readers import read_neighbours
from mrl_fast.shared.arrays import as_tensor
from mrl_fast.shared.types import ExactResult, SearchResult

BATCH = 1024  # queries a call
MANY = 1 << 24  # neighbours a call
OUTPUTS = (".npz", ".jsonl")

Write = Callable[[int, SearchResult], None]  # the first query's number, results of tensors


def search(
    index: MatryoshkaIndex,
    queries: Vectors,
    k: int,
    *,
    stages: list[tuple[int, int]] | None,
    exact: bool,
    allowed: np.ndarray | None,
    truth: Path | None,
    out: Path | None,
    keep: int,
    quiet: bool,
) -> dict[str, Any]:
    """A summary, and the first ``keep`` queries' results."""
    check_width(queries, index)
    known = None if truth is None else _neighbours(truth, queries, k)
    hits, seconds, results, result = 0, 0.0, [], None
    with (
        _writer(out, queries.rows, k) as write,
        progress("search", queries.rows, unit="queries", quiet=quiet) as bar,
    ):
        done = 0
        for part, _, row in queries.chunks(max(1, min(BATCH, MANY // k))):
            begun = time.perf_counter()
            with naming_rows(queries.path, part, row):
                result = index.search(
                    as_tensor(part, "queries"), k, stages=stages, exact=exact, allowed=allowed
                )
            seconds += time.perf_counter() - begun
            if known is not None:
                hits += _hits(result.ids, known[done : done + len(part)])
            left = max(0, keep - done)
            results += _as_lists(done, result.scores[:left], result.ids[:left])
            write(done, result)
            done += len(part)
            bar.update(len(part))
    if stages is None and not isinstance(result, ExactResult) and index.tuned is not None:
        stages = [*(index.tuned.stages or ())[:-1], (index.width, k)]
    summary: dict[str, Any] = {"queries": queries.rows, "k": k, "stages": stages}
    if known is not None:
        summary["recall"] = hits / max(1, int((known >= 0).sum()))
    return {**summary, "seconds": seconds, "out": out, "results": results}


def tune(
    index: MatryoshkaIndex, queries: Vectors, *, plot: Path | None, quiet: bool, **target: Any
) -> Any:
    """The report of ``MatryoshkaIndex.tune``; draws it."""
    check_width(queries, index)
    if plot is not None:
        import matplotlib  # noqa: F401  # before the work, if it is missing
    samples = queries.matrix()
    with naming_rows(queries.path, samples, queries.first):
        report = index.tune(samples, **target, progress=shows_progress(quiet))
    if plot is not None:
        report.plot(plot)
    return report


def _neighbours(path: Path, queries: Vectors, k: int) -> torch.Tensor:
    """The true k best of each query, ``[queries, k]``, −1 where none."""
    known = read_neighbours(path)
    if len(known) < queries.rows or known.shape[1] < k:
        raise ValueError(
            f"{path}: expected the {k} nearest ids of each of {queries.rows:,} queries, got shape "
            f"{list(known.shape)}"
        )
    return torch.from_numpy(np.ascontiguousarray(known[: queries.rows, :k]))


def _hits(found: torch.Tensor, known: torch.Tensor) -> int:
    """How many of the known ids ``[B, k]`` were found."""
    found = found.sort(dim=1).values
    place = torch.searchsorted(found, known).clamp(max=found.shape[1] - 1)
    return int(((found.gather(1, place) == known) & (known >= 0)).sum())


def _as_lists(first: int, scores: torch.Tensor, ids: torch.Tensor) -> list[dict[str, Any]]:
    """A query's neighbours each, without missing ones."""
    rows = zip(scores.tolist(), ids.tolist(), strict=True)
    return [
        {
            "query": first + i,
            "ids": [j for j in mine if j >= 0],
            "scores": [s for s, j in zip(its, mine, strict=True) if j >= 0],
        }
        for i, (its, mine) in enumerate(rows)
    ]


@contextmanager
def _writer(out: Path | None, queries: int, k: int) -> Iterator[Write]:
    """Writes results to a file that is there once all of them are."""
    if out is None:
        yield lambda first, result: None
        return
    if out.suffix not in OUTPUTS:
        raise ValueError(f"--out: expected a file ending in {' or '.join(OUTPUTS)}, got {out}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: expected a folder that there is, got {out.absolute().parent}")
    if out.suffix == ".npz":
        scores, ids = np.empty((queries, k), np.float32), np.empty((queries, k), np.int64)

        def keep(first: int, result: SearchResult) -> None:
            scores[first : first + len(result.ids)] = result.scores
            ids[first : first + len(result.ids)] = result.ids

        yield keep
        with replacing(out) as new, open(new, "wb") as file:
            np.savez(file, scores=scores, ids=ids)
        return
    with replacing(out) as new, open(new, "w") as file:
        yield lambda first, result: file.writelines(
            json.dumps(line) + "\n" for line in _as_lists(first, *result)
        )
