"""``mrl-fast index graph``."""

from mrl_fast.cli import change_job
from mrl_fast.cli.options import Json, LocalFolder, Quiet, Threads
from mrl_fast.cli.output import failing, show_json, shows_progress


def graph(
    index: LocalFolder, threads: Threads = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Build a graph over the vectors, for searches of one query among very many.

    Searches follow it by --stages that begin with graph:beam:keep, and "tune" tries it. Vectors
    that are added later are searched beside it, until it is built again.

    \b
    Examples:
      mrl-fast index graph my-index
      mrl-fast index search my-index queries.npy --stages graph:64:20,768:10
    """
    with failing(quiet):
        summary = change_job.build_graph(index, progress=shows_progress(quiet))
        if json:
            show_json(summary)
        else:
            print(
                f"{index}: a graph over {summary['rows']:,} vectors, {summary['seconds']:,.1f} s, "
                f"{summary['graph_bytes'] / 2**20:,.1f} MiB"
            )
