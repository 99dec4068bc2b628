"""``mrl-fast index search`` and ``tune``: what they take and print."""

from pathlib import Path
from typing import Annotated

import typer

from mrl_fast.cli import build_job, search_job
from mrl_fast.cli.inputs import Vectors, stages_of
from mrl_fast.cli.options import Column, Device, Folder, Json, K, Key, Limit, Queries, Quiet
from mrl_fast.cli.output import failing, say, show_json, show_rows, shown_stages
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.readers import PARQUET, read_ids

SHOWN = 3  # queries whose neighbours are printed
SHOWN_K = 10


def search(
    index: Folder,
    queries: Queries,
    k: K = 10,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="DIM:KEEP,…",
            help="Search all rows by the first dim, and rerank what each stage keeps by the next; "
            "dims are of the index, the last keep at least k.  [default: as tuned, else exact]",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="The k best, provably, also where the index is tuned.")
    ] = False,
    allowed: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Search these ids only: .npy [n], .ivecs of width 1 or .txt."
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The true ids of each query, best first, .ivecs or .npy [n, at least k]: prints "
            "recall@k, the share of the first k that were found. It is by ids: one that ties with "
            "the k-th counts as missed.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write all results: .npz with scores fp32 and ids int64, [n, k], −inf and −1 "
            "where there are fewer; or .jsonl with a line {query, ids, scores} each.",
        ),
    ] = None,
    column: Column = None,
    key: Key = None,
    limit: Limit = None,
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the k nearest vectors of each query.

    Prints the first three queries' neighbours, the best first; the larger a score the better, with
    l2 it is the negative squared distance. With --json the document has the neighbours of all
    queries, unless they go to --out; its "stages" are null where the search was exact.

    \b
    Examples:
      mrl-fast index search my-index queries.npy -k 10 --out results.npz
      mrl-fast index search my-index queries.npy --stages 64:200,768:10
      mrl-fast index search my-index queries.fvecs --truth truth.ivecs
    """
    with failing():
        if exact and stages is not None:
            raise ValueError(f"--exact: expected no --stages beside it, got {stages}")
        if allowed is not None and allowed.suffix.lower() in PARQUET:
            raise ValueError(f"--allowed: expected .npy, .ivecs or .txt, got {allowed}")
        vectors = Vectors(queries, column=column, key=key, limit=limit)
        loaded = _loaded(index, device)
        only = None if allowed is None else read_ids(allowed)
        if only is not None and not (there := loaded.contains(only)).all():
            say(f"warning: {int(there.sum()):,} of the {len(only):,} ids in {allowed} are there")
        summary = search_job.search(
            loaded, vectors, k,
            stages=None if stages is None else stages_of(stages),
            exact=exact,
            allowed=only,
            truth=truth,
            out=out,
            keep=SHOWN if not json else 0 if out else vectors.rows,
            quiet=quiet,
        )  # fmt: skip
        if json:
            if out:
                del summary["results"]
            show_json({"index": index, **summary})
            return
        rows = [
            [str(found["query"]), str(rank), str(i), f"{score:.6g}"]
            for found in summary["results"]
            for rank, (i, score) in enumerate(
                zip(found["ids"][:SHOWN_K], found["scores"], strict=False), 1
            )
        ]
        show_rows(["query", "rank", "id", "score"], rows)
        rate = summary["queries"] / max(summary["seconds"], 1e-9)
        print(
            f"{summary['queries']:,} queries, k={k}, by {shown_stages(summary['stages'])}: "
            f"{summary['seconds']:.3f} s, {rate:,.0f} a second"
        )
        if "recall" in summary:
            print(f"recall@{k} {summary['recall']:.4f} by the ids in {truth}")
        if out:
            print(f"wrote {out}")


def tune(
    index: Folder,
    queries: Queries,
    k: K = 10,
    recall: Annotated[
        float, typer.Option(help="Share of the exact k best that must be found, in (0, 1].")
    ] = 0.99,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Queries a call whose time counts.  [default: all of them at once]"
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="That further queries of this kind reach it, in [0.5, 1).")
    ] = 0.95,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw recall against time: .png, .svg or .pdf. Needs mrl-fast[demo].",
        ),
    ] = None,
    column: Column = None,
    key: Key = None,
    limit: Limit = None,
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the fastest stages for a recall, and save them.

    Measures on this machine, and on the --device that is to search: the stages are saved with the
    index, and used wherever it is opened. QUERIES are samples of what will be asked: at least 256,
    better thousands, and not the index's own vectors. Searches for at most this k use the stages
    from then on, until the index has grown by more than a tenth or another tune replaces them.

    \b
    Example:
      mrl-fast index tune my-index samples.npy -k 10 --recall 0.99
    """
    with failing():
        vectors = Vectors(queries, column=column, key=key, limit=limit)
        loaded = _loaded(index, device)
        if k > len(loaded):
            raise ValueError(f"-k: expected at most the index's {len(loaded):,} rows, got {k:,}")
        report = search_job.tune(
            loaded, vectors, k=k, recall=recall, batch=batch, confidence=confidence, plot=plot,
            quiet=quiet,
        )  # fmt: skip
        loaded.save(index)
        if json:
            rows = [row._asdict() for row in report.rows]
            show_json({"index": index, **vars(report), "rows": rows, "plot": plot})
            return
        print(report)
        print(f"saved in {index}" + (f"; wrote {plot}" if plot else ""))


def _loaded(folder: Path, device: str) -> MatryoshkaIndex:
    index = MatryoshkaIndex.load(folder, device=device)
    if of := build_job.unfinished(folder):
        say(
            f"warning: {folder} holds {len(index):,} of {of['rows']:,} rows of {of['source']}: its "
            "build was interrupted"
        )
    return index
