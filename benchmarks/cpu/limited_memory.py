"""Searching an index that is four times as large as the memory there is for it.

    python -m benchmarks.cpu.limited_memory --folder DIR [--rows N] [--width 768] [--share 0.25]
        [--bits] [--out FILE.json]

Builds an index of the standard set in DIR, unless it is there, drops it from the page cache, and
searches it in a process whose memory, page cache included, is limited to a share of the files'
size, by a control group: it needs the right to make one (root, as a rule; where there is none, that
part is left out). Prints the time to open, the time of searches as they come and again, what these
waited for and read, and recall@10 against the exact answer.

With --bits the index has codes="bits", whose signs of all columns choose what is read of the
vectors; and again with a rung of eight bits between, which leaves few of them to read. There is one
more state then: the codes in memory, the vectors not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
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
from mrl_fast.shared.types import shown

PREFIX, KEEP, QUERIES = 64, 300, 1024
LEFT = 75  # by eight bits
GROUPS = Path("/sys/fs/cgroup")


def build(folder: Path, rows: int, width: int, bits: bool) -> None:
    x, q = standard(rows, width)
    options = {"codes": "bits"} if bits else {"prefix_dtype": "int8"}
    index = MatryoshkaIndex((PREFIX, width), metric="ip", **options)
    index.add(x)
    index.save(folder / "index")
    best = index.search(q[:QUERIES], K, exact=True)
    first, last = (width, 1, KEEP) if bits else (PREFIX, KEEP), (width, K)
    lists = [[first, last]]
    if bits:
        lists.append([first, (width, 8, LEFT), last])
    truth = {"queries": q[:QUERIES], "scores": best.scores, "ids": best.ids, "lists": lists}
    torch.save(truth, folder / "truth.pt")


def uncache(folder: Path) -> None:
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def uncache_vectors(folder: Path) -> None:
    """Reads what lies before the vectors in the files, and drops these from the page cache."""
    for path in folder.glob("rows-*.safetensors"):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            begin = 8 + size + json.loads(file.read(size))["tail"]["data_offsets"][0]
            file.seek(0)
            while file.tell() < begin:
                file.read(min(1 << 24, begin - file.tell()))
            os.posix_fadvise(file.fileno(), begin, 0, os.POSIX_FADV_DONTNEED)


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


def search(folder: Path, number: int) -> dict[str, object]:
    """The times and the ids of all searches by one of the lists of stages; it runs in the limited
    process."""
    begin = time.perf_counter()
    index = MatryoshkaIndex.load(folder / "index")
    opened = time.perf_counter() - begin
    truth = torch.load(folder / "truth.pt")
    q = truth["queries"]
    stages = truth["lists"][number]

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
    before = resource.getrusage(resource.RUSAGE_SELF)
    cold, ids = run(1)
    after = resource.getrusage(resource.RUSAGE_SELF)
    again, _ = run(1)
    batches, _ = run(64)
    return {
        "open_ms": round(1e3 * opened, 2),
        "first_search_ms": round(1e3 * first, 1),
        "search_ms": round(1e3 * median(cold), 2),
        "search_waits": round((after.ru_majflt - before.ru_majflt) / len(q), 2),
        "search_read_kib": round((after.ru_inblock - before.ru_inblock) / 2 / len(q), 1),
        "search_again_ms": round(1e3 * median(again), 2),
        "search_64_ms": round(1e3 * median(batches), 1),
        "ids": ids.tolist(),
    }


def child(folder: Path, number: int, procs: Path | None = None) -> dict:
    """`search` in a process of its own, in a control group from its start."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu.limited_memory",
        "--folder",
        str(folder),
        "--child",
        str(number),
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
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--bits", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder
    if options.child is not None:
        print(json.dumps(search(folder, options.child)))
        return
    if not (folder / "truth.pt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, options.rows, options.width, options.bits)
    truth = torch.load(folder / "truth.pt")
    exact = SearchResult(truth["scores"], truth["ids"])
    size = sum(path.stat().st_size for path in (folder / "index").iterdir())
    limit = int(options.share * size)
    index = MatryoshkaIndex.load(folder / "index")
    rows: dict[str, object] = {"rows": len(index), "file_mib": size >> 20, "limit_mib": limit >> 20}
    del index
    results: dict[str, dict] = {}
    for number, stages in enumerate(truth["lists"]):
        name = shown(stages)
        uncache(folder / "index")
        try:
            with group(limit) as path:
                results[f"limited, {name}"] = child(folder, number, path / "cgroup.procs")
        except (PermissionError, FileNotFoundError) as error:
            print(f"no control group: {error}", file=sys.stderr)
        uncache(folder / "index")
        results[f"unlimited, {name}"] = child(folder, number)
        if options.bits:
            uncache_vectors(folder / "index")
            results[f"codes in memory, {name}"] = child(folder, number)
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
