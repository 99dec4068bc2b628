"""All commands of ``mrl-fast``."""

from importlib import metadata
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from mrl_fast.cli.commands.add import add
from mrl_fast.cli.commands.build import build
from mrl_fast.cli.commands.compact import compact
from mrl_fast.cli.commands.demo import demo
from mrl_fast.cli.commands.graph import graph
from mrl_fast.cli.commands.info import info
from mrl_fast.cli.commands.remove import remove
from mrl_fast.cli.commands.reproduce import reproduce
from mrl_fast.cli.commands.search import search
from mrl_fast.cli.commands.tune import tune
from mrl_fast.cli.commands.update import update
from mrl_fast.cli.commands.verify import verify


class _Commands(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = {info.callback.__name__ for info in index.registered_commands if info.callback}
        if args and args[0] in known:
            ctx.fail(f"No such command {args[0]!r}: it is mrl-fast index {args[0]}")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
index = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(index, name="index")

for command in (demo, reproduce):
    app.command()(command)
for command in (build, add, update, remove, compact, graph, search, tune, info, verify):
    index.command()(command)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"mrl-fast {metadata.version('mrl-fast')} (torch {torch.__version__})")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Say which this is, and exit."
    ),
]


@app.callback()
def about(version: Version = False) -> None:
    """Matryoshka (nested) embeddings, trained and searched at the speed of the hardware."""


@index.callback()
def about_index() -> None:
    """Build an index of vectors in files, change it, search it, tune it, check it.

    Vectors are read from .npy, .fvecs, .bvecs, .safetensors and .parquet files, a part at a time;
    an index is a folder whose files are mapped, not read: both may be larger than memory. A vector
    is known by its id, an integer of 64 bits: keep a table of your own where yours are strings.

    \b
    Example:
      mrl-fast index build base.fvecs --out my-index --metric l2
      mrl-fast index tune my-index samples.fvecs --recall 0.99
      mrl-fast index search my-index queries.fvecs -k 10 --truth truth.ivecs
      mrl-fast index remove my-index 17 42

    \b
    Exit codes:
      0    done
      1    "verify" found damage
      2    bad input; stderr says what was expected and what came
      130  interrupted
    """
