"""``mrl-fast demo``."""

from pathlib import Path
from typing import Annotated

import typer

from mrl_fast.cli.extras import needs_extra
from mrl_fast.cli.output import failing


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for accuracy.png, recall.png and report.md.")
    ] = Path("demo-out"),
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="MRL_FAST_DATA",
            help="Folder that holds fashion_mnist.npz; without it, scikit-learn's digits.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the training.")] = False,
) -> None:
    """Train nested vectors on real images, evaluate every prefix, index and search them.

    Prints accuracy by dim beside an ordinary net's vectors, and recall and time of full-width,
    adaptive and funnel search beside FAISS flat; writes both as plots. Takes a minute or two.
    """
    try:
        from mrl_fast.experiments.demo import run_demo
    except ModuleNotFoundError as error:
        needs_extra(error, "demo")
        raise typer.Exit(2) from None
    with failing():
        run_demo(out, data, seed=seed, quick=quick)
