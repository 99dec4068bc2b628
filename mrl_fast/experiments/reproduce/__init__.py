"""The paper's claims at a size that fits: three sets, several seeds, a report.

Each set and seed is a cell, kept as JSON once it is measured: a run that was stopped goes on with
the cells that are missing, and the report is made of all that are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mrl_fast.experiments.reproduce import data, report
from mrl_fast.experiments.reproduce.measure import measure, steps_of

RECIPE = 1  # raise it with every change that changes a cell's numbers
SETS = ("synthetic", "Fashion-MNIST", "banking77")
PROBE_STEPS = 600


def run_reproduce(
    out: Path,
    data_folder: Path | None,
    *,
    seeds: int = 5,
    only: str | None = None,
    quick: bool = False,
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> Path:
    """Measures what is missing, and writes ``report.md``, ``report.html`` and ``*.png`` to ``out``.

    Args:
        out: A folder, made if missing; ``cells/`` of it holds what was measured, to be removed when
            the data change.
        data_folder: Holds Fashion-MNIST and banking77; None leaves the two out, and says so.
        seeds: Cells a set, at least 2 for intervals.
        only: One set's name; the report still shows all that was measured.
        quick: Smaller synthetic data, and digits instead of the two others: a minute.
        progress: Bars on stderr.
        say: Called with what happens.

    Returns:
        The report's path.

    Raises:
        ValueError: A set that is not known, a folder that is none, data that is not what it
            should be.
        ModuleNotFoundError: What banking77 needs is not installed.
    """
    sets = ("synthetic", "digits") if quick else SETS
    if only is not None and only not in sets:
        raise ValueError(f"--only: expected one of {', '.join(sets)}, got {only!r}")
    if seeds < 2:
        raise ValueError(f"--seeds: expected at least 2, for intervals, got {seeds}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got {out}, which is a file")
    left_out = () if quick or data_folder else SETS[1:]
    if only in left_out:
        raise ValueError(f"--data: expected the folder that holds {only}, got none")
    wanted = [name for name in sets if name not in left_out and only in (None, name)]
    if left_out and only is None:
        say(f"no --data: {' and '.join(left_out)} are left out")

    def load(name: str, seed: int) -> data.Task:
        if name == "synthetic":
            return data.synthetic(seed, quick=quick)
        if name == "digits":
            return data.digits(seed)
        assert data_folder is not None
        if name == "Fashion-MNIST":
            return data.fashion_mnist(data_folder, seed)
        return data.banking77(data_folder, out / "banking77.safetensors", seed, say)

    def path(name: str, seed: int) -> Path:
        return out / "cells" / f"{'quick-' * quick}{name}-{seed}.json"

    for seed in range(seeds):
        for name in reversed(wanted):  # sets read from files first: a missing one is noticed early
            if read(path(name, seed), name, seed) is not None:
                continue
            task = load(name, seed)
            with tqdm(
                desc=f"{name}, seed {seed}", total=steps_of(task), disable=not progress
            ) as bar:

                def on_step(what: str, bar: tqdm = bar) -> None:
                    bar.set_postfix_str(what, refresh=False)
                    bar.update()

                probe_steps = PROBE_STEPS // 10 if quick else PROBE_STEPS
                cell = measure(task, seed, probe_steps=probe_steps, on_step=on_step)
            write(path(name, seed), {"recipe": RECIPE, **cell})
    found = {
        name: [cell for seed in range(seeds) if (cell := read(path(name, seed), name, seed))]
        for name in sets
    }
    cells = {name: of_set for name, of_set in found.items() if of_set}
    return report.write(out, cells, quick=quick)


def read(file: Path, name: str, seed: int) -> dict[str, Any] | None:
    """A cell; None where there is none, one that another recipe made, or one that is damaged."""
    try:
        cell = json.loads(file.read_text(encoding="utf-8"))
        known = (cell["recipe"], cell["task"], cell["seed"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return cell if known == (RECIPE, name, seed) else None


def write(file: Path, cell: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(cell, indent=1), encoding="utf-8")
    os.replace(partial, file)
