"""Searching an index for the queries of a file; tuning it to them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mrl_fast.cli import sidecars
from mrl_fast.cli.inputs import Vectors, check_width, naming_rows
from mrl_fast.cli.output import (
    check_out,
    in_options,
    note,
    progress,
    replacing,
    saying_on_interrupt,
    shows_progress,
)
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.index.stages import Lapse, lapse
from mrl_fast.search.readers import read_neighbours
from mrl_fast.shared.arrays import as_tensor
from mrl_fast.shared.recall import count_found
from mrl_fast.shared.types import SearchResult, Stage, Tuned, shown

BATCH = 1024  # queries a call
MANY = 1 << 24  # neighbours a call
OUTPUTS = (".npz", ".jsonl")
PLOTS = (".png", ".svg", ".pdf")

Write = Callable[[int, SearchResult], None]  # the first query's number, results of tensors


class Asked(NamedTuple):
    """What ``MatryoshkaIndex.search`` is asked for each query."""

    k: int
    stages: list[Stage] | None
    exact: bool
    allowed: np.ndarray | None  # ids, or a mask


def load(folder: Path, device: str, quiet: bool) -> MatryoshkaIndex:
    """An index to search; warns where its build was interrupted."""
    index = MatryoshkaIndex.load(folder, device=device)
    if building := sidecars.unfinished(folder):
        note(
            f"warning: {folder} holds {len(index):,} of {building['rows']:,} rows of "
            f"{building['source']}: its build was interrupted",
            quiet,
        )
    return index


def search(
    index: MatryoshkaIndex,
    queries: Vectors,
    asked: Asked,
    *,
    truth: Path | None,
    out: Path | None,
    shown: int,
    quiet: bool,
) -> dict[str, Any]:
    """A summary, and the results of the first ``shown`` queries, which may be of the width of any
    prefix that the index takes."""
    k, stages, lapsed = asked.k, None, lapse_of(index, queries.width, asked)
    why = lapsed and in_options(lapsed.why)
    if lapsed:
        again = f"tune again (mrl-fast index tune INDEX samples -k {lapsed.tune_for}), or "
        note(
            f"warning: the index is searched exactly, which may take many times as long, as {why}: "
            f"{again if lapsed.tune_for else ''}give --stages or --exact",
            quiet,
        )
        asked = asked._replace(exact=True)  # which it is: the index does not warn as well
    known = None if truth is None else _neighbours(truth, queries, k)
    hits, seconds, results = 0, 0.0, []
    with (
        _writer(out, queries.rows, k) as write,
        progress("search", queries.rows, unit="queries", quiet=quiet) as bar,
    ):
        done = 0
        for part, _, row in queries.chunks(max(1, min(BATCH, MANY // k))):
            part = as_tensor(part, "queries")
            begun = time.perf_counter()
            with naming_rows(queries, part, row):
                result = index.search(part, **asked._asdict())
            seconds += time.perf_counter() - begun
            stages = result.stages
            if known is not None:
                hits += _hits(index, part, result, known[done : done + len(part)])
            left = max(0, shown - done)
            results += _as_lists(done, result.scores[:left], result.ids[:left])
            write(done, result)
            done += len(part)
            bar.update(len(part))
    summary: dict[str, Any] = {
        "queries": queries.rows, "k": k, "dim": queries.width, "stages": stages, "lapsed": why
    }  # fmt: skip
    if known is not None:
        summary["recall"] = hits / max(1, int((known >= 0).sum()))
    return {**summary, "seconds": seconds, "out": out, "results": results}


def lapse_of(index: MatryoshkaIndex, width: int, asked: Asked) -> Lapse | None:
    """Of a plain search by whole queries; None of any other."""
    if asked.exact or asked.stages is not None or width != index.width:
        return None
    return lapse(
        index.tuned,
        asked.k,
        len(index),
        filtered=asked.allowed is not None,
        has_graph=index.has_graph,
    )


def tune(
    index: MatryoshkaIndex,
    queries: Vectors,
    folder: Path,
    *,
    plot: Path | None,
    quiet: bool,
    **target: Any,
) -> tuple[Any, bool]:
    """Saves the stages that ``MatryoshkaIndex.tune`` finds, and draws its report; the report, and
    whether they were saved, which they are not where no list could be tried in the time."""
    check_width(queries, index)
    before = index.tuned
    if plot is not None:
        import matplotlib  # noqa: F401  # before the work, if it is missing

        check_out(plot, "--plot", PLOTS)
    with saying_on_interrupt(
        folder, f"nothing was saved in {folder}", f"the stages are saved in {folder}"
    ):
        samples = queries.matrix()
        with naming_rows(queries, samples, queries.first):
            report = index.tune(samples, **target, progress=shows_progress(quiet))
        late = sum(left.lists for left in report.untried if left.late)
        tried = not late or any(row.stages for row in report.rows)
        if tried:
            index.save(folder)
        _note_lateness(before, report, late, tried, folder, quiet)
        if plot is not None:
            with replacing(plot) as new:
                report.plot(new)
    return report, tried


def _note_lateness(
    before: Tuned | None, report: Any, late: int, tried: bool, folder: Path, quiet: bool
) -> None:
    """Says what is replaced by exact search, or is not, where the time did not do."""
    stages = None if before is None else before.stages
    if not late or (tried and (report.stages or not stages)):
        return
    stays = f"{folder} stays tuned to {shown(stages)}" if stages else f"{folder} is as it was"
    note(
        f"warning: {f'exact search replaces {shown(stages)}' if tried else stays}, and {late:,} "
        f"stage lists were not tried for want of time: give more --seconds",
        quiet,
    )


def _neighbours(path: Path, queries: Vectors, k: int) -> torch.Tensor:
    """The true k best of each query, ``[queries, k]``, −1 where none."""
    known = read_neighbours(path)
    if len(known) < queries.rows or known.shape[1] < k:
        raise ValueError(
            f"{path}: expected the {k} nearest ids of each of {queries.rows:,} queries, got shape "
            f"{list(known.shape)}"
        )
    return torch.from_numpy(np.ascontiguousarray(known[: queries.rows, :k]))


def _hits(
    index: MatryoshkaIndex, queries: torch.Tensor, found: SearchResult, known: torch.Tensor
) -> int:
    """How many of the true neighbours ``known``, ``[B, k]``, were found.

    Where other ids were found, these and the true ones are scored alike, at the queries' width, so
    that ``count_found`` sees ties. True ids that the index does not have are missed.
    """
    differ = (found.ids.sort(dim=1).values != known.sort(dim=1).values).any(dim=1)
    hits = int((known[~differ] >= 0).sum())
    for i in differ.nonzero()[:, 0].tolist():
        ids = torch.cat([found.ids[i], known[i]]).unique()
        ids = ids[ids >= 0]
        scored = index.search(queries[i : i + 1], max(1, len(ids)), exact=True, allowed=ids)
        hits += int(count_found(_picked(scored, found.ids[i]), _picked(scored, known[i])))
    return hits


def _picked(scored: SearchResult, ids: torch.Tensor) -> SearchResult:
    """These ids' scores ``[1, k]`` by one query's results; −∞ and −1 where they are not among
    them."""
    by_id = scored.ids.sort(dim=1)
    place = torch.searchsorted(by_id.values, ids[None]).clamp_max(by_id.values.shape[1] - 1)
    here = (by_id.values.gather(1, place) == ids) & (ids >= 0)
    scores = scored.scores.gather(1, by_id.indices.gather(1, place))
    return SearchResult(scores.where(here, -torch.inf), ids[None].where(here, -1))


def _as_lists(first: int, scores: torch.Tensor, ids: torch.Tensor) -> list[dict[str, Any]]:
    """The neighbours of each query, without missing ones."""
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
    """Writes results to a file, which is there once all of them are in it."""
    if out is None:
        yield lambda first, result: None
        return
    check_out(out, "--out", OUTPUTS)
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
