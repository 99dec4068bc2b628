"""``mrl-fast index search``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mrl_fast.cli import search_job
from mrl_fast.cli.inputs import Vectors, stages_of
from mrl_fast.cli.options import (
    MASK,
    SELECTION,
    Column,
    Device,
    Folder,
    Json,
    Key,
    Limit,
    Queries,
    Quiet,
    Threads,
)
from mrl_fast.cli.output import failing, note, show_json, show_notes, show_rows
from mrl_fast.search.readers import PARQUET, read_selection
from mrl_fast.shared.types import shown

SHOWN = 3  # queries whose neighbours are printed
SHOWN_K = 10

Neighbours = Annotated[
    int,
    typer.Option(
        "-k",
        "--k",
        min=1,
        help="Neighbours a query. Where the index holds fewer vectors, or fewer are allowed, the "
        "missing ones are padded in .npz, and left out in .jsonl, --json and what is printed.",
    ),
]
Stages = Annotated[
    str | None,
    typer.Option(
        metavar="DIM:KEEP,…",
        help="Search all rows by the first dim, and rerank what each stage keeps by the next; dims "
        "are of the index, the last keep at least k. With --codes bits the first may be "
        "dim:1:keep, and further ones dim:8:keep.  [default: as tuned, else exact]",
    ),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="The k best, provably, also where the index is tuned.")
]
Allowed = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help=f"Search these ids only: {SELECTION}; or {MASK}."),
]
Truth = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The true ids of each query, best first, .ivecs or .npy [n, at least k]: prints "
        "recall@k, the share of the first k that were found. An id that is not among them, but "
        "whose score, by all columns of the queries, equals the worst of theirs, counts too.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write all results: .npz with scores fp32 and ids int64, [n, k], −inf and −1 where "
        "there are fewer; or .jsonl with a line {query, ids, scores} each.",
    ),
]


def search(
    index: Folder,
    queries: Queries,
    k: Neighbours = 10,
    stages: Stages = None,
    exact: Exact = False,
    allowed: Allowed = None,
    truth: Truth = None,
    out: Out = None,
    column: Column = None,
    key: Key = None,
    limit: Limit = None,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the k nearest vectors of each query.

    Queries that are of one of the index's dims, not of its width, are searched by that prefix.

    Prints the first three queries' neighbours, the best first; the larger a score the better, with
    l2 it is the negative squared distance. With --json the document has the neighbours of all
    queries, unless they go to --out; its "stages" are null where the search was exact.

    \b
    Examples:
      mrl-fast index search my-index queries.npy -k 10 --out results.npz
      mrl-fast index search my-index queries.npy --stages 64:200,768:10
      mrl-fast index search my-index queries.fvecs --truth truth.ivecs
      mrl-fast index search my-index queries.npy --allowed english.npy
    """
    with failing(quiet):
        if exact and stages is not None:
            raise ValueError(f"--exact: expected no --stages beside it, got {stages}")
        if allowed is not None and allowed.suffix.lower() in PARQUET:
            raise ValueError(f"--allowed: expected .npy, .ivecs or .txt, got {allowed}")
        vectors = Vectors(queries, column=column, key=key, limit=limit)
        show_notes(vectors, quiet, ids=False)
        loaded = search_job.load(index, device, quiet)
        only = None if allowed is None else read_selection(allowed, len(loaded))
        if only is not None and only.dtype != bool and not (there := loaded.contains(only)).all():
            got = f"{int(there.sum()):,} of the {len(only):,} ids in {allowed} are there"
            note(f"warning: {got}", quiet)
        asked = search_job.Asked(k, None if stages is None else stages_of(stages), exact, only)
        listed = SHOWN if not json else 0 if out else vectors.rows
        summary = search_job.search(
            loaded, vectors, asked, truth=truth, out=out, shown=listed, quiet=quiet
        )
        if json:
            if out:
                del summary["results"]
            show_json({"index": index, **summary})
        else:
            _show(summary, truth, loaded.width)


def _show(summary: dict[str, Any], truth: Path | None, width: int) -> None:
    rows = [
        [str(found["query"]), str(rank), str(i), f"{score:.6g}"]
        for found in summary["results"]
        for rank, (i, score) in enumerate(
            zip(found["ids"][:SHOWN_K], found["scores"], strict=False), 1
        )
    ]
    show_rows(["query", "rank", "id", "score"], rows)
    k, rate = summary["k"], summary["queries"] / max(summary["seconds"], 1e-9)
    printed, most = len(summary["results"]), max(len(f["ids"]) for f in summary["results"])
    if printed < summary["queries"] or most > SHOWN_K:
        print(
            f"shown: {printed:,} of {summary['queries']:,} queries, "
            f"{min(most, SHOWN_K)} of {most:,} neighbours"
        )
    prefix = f", by the first {summary['dim']} columns" if summary["dim"] < width else ""
    print(
        f"{summary['queries']:,} queries, k={k}, by {shown(summary['stages'])}{prefix}: "
        f"{summary['seconds']:.3f} s, {rate:,.0f} a second"
    )
    if "recall" in summary:
        print(f"recall@{k} {summary['recall']:.4f} by the ids in {truth}")
    if summary["out"]:
        print(f"wrote {summary['out']}")
