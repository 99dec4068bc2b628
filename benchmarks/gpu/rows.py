"""The rows of a measuring part of the GPU programme, one after the other.

    python -m benchmarks.gpu.rows PART FILE [--tiny] [--seconds S] [--until S]

FILE is rewritten after every row, so that whatever ends this process leaves what was measured. A
row whose kernel faults leaves the device unusable, and one that hangs ends the process: both exit
with AGAIN, and another run with the same FILE goes on with the next row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu import interpreter
from benchmarks.gpu.measure import (
    DEVICE,
    REPETITIONS,
    Row,
    environment,
    measure,
    measure_ceilings,
    release,
)

MODULES = {
    part: f"benchmarks.gpu.{name}" for part, name in ((3, "search"), (4, "index"), (5, "training"))
}
AGAIN = 75
ROW_SECONDS = 120.0  # of set-up, judging and timing; beyond it is a hang
LAST_SECONDS = 15.0  # no row is begun with less left


def run(
    rows: Iterable[Row], file: Path, *, tiny: bool, seconds: float, until: float,
    row_seconds: float = ROW_SECONDS,
) -> int:  # fmt: skip
    """0, or 1 if a row failed, or AGAIN.

    Args:
        seconds: A row may time for. until: A row may begin, from now on.
    """
    end = time.monotonic() + until
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not state:
        state = {"environment": environment(), "ceilings": measure_ceilings(tiny=tiny), "rows": []}
    if (name := state.pop("running", None)) is not None:
        why = f"the process died, or the row took more than {row_seconds:.0f} s"
        state["rows"].append({"name": name, "status": "failed", "why": why})
    known = {row["name"] for row in state["rows"]}
    for row in rows:
        if row.name in known:
            continue
        if time.monotonic() > end - LAST_SECONDS:
            found: dict[str, Any] = {"name": row.name, "status": "skipped", "why": "no time left"}
            finish(state, found, file)
            continue
        state["running"] = row.name
        write(state, file)
        watch = threading.Timer(row_seconds, os._exit, (AGAIN,))
        watch.daemon = True
        watch.start()
        try:
            repetitions = 1 if tiny else REPETITIONS
            found = measure(row, state["ceilings"], seconds, repetitions)
        except KeyboardInterrupt:  # the part's time is up
            end = 0.0
            found = {"name": row.name, "status": "skipped", "why": "no time left"}
        watch.cancel()
        finish(state, found, file)
        try:
            release()
        except RuntimeError:
            return AGAIN
    return int(any(row["status"] == "failed" for row in state["rows"]))


def finish(state: dict, found: dict, file: Path) -> None:
    state.pop("running", None)
    state["rows"].append(found)
    write(state, file)
    print(line_of(found), flush=True)


def write(state: dict, file: Path) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(new, file)


def line_of(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['name']}: {row['status']}, {row['why']}"
    rival = f", {row['ratio']:.2f}x {row['best_rival']}" if row["best_rival"] else ""
    ours = row["providers"]["mrl_fast"]
    return (
        f"{row['name']}: {row['time_ms']:.3f} ms, {row['fraction']:.3f} of the limit{rival}, "
        f"{row['quality']} {ours[row['quality']]:.4g}, in {row['seconds']} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("part", type=int, choices=MODULES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing a row")
    parser.add_argument("--until", type=float, default=450.0, help="seconds for all rows")
    given = parser.parse_args()
    if DEVICE == "cpu":
        interpreter.install()
    rows = importlib.import_module(MODULES[given.part]).rows(tiny=given.tiny)
    return run(rows, given.file, tiny=given.tiny, seconds=given.seconds, until=given.until)


if __name__ == "__main__":
    raise SystemExit(main())
