"""``mrl-fast index add``."""

from typing import Annotated

import typer

from mrl_fast.cli import change_job, sidecars
from mrl_fast.cli.inputs import Vectors
from mrl_fast.cli.options import (
    Column,
    IdColumn,
    Ids,
    Json,
    Key,
    Limit,
    LocalFolder,
    Quiet,
    Sources,
    Threads,
)
from mrl_fast.cli.output import failing, show_notes, show_written

Skip = Annotated[int, typer.Option(min=0, metavar="N", help="Rows to begin after.")]


def add(
    index: LocalFolder,
    source: Sources,
    ids: Ids = None,
    column: Column = None,
    key: Key = None,
    id_column: IdColumn = None,
    skip: Skip = 0,
    limit: Limit = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add the vectors in SOURCE to an index.

    All of them are added or, where anything is wrong, none: they are saved once, at the end, and
    held in memory until then. --skip and --limit add more than that in parts. The --column, --key
    and --id-column of "build" hold here too; without ids, rows get those after the largest one.

    \b
    Examples:
      mrl-fast index add my-index more.npy
      mrl-fast index add my-index 'new/*.parquet' --id-column id
    """
    with failing(quiet):
        vectors = Vectors(
            *source, column=column, key=key, id_column=id_column, ids=ids, skip=skip, limit=limit,
            remembered=sidecars.columns(index),
        )  # fmt: skip
        show_notes(vectors, quiet)
        show_written(change_job.add(vectors, index, quiet=quiet), vectors, json)
