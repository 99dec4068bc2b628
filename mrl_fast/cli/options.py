"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from mrl_fast.search.disk.remote import fetched, is_remote

FORMATS = ".npy, .fvecs, .bvecs, .safetensors or .parquet"


def _use_threads(threads: int | None) -> int | None:
    if threads is not None:
        torch.set_num_threads(threads)
    return threads


def _copied(text: str) -> Path:
    if not is_remote(text):
        return Path(text)
    try:
        return fetched(text)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None


def _local(text: str) -> Path:
    if is_remote(text):
        raise typer.BadParameter(
            f"expected a folder of this machine, as it is changed, got {text}: copy it first"
        )
    return Path(text)


Folder = Annotated[
    Path,
    typer.Argument(
        metavar="INDEX",
        parser=_copied,
        help="Folder that holds the index; or a URL of one, s3://bucket/index, of which a copy on "
        "this machine is read (needs mrl-fast[remote]).",
    ),
]
LocalFolder = Annotated[
    Path, typer.Argument(metavar="INDEX", parser=_local, help="Folder that holds the index.")
]
Sources = Annotated[
    list[Path],
    typer.Argument(
        metavar="SOURCE",
        help=f"Vectors: one or more files of one format, {FORMATS}, folders of such files, or "
        "patterns such as 'part-*.npy'. Files are read in the order given; those of a folder or a "
        "pattern in quotes by name, part-2 before part-10.",
    ),
]
Queries = Annotated[
    Path, typer.Argument(metavar="QUERIES", help=f"Query vectors, as SOURCE of build: {FORMATS}.")
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
        help="An integer for each row of SOURCE: .npy [n] of integers, .ivecs of width 1, .txt "
        "with one a line, or .parquet with --id-column.",
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Parquet's column of ids, integers: of the file --ids, where there is one.",
    ),
]
SELECTION = ".npy [n], .ivecs of width 1, .txt with one a line"
MASK = (
    'a mask, .npy [N] of bool or of uint8 0 and 1, one for each row in the order of "info --ids", '
    "which update and remove change"
)
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
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", callback=_use_threads, help="CPU threads.  [default: as PyTorch's]"
    ),
]
