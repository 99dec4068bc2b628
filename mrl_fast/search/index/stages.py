"""Stages, checked against the index that they are of; and which of them a plain search uses."""

from __future__ import annotations

import sys
import warnings
from typing import Any, NamedTuple

from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.graph import walks
from mrl_fast.shared.checks import check_int, check_stages
from mrl_fast.shared.types import Stage, Tuned

MANY = 1 << 62  # more than there are rows, and yet an int64
_GRAPH = ("graph",), ["graph"]
GROWTH = 1.1  # times the vectors that an index was tuned with: up to so many its stages hold


def checked_stages(
    x: Any, config: IndexConfig, k: int | None = None, width: int | None = None
) -> list[Stage]:
    """Stages by dims, and codes, of the index, the last of which keeps k where that is given; none
    goes past the queries' ``width`` where that is."""
    dims, ranking = config.dims, config.ranking
    listed = x if isinstance(x, (list, tuple)) else ()
    coded = (s for s in listed if isinstance(s, (list, tuple)) and s[:1] not in _GRAPH)
    if not ranking and any(len(s) == 3 for s in coded):
        raise TypeError(
            f"stages: expected (dim, keep) pairs, got {x!r}: (dim, bits, keep) needs an index with "
            "codes='bits' or prefix_dtype='int8'"
        )
    on_host = config.device == "cpu"
    further = config.code.reranking if on_host else ()
    walked = [s for s in listed[:1] if isinstance(s, (list, tuple)) and s[:1] in _GRAPH]
    if config.device != "cpu" and walked:
        raise ValueError(f"stages[0]: expected no graph with device={config.device!r}, got one")
    checked = list(check_stages(x, ranking, further, graph=on_host))
    first = int(walks(checked))
    if first and width is not None and width < config.width:
        raise ValueError(
            f"stages[0]: expected no graph for queries of width {width}: its edges are of all "
            f"{config.width} columns"
        )
    for i, (dim, *bits, _) in enumerate(checked[first:], first):
        if dim not in dims:
            raise ValueError(f"stages[{i}] dim: expected one of {tuple(dims)}, got {dim}")
        if width is not None and dim > width:
            raise ValueError(
                f"stages[{i}] dim: expected at most {width}, the queries' width, got {dim}"
            )
        if bits and bits[0] > 1 and dim != config.coded:
            raise ValueError(
                f"stages[{i}] dim: expected {config.coded} where {bits[0]} bits rank, got {dim}"
            )
    if k is None:
        return checked
    if checked[-1][1] < k:
        raise ValueError(f"stages: expected a last keep of at least k={k}, got {checked[-1][1]}")
    return [*checked[:-1], (checked[-1][0], k)]


def checked_tuned(x: Any, config: IndexConfig) -> Tuned:
    """The fields of a Tuned, as a manifest holds them; the recall may be missing."""
    names = {"stages", "k", "rows"}
    if not isinstance(x, dict) or not names <= set(x) <= names | {"recall"}:
        raise ValueError(f"tuned: expected stages, k, rows and recall, got {x!r:.80}")
    k, chosen, recall = check_int(x["k"], "tuned k", 1, MANY), x["stages"], x.get("recall")
    if chosen is not None:
        chosen = checked_stages(chosen, config, k)
        check_int(chosen[0][-1], "tuned keep", 1, MANY)
    if recall is not None and (type(recall) not in (int, float) or not 0 < recall <= 1):
        raise ValueError(f"tuned recall: expected a number in (0, 1], got {recall!r:.80}")
    return Tuned(chosen, k, check_int(x["rows"], "tuned rows", 0, MANY), recall)


def tuned_now(tuned: Tuned | None, rows: int) -> Tuned | None:
    """What was chosen, and whether it is in force in an index of so many vectors."""
    return None if tuned is None else tuned._replace(in_force=rows <= GROWTH * tuned.rows)


class Lapse(NamedTuple):
    """Why a plain search does not use the stages that were chosen.

    Attributes:
        kind: ``"allowed"``, ``"k"``, ``"rows"`` or ``"graph"``.
        why: A clause.
        tune_for: The k to tune for again; None where that would not help.
    """

    kind: str
    why: str
    tune_for: int | None


def lapse(
    tuned: Tuned | None, k: int, rows: int, *, filtered: bool, has_graph: bool = True
) -> Lapse | None:
    """Of a search for k of so many vectors, of some of them where it is filtered; None where the
    stages are used, and where none were chosen."""
    if tuned is None or tuned.stages is None:
        return None
    if filtered:
        why = "what tune showed holds for all vectors, not for those of allowed="
        return Lapse("allowed", why, None)
    if k > tuned.k:
        return Lapse("k", f"it is tuned for k up to {tuned.k} and k={k} was asked for", k)
    if rows > GROWTH * tuned.rows:
        why = f"it was tuned with {tuned.rows:,} vectors and now holds {rows:,}"
        return Lapse("rows", why, tuned.k)
    if walks(tuned.stages) and not has_graph:
        return Lapse(
            "graph", "its graph is gone with the rows that moved: build_graph(), and", tuned.k
        )
    return None


def plain_stages(
    tuned: Tuned | None,
    k: int,
    rows: int,
    said: set[str],
    *,
    filtered: bool = False,
    has_graph: bool = True,
) -> list[Stage] | None:
    """The stages of a search for k of so many vectors that names none, None for an exact one.

    Where stages were chosen and are not used, it warns, once for each kind of lapse in ``said``.
    """
    if tuned is None or tuned.stages is None:
        return None
    found = lapse(tuned, k, rows, filtered=filtered, has_graph=has_graph)
    if found is None:
        return [*tuned.stages[:-1], (tuned.stages[-1][0], k)]
    if found.kind not in said:
        said.add(found.kind)
        again = f"tune again (index.tune(samples, k={found.tune_for})), or "
        warnings.warn(
            f"the index is searched exactly, which may take many times as long, as {found.why}: "
            f"{again if found.tune_for else ''}pass stages= or exact=True",
            stacklevel=_callers_level(),
        )
    return None


def _callers_level() -> int:
    """The ``stacklevel`` at which the caller's warning is where this package was called."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] == "mrl_fast":
        frame, level = frame.f_back, level + 1
    return level
