"""``mrl-fast demo``."""

from pathlib import Path
from typing import Annotated

import typer

from mrl_fast.cli.options import Threads
from mrl_fast.cli.output import failing


def demo(
    question: Annotated[
        list[str] | None, typer.Argument(metavar="[QUESTION]", help="With --ask: in words.")
    ] = None,
    ask: Annotated[
        bool,
        typer.Option(
            "--ask", help="Answer a question, or those that are typed, from what --out holds."
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the report, two plots, the encoder and the index.")
    ] = Path("demo-out"),
    packages: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…",
            help="Read these installed packages.  [default: those that this project pins]",
        ),
    ] = None,
    sentences: Annotated[
        bool,
        typer.Option(
            "--sentences", help="Search all sentences and comments, eight times as many rows."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the training.")] = False,
    threads: Threads = None,
) -> None:
    """Search the documentation of the Python packages that are installed here.

    Reads their docstrings, trains an encoder whose every prefix is an embedding, and one of full
    width; prints how well names find their sentences by each prefix, and recall and time of exact
    and adaptive search beside FAISS and torch; writes both as plots. Takes a minute or two. Then
    ask it something:

    \b
      mrl-fast demo --ask "sort the rows of a matrix by a column"
      mrl-fast demo --ask
    """
    with failing():
        if ask:
            from mrl_fast.experiments.demo.ask import run_ask

            run_ask(out, None if question is None else " ".join(question))
            return
        if question:
            raise ValueError(f"expected --ask before a question, got {' '.join(question)!r}")
        from mrl_fast.experiments.demo.run import Settings, run_demo

        names = None if packages is None else [name.strip() for name in packages.split(",")]
        run_demo(out, Settings(names, sentences, seed, quick))
