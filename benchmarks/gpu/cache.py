"""Binaries that travel: compiled where there is no GPU, hit where there is one.

    python -m benchmarks.gpu.cache make [--jobs N] [--report FILE]   # make gpu-cache
    python -m benchmarks.gpu.cache count [--jobs N] [--report FILE]  # what it would compile
    python -m benchmarks.gpu.cache unpack | check | launchers        # there

``make`` runs what ``run`` will run under the stub, which compiles every launch for sm_90, and packs
cubins, their json and the sources of Triton's launchers, which only that Python can compile. A key
contains Triton's hash of its own files, of which libtriton differs from Python to Python: ``pin``
puts Triton's version there instead, on both sides. The cache's lists of files contain absolute
paths, so that the folder is the same on both sides too.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = Path("/tmp/mrl_fast-triton")
ARCHIVE = ROOT / "build/gpu-cache.tar.xz"
MOST_BYTES = 16 << 20
SUFFIXES = (".cubin", ".json", ".c")
LAUNCHERS = FOLDER / "launchers"

counts = {"hits": 0, "compiled": 0, "seconds": 0.0}


def pin() -> None:
    """Called before anything is compiled; at exit, prints how much was compiled here."""
    try:
        import triton
        from triton import knobs
        from triton.runtime import cache
    except ImportError:
        return
    if knobs.runtime.interpret or knobs.compilation.listener is _count:
        return
    cache.triton_key = functools.partial(str, f"triton {triton.__version__}")
    knobs.compilation.listener = _count
    atexit.register(lambda: print(f"binaries: {json.dumps(counts)}", flush=True))


def _count(*, times: Any, cache_hit: bool, **_: Any) -> None:
    counts["hits" if cache_hit else "compiled"] += 1
    counts["seconds"] = round(counts["seconds"] + times.total / 1e6, 3)


def note_launcher(constants: dict, signature: dict, tensordesc_meta: Any) -> None:
    """Keeps the source of a launcher; the stub calls this."""
    import hashlib

    from triton.backends.nvidia.driver import make_launcher

    source = make_launcher(constants, signature, tensordesc_meta)
    LAUNCHERS.mkdir(parents=True, exist_ok=True)
    (LAUNCHERS / f"{hashlib.sha256(source.encode()).hexdigest()}.c").write_text(source)


def launchers() -> None:
    """Compiles all launchers that came, eight at a time, into Triton's cache."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    def build(file: Path) -> None:
        compile_module_from_src(
            src=file.read_text(), name="__triton_launcher", library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs, libraries=driver.libraries,
        )  # fmt: skip

    driver.CudaUtils()
    with ThreadPoolExecutor(8) as pool:
        print(f"{len(list(pool.map(build, LAUNCHERS.glob('*.c'))))} launchers")


def pack() -> int:
    """Packs the folder; returns the bytes of the archive."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    with tarfile.open(ARCHIVE, "w:xz", preset=6) as archive:
        for file in sorted(FOLDER.rglob("*")):
            if file.suffix in SUFFIXES:
                archive.add(file, file.relative_to(FOLDER))
    return ARCHIVE.stat().st_size


def unpack() -> None:
    if not ARCHIVE.exists():
        raise SystemExit(f"{ARCHIVE.name} did not come along: make gpu-cache")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(FOLDER, filter="data")


def probe() -> None:
    """Launches two kernels that are in every cache."""
    import torch

    from mrl_fast import rerank

    q, x = (torch.ones(n, 64, dtype=torch.bfloat16, device="cuda") for n in (2, 512))
    rows = torch.zeros(2, 16, dtype=torch.int64, device="cuda")
    rerank(q, x, rows, 4, impl="triton")


def check() -> int:
    """0 where the cache is hit."""
    probe()
    return int(not counts["hits"] or bool(counts["compiled"]))


def make(how: str, jobs: int, report: Path | None) -> int:
    """Runs every command of the programme under the stub: ``how`` is "compile" or "count"."""
    from benchmarks.gpu import stages

    environment = os.environ | {
        "TRITON_CACHE_DIR": str(FOLDER), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)

    def run(command: stages.Command) -> dict[str, Any]:
        begin = time.monotonic()
        with tempfile.NamedTemporaryFile("r", suffix=".json") as found:
            words = ["-m", "benchmarks.gpu.stub", how, found.name, *command.calls]
            done = subprocess.run(
                [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True,
                text=True, errors="replace",
            )  # fmt: skip
            seen = json.loads(found.read() or "{}")
        row = {"name": command.name, "exit": done.returncode, **seen}
        row["wall"] = round(time.monotonic() - begin, 1)
        if not seen:
            row["why"] = done.stderr[-2000:]
        print(json.dumps(row), flush=True)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(run, stages.compiled()))
    if report:
        report.write_text("\n".join(stages.estimate(rows)) + "\n")
    size = pack() if how == "compile" else 0
    print(f"{ARCHIVE}: {size / 2**20:.1f} MiB, {len(list(FOLDER.rglob('*.cubin')))} binaries")
    return int(size > MOST_BYTES or any("why" in row for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="The compiled cache of the GPU programme.")
    parser.add_argument("do", choices=("make", "count", "unpack", "check", "launchers", "probe"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    if given.do in ("make", "count"):
        return make("compile" if given.do == "make" else "count", given.jobs, given.report)
    pin()
    return int({"unpack": unpack, "launchers": launchers, "probe": probe, "check": check}[
        given.do
    ]() or 0)  # fmt: skip


if __name__ == "__main__":
    from benchmarks.gpu import cache  # whose counts others read

    raise SystemExit(cache.main())
