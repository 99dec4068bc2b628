"""``mrl-fast index tune``."""

from pathlib import Path
from typing import Annotated

import typer

from mrl_fast.cli import search_job
from mrl_fast.cli.inputs import Vectors
from mrl_fast.cli.options import (
    Column,
    Device,
    Json,
    K,
    Key,
    Limit,
    LocalFolder,
    Queries,
    Quiet,
    Threads,
)
from mrl_fast.cli.output import failing, in_options, show_json, show_notes

Recall = Annotated[
    float, typer.Option(help="Share of the exact k best that must be found, in (0, 1].")
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Queries a call whose time counts.  [default: all of them at once]"),
]
Confidence = Annotated[
    float, typer.Option(help="That further queries of this kind reach it, in [0.5, 1).")
]
Seconds = Annotated[
    float,
    typer.Option(help="About how long it may take; the report says what was left out for it."),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw recall against time: .png, .svg or .pdf. Needs mrl-fast[demo].",
    ),
]


def tune(
    index: LocalFolder,
    queries: Queries,
    k: K = 10,
    recall: Recall = 0.99,
    batch: Batch = None,
    confidence: Confidence = 0.95,
    seconds: Seconds = 20.0,
    plot: Plot = None,
    column: Column = None,
    key: Key = None,
    limit: Limit = None,
    device: Device = "cpu",
    threads: Threads = None,
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
    with failing(quiet):
        vectors = Vectors(queries, column=column, key=key, limit=limit)
        show_notes(vectors, quiet, ids=False)
        loaded = search_job.load(index, device, quiet)
        if k > len(loaded):
            raise ValueError(f"-k: expected at most the index's {len(loaded):,} rows, got {k:,}")
        report, saved = search_job.tune(
            loaded, vectors, index, plot=plot, quiet=quiet,
            k=k, recall=recall, batch=batch, confidence=confidence, seconds=seconds,
        )  # fmt: skip
        if json:
            tables = {
                name: [row._asdict() for row in getattr(report, name)]
                for name in ("rows", "untried")
            }
            show_json({"index": index, **vars(report), **tables, "saved": saved, "plot": plot})
            return
        print(in_options(str(report)))
        print(f"ms is of a call of {report.batch:,} queries, the median")
        done = f"saved in {index}" if saved else "nothing was saved"
        print(done + (f"; wrote {plot}" if plot else ""))
