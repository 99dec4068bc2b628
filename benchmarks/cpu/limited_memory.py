"""Searching an index that is four times as large as the memory there is for it.

    python -m benchmarks.cpu.limited_memory --folder DIR [--rows N] [--share 0.25] [--bits]
        [--out FILE.json]

Builds an index of the standard set in DIR, unless it is there, drops it from the page cache, and
searches it in a process whose memory, page cache included, is limited to a share of the files'
size, by a control group: it needs the right to make one (root, as a rule). Prints the time to open,
the time of searches as they come and again, and recall@10 against the exact answer. With --bits the
index has codes="bits", whose signs of all columns choose what is read of the vectors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import ROOT, machine
from benchmarks.search_data import K, standard
from mrl_fast import MatryoshkaIndex, SearchResult

WIDTH, PREFIX, KEEP, QUERIES = 768, 64, 300, 1024
GROUPS = Path("/sys/fs/cgroup")


def build(folder: Path, rows: int, bits: bool) -> None:
    x, q = standard(rows, WIDTH)
    options = {"codes": "bits"} if bits else {"prefix_dtype": "int8"}
    index = MatryoshkaIndex((PREFIX, WIDTH), metric="ip", **options)
    index.add(x)
    index.save(folder / "index")
    best = index.search(q[:QUERIES], K, exact=True)
    first = (WIDTH, 1, KEEP) if bits else (PREFIX, KEEP)
    truth = {"queries": q[:QUERIES], "scores": best.scores, "ids": best.ids, "first": first}
    torch.save(truth, folder / "truth.pt")


def uncache(folder: Path) -> None:
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def group(limit: int) -> Iterator[Path]:
    """A control group whose memory is limited to so many bytes."""
    old = (GROUPS / "memory").is_dir()  # version 1
    path = (GROUPS / "memory" if old else GROUPS) / f"limited-{os.getpid()}"
    path.mkdir()
    try:
        (path / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
        yield path
    finally:
        path.rmdir()


def search(folder: Path) -> dict[str, object]:
    """The times and the ids of all searches; it runs in the limited process."""
    begin = time.perf_counter()
    index = MatryoshkaIndex.load(folder / "index")
    opened = time.perf_counter() - begin
    truth = torch.load(folder / "truth.pt")
    q = truth["queries"]
    stages = [truth["first"], (WIDTH, K)]

    def run(batch: int) -> tuple[list[float], torch.Tensor]:
        seconds, ids = [], []
        for part in q.split(batch):
            begin = time.perf_counter()
            ids.append(index.search(part, K, stages=stages).ids)
            seconds.append(time.perf_counter() - begin)
        return seconds, torch.cat(ids)

    begin = time.perf_counter()
    index.search(q[:1], K, stages=stages)
    first = time.perf_counter() - begin
    cold, ids = run(1)
    again, _ = run(1)
    batches, _ = run(64)
    return {
        "open_ms": round(1e3 * opened, 2),
        "first_search_ms": round(1e3 * first, 1),
        "search_ms": round(1e3 * median(cold), 2),
        "search_again_ms": round(1e3 * median(again), 2),
        "search_64_ms": round(1e3 * median(batches), 1),
        "ids": ids.tolist(),
    }


def child(folder: Path, procs: Path | None) -> dict:
    """`search` in a process of its own, in a control group from its start."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu.limited_memory",
        "--folder",
        str(folder),
        "--child",
    ]
    join = (lambda: procs.write_text(str(os.getpid()))) if procs else None
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=join, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_400_000)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--bits", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder
    if options.child:
        print(json.dumps(search(folder)))
        return
    if not (folder / "truth.pt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, options.rows, options.bits)
    truth = torch.load(folder / "truth.pt")
    exact = SearchResult(truth["scores"], truth["ids"])
    size = sum(path.stat().st_size for path in (folder / "index").iterdir())
    limit = int(options.share * size)
    index = MatryoshkaIndex.load(folder / "index")
    rows: dict[str, object] = {"rows": len(index), "file_mib": size >> 20, "limit_mib": limit >> 20}
    results: dict[str, dict] = {}
    uncache(folder / "index")
    with group(limit) as path:
        results["limited"] = child(folder, path / "cgroup.procs")
    uncache(folder / "index")
    results["unlimited"] = child(folder, None)
    for result in results.values():
        ids = torch.tensor(result.pop("ids"))
        # By id alone: the vectors are not in memory.
        same = (ids[:, :, None] == exact.ids[:, None]).any(2)
        result["recall"] = round(same.double().mean().item(), 4)
    report = {**rows, **results, **machine()}
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
