"""Everything a GPU has to prove, in one command that ends itself at 530 s.

    python -m benchmarks.gpu.run --out DIR             # all of it (stages.py)
    python -m benchmarks.gpu.run --out DIR --again     # within 150 s, what failed in DIR
    python -m benchmarks.gpu.run --out DIR --tiny      # tiny shapes, on a CPU if there is no GPU

First, mrl_fast is built where it is not installed, without a network, and the cache that was
compiled elsewhere (``make gpu-cache``) is unpacked; if a kernel does not hit it, the cache is made
here by 14 processes. Then the stages run one after the other, all commands of a stage at the same
time, each in a process that is ended at the stage's deadline. Failures are collected and stop
nothing. DIR/results.json has everything, also when this is killed: how each command ended, kernels'
errors, rows, the profile; log.txt has what they printed, table.md the tables, profile.json the
kernels' times; parts/ has the same by commands. The exit code is not zero if something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cache, stages, table
from benchmarks.gpu.measure import ROOT, environment
from benchmarks.gpu.rows import AGAIN
from benchmarks.gpu.stages import Command, Stage

GRACE_SECONDS = 6.0  # to write down what there is, once interrupted
LOG_BYTES = 1 << 20  # of a command; the last ones are kept
TIMED_OUT, FOUND = 124, 9  # exit codes; the second a sanitizer's
COMPILE_JOBS = 14
CACHE_SECONDS = 15.0  # by what the cache takes beyond this, all stages are later
SMALLEST_ROW_SECONDS = 25.0  # with less left, rows are not begun again

Variables = Mapping[str, str]


class Process:
    """A command of a stage, and the files that it writes."""

    def __init__(self, command: Command, out: Path, variables: Variables):
        self.command, self.variables = command, variables
        self.folder = out / "parts"
        self.folder.mkdir(exist_ok=True)
        self.file = self.folder / f"{command.name.replace(' ', '-')}.json"
        self.log = self.file.with_suffix(".log")
        self.begin, self.code = time.monotonic(), 0
        self.process: subprocess.Popen | None = None
        self.tool = sanitizer() if command.tool else None
        self.log.write_bytes(b"")
        if command.kind != "rows":
            self.file.unlink(missing_ok=True)

    def start(self, until: float) -> None:
        """``until``: when it is ended, by ``time.monotonic``."""
        command, extra = self.command, []
        if command.kind in ("kernels", "rows", "profile", "ceilings"):
            extra += ["--json", str(self.file)]
        if command.kind == "rows":
            extra += ["--ceilings", str(self.folder / "ceilings.json")]
            extra += ["--until", f"{until - time.monotonic() - 2:.0f}"]
        words = [sys.executable, "-m", command.module, *command.args, *extra]
        more = {}
        if self.tool is not None:
            options = ["--error-exitcode", str(FOUND), "--report-api-errors", "no"]
            words = [self.tool, "--tool", command.tool, *options, *words]
            more["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # a pool hides reads past an allocation
        with self.log.open("ab") as output:
            output.write(f"$ {' '.join(words)}\n".encode())
            output.flush()
            self.process = subprocess.Popen(
                words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env={**self.variables, **more}, start_new_session=True,
            )  # fmt: skip

    def poll(self, until: float) -> bool:
        """Whether it is done. After a fault or a hang, rows are begun again, with the next row."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        self.code = code
        faulted = self.command.kind == "rows" and (code == AGAIN or code < 0)
        if faulted and until - time.monotonic() > SMALLEST_ROW_SECONDS:
            self.start(until)
            return False
        return True

    def end(self) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.code = TIMED_OUT
            os.killpg(self.process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict[str, Any]:
        text = self.log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        found = json.loads(self.file.read_text()) if self.file.exists() else None
        wrong = wrong_in(self.command, found, text)
        failed = self.code != 0 and not self.command.informs
        if self.command.kind == "rows":
            status = [row["status"] for row in (found or {}).get("rows", [])]
            failed = bool(wrong) or "ok" not in status
        lines = [line for line in text.strip().split("\n") if not line.startswith("binaries: ")]
        binaries = re.findall(r"^binaries: (\{.*\})$", text, re.MULTILINE)
        return {
            "name": self.command.name, "exit_code": self.code, "failed": failed, "wrong": wrong,
            "seconds": round(time.monotonic() - self.begin, 1), "last_line": lines[-1][:400],
            "binaries": json.loads(binaries[-1]) if binaries else None, "found": found,
        }  # fmt: skip


def wrong_in(command: Command, found: Any, text: str) -> list[str]:
    """Cases, tests or rows that failed or were not reached."""
    if command.kind == "tests":
        return re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", text, re.MULTILINE)
    rows = (found or {}).get("rows", []) if command.kind == "rows" else found
    if command.kind in ("rows", "kernels"):
        return [row["name"] for row in rows or [] if row["status"] in ("failed", "lost")]
    return []


def sanitizer() -> str | None:
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    return shutil.which("compute-sanitizer", path=places)


def run_stage(stage: Stage, begin: float, out: Path, variables: Variables) -> list[dict[str, Any]]:
    until = begin + stage.until - GRACE_SECONDS
    found, running = [], []
    for command in stage.commands:
        process = Process(command, out, variables)
        if command.tool and process.tool is None:
            why = "compute-sanitizer: not found"
            found.append({"name": command.name, "exit_code": 127, "failed": not command.informs,
                          "wrong": [], "seconds": 0.0, "last_line": why})  # fmt: skip
            continue
        process.start(until)
        running.append(process)
    while running and time.monotonic() < until:
        time.sleep(0.05)
        for process in [p for p in running if p.poll(until)]:
            running.remove(process)
            found.append(process.result())
    for process in running:
        process.end()
        found.append(process.result())
    return [{"stage": stage.name} | run for run in found]


def bring_cache(out: Path, variables: Variables, jobs: int) -> list[dict[str, Any]]:
    """Unpacks the cache that came along, or makes it here where that one does not fit."""
    found = []
    for do, options in (("unpack", ()), ("check", ()), ("make", ("--jobs", str(jobs)))):
        if do == "make" and not found[-1]["failed"]:
            break
        command = Command(f"cache {do}", "benchmarks.gpu.cache", (do, *options))
        found += run_stage(Stage("cache", 90, (command,)), time.monotonic(), out, variables)
    return found


def install(out: Path, variables: Variables) -> Variables:
    """The environment variables with which mrl_fast is found."""

    def works(variables: Variables) -> bool:
        command = [sys.executable, "-c", "import mrl_fast.kernels, mrl_fast._C"]
        return not subprocess.run(command, env=variables, cwd=out, capture_output=True).returncode

    if works(variables):
        return variables
    copy = Path(tempfile.mkdtemp(prefix="mrl_fast-"))
    for name in ("mrl_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "setup.py", copy)  # without pyproject.toml, which wants a new setuptools
    with (out / "install.log").open("w") as log:
        subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=copy, env=variables,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    (copy / "kernels").rename(copy / "mrl_fast" / "kernels")
    variables = {**variables, "PYTHONPATH": f"{copy}{os.pathsep}{ROOT}"}
    if not works(variables):
        raise SystemExit("mrl_fast could not be built: see install.log")
    return variables


def write(out: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Writes results.json, from which the rest is made."""
    state = {"environment": environment(), "runs": list(runs)}
    (out / "results.json").write_text(json.dumps(state, indent=1) + "\n")


def program(given: argparse.Namespace, out: Path, plan: Sequence[Stage]) -> list[dict[str, Any]]:
    begin = time.monotonic()
    variables: Variables = os.environ | {
        "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(cache.FOLDER),
        # before triton is imported
        **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}),
    }  # fmt: skip
    variables = install(out, variables)
    runs = bring_cache(out, variables, COMPILE_JOBS) if torch.cuda.is_available() else []
    late = max(0.0, time.monotonic() - begin - CACHE_SECONDS)
    for stage in plan:
        shifted = stage._replace(until=min(stage.until + late, plan[-1].until))
        runs += run_stage(shifted, begin, out, variables)
        for run in runs:
            if run["stage"] == stage.name:
                shown = {k: v for k, v in run.items() if k not in ("found", "stage", "binaries")}
                print(f"{time.monotonic() - begin:5.0f} s  {json.dumps(shown)}", flush=True)
        write(out, runs)
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests, sanitizers and measurements on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--again", action="store_true", help="what failed there, into its again/")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; needs no GPU")
    given = parser.parse_args()
    if not (given.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU here; --tiny does without")
    out: Path = given.out.resolve()
    plan: Sequence[Stage] = stages.TINY if given.tiny else stages.STAGES
    if given.again:
        plan = stages.again(json.loads((out / "results.json").read_text()), plan)
        out = out / "again"
    out.mkdir(parents=True, exist_ok=True)
    runs = program(given, out, plan)
    parts = sorted((out / "parts").glob("*.log"))
    logs = [f"== {part.name}\n{part.read_text(errors='replace')}" for part in parts]
    (out / "log.txt").write_text("\n".join(logs))
    if (profile := out / "parts/profile.json").exists():
        shutil.copy(profile, out)
    table.write(out)
    return int(any(run["failed"] for run in runs))


if __name__ == "__main__":
    raise SystemExit(main())
