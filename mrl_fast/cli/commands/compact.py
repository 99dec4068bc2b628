"""``mrl-fast index compact``."""

from mrl_fast.cli import change_job
from mrl_fast.cli.options import Json, LocalFolder, Quiet, Threads
from mrl_fast.cli.output import failing, show_json


def compact(
    index: LocalFolder, threads: Threads = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Free the room of vectors that were removed or replaced.

    Rows after the first of them are moved together, in memory, and written anew; the folder holds
    the old files until that is done. Ids, the order of rows and all results stay.

    \b
    Example:
      mrl-fast index compact my-index
    """
    with failing(quiet):
        summary = change_job.compact(index)
        if json:
            show_json(summary)
        else:
            before, now = summary["bytes_before"] / 2**20, summary["bytes"] / 2**20
            print(
                f"{index}: room of {summary['freed_rows']:,} removed or replaced rows freed, "
                f"{before:,.1f} MiB became {now:,.1f}"
            )
