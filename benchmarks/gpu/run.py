"""Everything a GPU has to prove, in one command.

    python -m benchmarks.gpu.run --out DIR [--part 1 2 3 4 5] [--tiny]

Part 1: the tests on the GPU. Part 2: compute-sanitizer over every kernel. Parts 3 to 5: search
kernels, an index end to end, training, each row beside rivals and the ceilings that are measured
first. A part takes at most eight minutes. partN.json has what it measured, also when it is killed,
and how its runs ended; partN.log the last that was printed; summary.json all runs, on what and from
which commit; table.md the rows. The exit code is not zero if a run or a row failed.

Installs mrl_fast first, from here and without a network, where it is not installed. --tiny does all
of it with tiny shapes, on a CPU in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import table
from benchmarks.gpu.measure import ROOT, environment
from benchmarks.gpu.rows import AGAIN

PART_SECONDS = 480.0
GRACE_SECONDS = 20.0  # to write down what there is, once interrupted
LAST_ROW_SECONDS = 40.0
LOG_BYTES = 4 << 20  # the last ones are kept
TIMED_OUT, FOUND, MAYBE = 124, 9, 8  # exit codes; the last two a sanitizer's
ON_THE_DEVICE = (
    "tests/search/test_device_index.py",
    "tests/kernels",
    "tests/search/test_ops.py",
    "tests/training",
)
# Tests of damaged files, killed processes and threads; of packaging, of compilers, of this program.
LEFT_OUT = "tests/stress", "tests/house"
SANITIZED = (
    "tests/kernels/test_scan.py", "tests/kernels/test_topk.py", "tests/kernels/test_certified.py",
    "tests/search/test_device_index.py", "tests/kernels/test_losses.py",
    "tests/training/test_logits.py",
)  # fmt: skip

Variables = Mapping[str, str]


class Runner:
    """Runs commands of one part within its time, all into one log."""

    def __init__(self, log: Path, variables: Variables, seconds: float = PART_SECONDS):
        self.log, self.variables, self.end = log, variables, time.monotonic() + seconds
        log.write_bytes(b"")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def run(
        self, *command: str, forgiven: tuple[int, ...] = (), cwd: Path = ROOT, **more: str
    ) -> dict[str, Any]:
        """How it ended; an exit code that is forgiven does not count as a failure."""
        begin, limit = time.monotonic(), max(self.left, 1.0)
        with self.log.open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env={**self.variables, **more}, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = TIMED_OUT
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = self.log.read_bytes()[-LOG_BYTES:]
        self.log.write_bytes(text)
        return {
            "command": " ".join(command).replace(sys.executable, "python"),
            "exit_code": code,
            "failed": code not in (0, *forgiven),
            "seconds": round(time.monotonic() - begin, 1),
            "last_line": text.decode(errors="replace").strip().split("\n")[-1][:400],
        }


def tests(runner: Runner, *, tiny: bool) -> Iterator[dict]:
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--continue-on-collection-errors"]
    if tiny:
        yield runner.run(*pytest, "tests/kernels/test_tiling.py")
        return
    yield runner.run(*pytest, *ON_THE_DEVICE)
    files = [p.relative_to(ROOT) for p in sorted(ROOT.glob("tests/*/test_*.py")) if importable(p)]
    done = *map(Path, ON_THE_DEVICE), *map(Path, LEFT_OUT)
    others = [str(file) for file in files if not {file, file.parent} & {*done}]
    yield runner.run(*pytest, *others, forgiven=(TIMED_OUT,))


def importable(file: Path) -> bool:
    """Whether what a test file imports at its top is installed here."""
    names = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    packages = {name.split(".")[0] for name in names} - {"mrl_fast", "tests"}
    return all(importlib.util.find_spec(package) for package in packages)


def sanitizers(runner: Runner, *, tiny: bool) -> Iterator[dict]:
    script = [sys.executable, "-m", "benchmarks.gpu.kernels"]
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    sanitizer = shutil.which("compute-sanitizer", path=places)
    yield runner.run(*script)
    if not torch.cuda.is_available():
        return
    if sanitizer is None:
        yield {"command": "compute-sanitizer", "exit_code": 127, "failed": True, "seconds": 0.0,
               "last_line": "compute-sanitizer: not found"}  # fmt: skip
        return

    def check(tool: str, *command: str, code: int = FOUND, forgiven: tuple[int, ...] = ()) -> dict:
        options = ["--tool", tool, "--error-exitcode", str(code), "--report-api-errors", "no"]
        return runner.run(
            str(sanitizer), *options, *command, forgiven=forgiven,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # a pool would hide reads beyond an allocation
        )  # fmt: skip

    yield check("memcheck", *script)
    if tiny:
        return
    yield check("racecheck", *script)
    yield check("synccheck", *script)
    # libraries leave padding unwritten that they read
    yield check("initcheck", *script, code=MAYBE, forgiven=(MAYBE, TIMED_OUT))
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", *SANITIZED]
    yield check("memcheck", *pytest, forgiven=(TIMED_OUT,))


def rows(part: int, runner: Runner, file: Path, *, tiny: bool) -> Iterator[dict]:
    """Rows until they are done; again after a fault or a hang, from the row after it."""
    command = [sys.executable, "-m", "benchmarks.gpu.rows", str(part), str(file)]
    options = ["--tiny"] if tiny else []
    while True:
        until = ["--until", f"{runner.left - LAST_ROW_SECONDS:.0f}"]
        found = runner.run(*command, *options, *until)
        again = (found["exit_code"] == AGAIN or found["exit_code"] < 0) and runner.left > 60
        state = json.loads(file.read_text()) if file.exists() else {"rows": []}
        counts = Counter(row["status"] for row in state["rows"])
        whole = counts["ok"] and "running" not in state
        found["failed"] = not again and bool(counts["failed"] or not whole)
        found["rows"] = dict(counts)
        yield found
        if not again:
            return


def install(out: Path, variables: Variables) -> tuple[list[dict], Variables]:
    """What was done to have mrl_fast, and the environment variables with which it is found."""

    def works(variables: Variables) -> bool:
        command = [sys.executable, "-c", "import mrl_fast.kernels, mrl_fast._C"]
        return not subprocess.run(command, env=variables, cwd=out, capture_output=True).returncode

    if works(variables):
        return [], variables
    runner = Runner(out / "install.log", variables)
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    runs = [runner.run(*pip, "--no-build-isolation", "--no-deps", "-e", ".", forgiven=(1,))]
    if works(variables):
        return runs, variables
    print("pip could not install mrl_fast (install.log); built in a temporary copy", flush=True)
    copy = Path(tempfile.mkdtemp(prefix="mrl_fast-"))
    for name in ("mrl_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "setup.py", copy)  # without pyproject.toml, which wants a new setuptools
    runs.append(runner.run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=copy))
    (copy / "kernels").rename(copy / "mrl_fast" / "kernels")
    variables = {**variables, "PYTHONPATH": f"{copy}{os.pathsep}{ROOT}"}
    if not works(variables):
        raise SystemExit("mrl_fast could be neither installed nor built: see install.log")
    return runs, variables


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests, sanitizers and measurements on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--part", type=int, nargs="+", choices=range(1, 6), default=range(1, 6))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; needs no GPU")
    given = parser.parse_args()
    if not (given.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU here; --tiny does without")
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    variables: Variables = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        # before triton is imported
        **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}),
    }
    runs, variables = install(out, variables)
    for part in given.part:
        file, runner = out / f"part{part}.json", Runner(out / f"part{part}.log", variables)
        file.unlink(missing_ok=True)
        ways = {1: tests, 2: sanitizers}
        way = ways[part](runner, tiny=given.tiny) if part in ways else rows(
            part, runner, file, tiny=given.tiny
        )  # fmt: skip
        mine: list[dict] = []
        for run in way:
            mine.append({"part": part} | run)
            print(json.dumps(mine[-1]), flush=True)
            state = (
                json.loads(file.read_text()) if file.exists() else {"environment": environment()}
            )
            file.write_text(json.dumps(state | {"runs": mine}, indent=1) + "\n")
        runs += mine
        summary = json.dumps(environment() | {"runs": runs}, indent=1)
        (out / "summary.json").write_text(summary + "\n")
    table.write(out)
    return int(any(run["failed"] for run in runs))


if __name__ == "__main__":
    raise SystemExit(main())
