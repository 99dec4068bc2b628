"""``mrl-fast index update``."""

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
from mrl_fast.cli.output import failing, show_json, show_notes


def update(
    index: LocalFolder,
    source: Sources,
    ids: Ids = None,
    column: Column = None,
    key: Key = None,
    id_column: IdColumn = None,
    limit: Limit = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replace the vectors of ids by those in SOURCE.

    Ids come with --ids or --id-column, or from the column that "build" was told; each must be in
    the index, none twice ("add" takes new ones). All vectors are replaced or, where anything is
    wrong, none; they are held in memory until they are saved, at the end. What is replaced takes
    room until "compact".

    \b
    Examples:
      mrl-fast index update my-index changed.npy --ids changed-ids.npy
      mrl-fast index update my-index changed.parquet --id-column id
    """
    with failing(quiet):
        vectors = Vectors(
            *source, column=column, key=key, id_column=id_column, ids=ids, limit=limit,
            remembered=sidecars.columns(index),
        )  # fmt: skip
        show_notes(vectors, quiet)
        summary = change_job.update(vectors, index, quiet=quiet)
        if json:
            show_json(summary)
        else:
            print(f"{index}: {summary['updated']:,} of {summary['rows']:,} vectors replaced")
