"""A group of the programme's rows, one after the other.

    python -m benchmarks.gpu.rows main|index --json FILE [--ceilings FILE] [--seconds S] [--until S]
        [--tiny] [--only ROW ...] [--provider NAME] [--calls-only]

FILE is rewritten after every row, so that whatever ends this process leaves what was measured. A
row whose kernel faults leaves the device unusable, and one that hangs ends the process: both exit
with AGAIN, and another run with the same FILE goes on with the next row. ``--provider`` measures
ours and that one, ``--calls-only`` makes each row and calls ours once.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import cache, index, interpreter, search, training
from benchmarks.gpu.measure import (
    DEVICE,
    OURS,
    REPETITIONS,
    Row,
    measure,
    measure_ceilings,
    release,
)

AGAIN = 75
ROW_SECONDS = 60.0  # of set-up, judging and timing; beyond it is a hang
LAST_SECONDS = 10.0  # no row is begun with less left


def main_rows(*, tiny: bool, fewer: bool = False) -> Iterator[Row]:
    """Search and training in turn, so that an early end has some of both."""
    some, others = search.rows(tiny=tiny), training.rows(tiny=tiny)
    for row in some:
        yield row
        if (other := next(others, None)) is not None:
            yield other
    yield from others


GROUPS = {"main": main_rows, "index": index.rows}


def run(
    rows: Iterable[Row], file: Path, *, tiny: bool, seconds: float, until: float,
    row_seconds: float = ROW_SECONDS, provider: str = "",
) -> int:  # fmt: skip
    """Measures the rows; returns 0, 1 if a row failed, or AGAIN.

    Args:
        seconds: For which a row may time calls.
        until: Seconds from now within which a row may begin.
    """
    end = time.monotonic() + until
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    state.setdefault("rows", [])
    if "ceilings" not in state:
        state["ceilings"] = measure_ceilings(tiny=tiny)
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
            found = measure(row, state["ceilings"], seconds, repetitions, provider)
        except KeyboardInterrupt:  # the stage's time is up
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
    ours = row["providers"][OURS]
    return (
        f"{row['name']}: {row['time_ms']:.3f} ms, {row['fraction']:.3f} of the limit{rival}, "
        f"{row['quality']} {ours[row['quality']]:.4g}, in {row['seconds']} s"
    )


def call_each(rows: Iterable[Row]) -> int:
    """Calls ours once for each row, which compiles its binaries."""
    for row in rows:
        row.make().calls[OURS]()
        print(row.name, flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ceilings", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--calls-only", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--provider", default="", help="the only rival")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing a row")
    parser.add_argument("--until", type=float, default=200.0, help="seconds for all rows")
    given = parser.parse_args()
    cache.pin()
    if DEVICE == "cpu":
        interpreter.install()
    every = GROUPS[given.group](tiny=given.tiny, fewer=given.calls_only)
    rows = [row for row in every if not given.only or row.name in given.only]
    if given.calls_only:
        return call_each(rows)
    if given.ceilings and given.ceilings.exists() and not given.json.exists():
        write({"ceilings": json.loads(given.ceilings.read_text()), "rows": []}, given.json)
    return run(
        rows, given.json, tiny=given.tiny, seconds=given.seconds, until=given.until,
        provider=given.provider,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
