"""``mrl-fast reproduce``."""

from pathlib import Path
from typing import Annotated

import typer

from mrl_fast.cli.extras import needs_extra
from mrl_fast.cli.options import Threads
from mrl_fast.cli.output import failing, say, shows_progress


def reproduce(
    out: Annotated[
        Path, typer.Option(help="Folder for the report, its figures, and what was measured.")
    ] = Path("reproduce-out"),
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="MRL_FAST_DATA",
            help="Folder that holds fashion_mnist/fashion_mnist.npz and banking77/*.csv; without "
            "it, the synthetic set alone.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Of each set.")] = 5,
    only: Annotated[
        str | None, typer.Option(help="One set: synthetic, Fashion-MNIST or banking77.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sets, to see that it runs: under two minutes.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Train MRL, MRL-E and the baselines, and say which of the paper's claims hold here.

    Writes report.md and report.html with tables and figures. Each set and seed is kept as it is
    done: a run that was stopped goes on where it was. The full form takes 40 minutes on two cores.
    """
    try:
        from mrl_fast.experiments.reproduce import run_reproduce
    except ModuleNotFoundError as error:
        needs_extra(error, "reproduce")
        raise typer.Exit(2) from None
    with failing():
        report = run_reproduce(
            out,
            data,
            seeds=seeds,
            only=only,
            quick=quick,
            progress=shows_progress(False),
            say=say,
        )
        print(f"Wrote {report}")
