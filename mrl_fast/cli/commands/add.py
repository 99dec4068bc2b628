"""``mrl-fast index add``."""

from typing import Annotated

import typer

from mrl_fast.cli import build_job
from mrl_fast.cli.inputs import Vectors
from mrl_fast.cli.options import Column, Folder, IdColumn, Ids, Json, Key, Limit, Quiet, Source
from mrl_fast.cli.output import failing, show_written

Skip = Annotated[int, typer.Option(min=0, metavar="N", help="Rows to begin after.")]


def add(
    index: Folder,
    source: Source,
    ids: Ids = None,
    column: Column = None,
    key: Key = None,
    id_column: IdColumn = None,
    skip: Skip = 0,
    limit: Limit = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add the vectors in SOURCE to an index.

    All of them are added or, where anything is wrong, none: they are saved once, at the end, and
    held in memory until then. --skip and --limit add a file that is larger than that in parts.

    \b
    Examples:
      mrl-fast index add my-index more.npy
      mrl-fast index add my-index more.parquet --id-column id
    """
    with failing():
        vectors = Vectors(
            source, column=column, key=key, id_column=id_column, ids=ids, skip=skip, limit=limit
        )
        show_written(build_job.add(vectors, index, quiet=quiet), vectors, json)
