"""``mrl-fast index build``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mrl_fast.cli import build_job
from mrl_fast.cli.inputs import Vectors, numbers_of
from mrl_fast.cli.options import Column, IdColumn, Ids, Json, Key, Limit, Quiet, Sources, Threads
from mrl_fast.cli.output import failing, show_notes, show_written
from mrl_fast.search.index.validate import default_dims
from mrl_fast.shared.checks import METRICS, check_choice

Out = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder for the index; made if there is none.")
]
Dims = Annotated[
    str | None,
    typer.Option(
        metavar="D,D,…",
        help="Prefix widths that searches may use. The smallest is what a search scans of all "
        "rows, the largest must be the vectors' width.  [default: the width, and its halves down "
        "to 64; for 768: 96,192,384,768]",
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        metavar="|".join(METRICS),
        help="Scores: cosine, inner product (ip), or −squared distance (l2).",
    ),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16", "int8"],
    typer.Option(help="What vectors are rounded to and stored as."),
]
PrefixDtype = Annotated[
    Literal["float32", "int8"] | None,
    typer.Option(
        help="Without codes, what the first prefix is scanned as. int8 reads a quarter of the "
        "bytes; scores are always made of the vectors as stored."
    ),
]
Codes = Annotated[
    Literal["bits"] | None,
    typer.Option(
        help="bits: one, four and eight bits of every column beside the vectors. Exact search then "
        "reads four bits of all rows, and stages dim:1:keep one; it takes 9 bits a column more. "
        "The default for float32 vectors of 128 to 8192 columns, without --prefix-dtype."
    ),
]
Rotation = Annotated[
    Literal["pca"] | None,
    typer.Option(
        help="For vectors that were not trained to be cut: an orthogonal rotation that puts their "
        "energy into their first columns. Fitted to the first 256 MiB of fp32 rows."
    ),
]
Checkpoint = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="ROWS",
        help="Save after so many rows; no more new ones are held in memory.  [default: as many as "
        "are 256 MiB of fp32]",
    ),
]
Shards = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Deal the rows to so many shards, each an index in a folder of its own below DIR. All "
        "commands take DIR as any index, with the same results.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Start anew where DIR holds an index, which is lost with the first checkpoint.",
    ),
]


def build(
    source: Sources,
    out: Out,
    dims: Dims = None,
    metric: Metric = "cosine",
    dtype: Dtype = "float32",
    prefix_dtype: PrefixDtype = None,
    codes: Codes = None,
    rotation: Rotation = None,
    ids: Ids = None,
    column: Column = None,
    key: Key = None,
    id_column: IdColumn = None,
    limit: Limit = None,
    shards: Shards = None,
    checkpoint: Checkpoint = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build an index of the vectors in SOURCE.

    Rows get the ids 0, 1, 2, … in their order, unless --ids or --id-column gives others.

    After an interruption, even of a killed process, the same command, without --overwrite, goes on
    after the last checkpoint. Before that it compares the settings, and the first and the last row
    that DIR holds with those of SOURCE. If DIR holds all of SOURCE, there is nothing to do.

    \b
    Examples:
      mrl-fast index build base.npy --out my-index --dims 64,256,768
      mrl-fast index build docs.parquet --id-column id --out my-index
      mrl-fast index build 'parts/part-*.npy' --out my-index
      mrl-fast index build parts/ --shards 4 --out my-index
    """
    with failing(quiet):
        check_choice(metric, "--metric", METRICS)
        vectors = Vectors(
            *source, column=column, key=key, id_column=id_column, ids=ids, limit=limit
        )  # fmt: skip
        show_notes(vectors, quiet)
        widths = list(default_dims(vectors.width)) if dims is None else numbers_of(dims, "--dims")
        settings: dict[str, Any] = {
            "metric": metric, "dtype": dtype, "prefix_dtype": prefix_dtype, "codes": codes,
            "rotation": rotation, "shards": shards,
        }  # fmt: skip
        summary = build_job.build(
            vectors, out, widths, settings, checkpoint=checkpoint, overwrite=overwrite, quiet=quiet
        )
        show_written(summary, vectors, json)
