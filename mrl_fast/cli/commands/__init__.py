"""``mrl-fast index``: the group of commands."""

import typer

from mrl_fast.cli.commands.build import add, build
from mrl_fast.cli.commands.check import info, verify
from mrl_fast.cli.commands.search import search, tune

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Build an index of vectors in files, search it, tune it, check it.

    Vectors are read from .npy, .fvecs, .bvecs, .safetensors and .parquet files, a part at a time;
    an index is a folder whose files are mapped, not read: both may be larger than memory.

    \b
    Example:
      mrl-fast index build base.fvecs --out my-index --metric l2
      mrl-fast index tune my-index samples.fvecs --recall 0.99
      mrl-fast index search my-index queries.fvecs -k 10 --truth truth.ivecs

    \b
    Exit codes:
      0    done
      1    "verify" found damage
      2    bad input; stderr says what was expected and what came
      130  interrupted
    """


for command in (build, add, search, tune, info, verify):
    app.command()(command)
