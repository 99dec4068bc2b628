"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

FORMATS = ".npy, .fvecs, .bvecs, .safetensors or .parquet"

Folder = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder that holds the index.")]
Source = Annotated[Path, typer.Argument(metavar="SOURCE", help=f"File of vectors: {FORMATS}.")]
Queries = Annotated[
    Path, typer.Argument(metavar="QUERIES", help=f"File of query vectors: {FORMATS}.")
]
Column = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Parquet's column of vectors.  [default: the only one with lists of floats]",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Name of the safetensors tensor.  [default: the only [n, D] one of floats]",
    ),
]
Ids = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="An id for each row of SOURCE: .npy [n] of integers, .ivecs of width 1, .txt with one "
        "a line, or .parquet with --id-column.  [default: 0, 1, 2, …, after the largest there is]",
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Parquet's column of ids, integers: of the file --ids, else of SOURCE."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Read no more rows than this.")]
K = Annotated[
    int, typer.Option("-k", "--k", min=1, help="Neighbours a query; at most all vectors.")
]
Device = Annotated[
    str,
    typer.Option(
        metavar="cpu|cuda|cuda:N",
        help="Where to search; on a GPU, a copy of the index's vectors there.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
