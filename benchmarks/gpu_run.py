"""Everything a GPU has to prove, in one command.

    python benchmarks/gpu_run.py --out DIR [--part 1|2|3]

Part 1: the test suite on the GPU. Part 2: compute-sanitizer on small shapes. Part 3: the
benchmarks. Each writes its log to DIR, and DIR/summary.json says what ran, on what, from which
commit, and how it ended. Without a GPU the same parts run on the CPU, the kernels interpreted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PART_SECONDS = 480
SANITIZED = "tests/test_logits.py tests/test_kernels_losses.py tests/test_retrieval.py -x -q"


def parts() -> dict[int, list[list[str]]]:
    pytest = [sys.executable, "-m", "pytest", "--import-mode=importlib"]
    commands = {
        1: [[*pytest, "tests", "-q", "--deselect", "tests/test_imports.py"]],
        2: [],
        3: [[*pytest, "benchmarks", "-q", "-s", "--benchmark-json=OUT/benchmarks.json"]],
    }
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        for tool in ("memcheck", "racecheck"):
            check = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest]
            commands[2].append([*check, *SANITIZED.split()])
    return commands


def run(command: list[str], log: Path, seconds: float) -> dict:
    begin = time.time()
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds,
                # our kernels/ must not pass for the package of that name
                env=os.environ | {"PYTHONSAFEPATH": "1"},
            )  # fmt: skip
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = 124
    tail = log.read_text(errors="replace").strip().split("\n")[-1]
    return {
        "command": " ".join(command[1:] if command[0] == sys.executable else command),
        "exit_code": code,
        "seconds": round(time.time() - begin, 1),
        "last_line": tail,
    }


def environment() -> dict:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = None
    return {
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests, sanitizer and benchmarks on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and summary.json")
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="only this part")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    summary = environment() | {"runs": []}
    for number, commands in parts().items():
        if arguments.part not in (None, number):
            continue
        begin = time.time()
        for i, command in enumerate(commands):
            command = [word.replace("OUT", str(arguments.out.resolve())) for word in command]
            log = arguments.out / f"part{number}.{i}.log"
            left = PART_SECONDS - (time.time() - begin)
            summary["runs"].append({"part": number} | run(command, log, max(left, 1)))
            print(json.dumps(summary["runs"][-1]), flush=True)
        (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return int(any(r["exit_code"] for r in summary["runs"]))


if __name__ == "__main__":
    raise SystemExit(main())
