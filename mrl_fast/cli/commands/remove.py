"""``mrl-fast index remove``."""

from pathlib import Path
from typing import Annotated

import typer

from mrl_fast.cli import change_job
from mrl_fast.cli.options import SELECTION, IdColumn, Json, LocalFolder, Quiet, Threads
from mrl_fast.cli.output import failing, show_json

Given = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids to remove.")]
Ids = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help=f"Ids to remove, no mask: {SELECTION}; or .parquet with --id-column."
    ),
]


def remove(
    index: LocalFolder,
    given: Given = None,
    ids: Ids = None,
    id_column: IdColumn = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove the vectors of ids from an index.

    All of them are removed or, where one is not in the index, none. They take room, and a little of
    each search's time, until "compact".

    \b
    Examples:
      mrl-fast index remove my-index 17 42
      mrl-fast index remove my-index --ids gone.txt
    """
    with failing(quiet):
        summary = change_job.remove(index, given or [], ids, id_column)
        if json:
            show_json(summary)
        else:
            print(f"{index}: {summary['removed']:,} removed, {summary['rows']:,} rows left")
