"""InfoNCE over the rows of several ranks: around the ring, and with all documents gathered.

    python -m benchmarks.cpu.ring [--ranks 4] [--rows 32768] [--width 512] [--rounds 2]
        [--both-ways] [--out FILE.json]

Starts ranks of gloo on this machine, one thread each, which take steps (the loss, then its
backward) by both forms in turn. ``rows`` are of the global batch. Prints the medians over rounds of
a step's seconds, the most memory that a step takes beyond what the rank held before it (growth of
its peak resident set, the largest of the ranks), and by how much loss and gradients differ.

"gathered" is what ``group=`` did before the ring: every rank has all documents, gathered with
their gradients, and calls the loss of one process on its queries and these.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import ROOT, machine
from mrl_fast import matryoshka_info_nce
from mrl_fast.training.ring.ranks import Ranks, gather_rows

DIMS = (64, 128, 256, 512)
BOTH_WAYS: dict[str, Any] = dict(
    directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
)


def resident(name: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at most since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def step(form: str, q: torch.Tensor, p: torch.Tensor, dims: tuple[int, ...], both: bool):
    """Loss and gradients of this rank."""
    q, p = q.detach().requires_grad_(), p.detach().requires_grad_()
    rank, size = dist.get_rank(), dist.get_world_size()
    options: dict[str, Any] = BOTH_WAYS if both else {}
    if form == "ring":
        loss = matryoshka_info_nce(q, p, dims, group=dist.group.WORLD, **options).loss
    else:
        counts = [len(p)] * size
        ranks = Ranks(dist.group.WORLD, rank, counts, counts)
        target = torch.arange(len(q), dtype=torch.int64) + rank * len(q)
        loss = matryoshka_info_nce(q, gather_rows(p, counts, ranks), dims, target=target).loss
        if both:
            every = gather_rows(q, counts, ranks)
            loss = (loss + matryoshka_info_nce(p, every, dims, target=target).loss) / 2
    loss.backward()
    return loss.detach(), q.grad, p.grad


def run_rank(rank: int, folder: Path, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=options.ranks
    )
    rows, width = options.rows // options.ranks, options.width
    dims = tuple(d for d in DIMS if d < width) + (width,)
    g = torch.Generator().manual_seed(rank)
    q = torch.randn(rows, width, generator=g)
    p = q + 2 * torch.randn(rows, width, generator=g)
    for form in ("ring", "gathered"):  # buffers of gloo, threads, code
        step(form, q[:64], p[:64], dims, options.both_ways)
    found: dict[str, list] = {"ring": [], "gathered": []}
    results = {}
    for _ in range(options.rounds):
        for form, of in found.items():
            dist.barrier()
            forget_peak()
            before, begin = resident("VmRSS"), time.perf_counter()
            result = step(form, q, p, dims, options.both_ways)
            dist.barrier()
            of.append((time.perf_counter() - begin, resident("VmHWM") - before))
            results[form] = result
    differences = [
        ((a.double() - b.double()).abs().max() / b.abs().max()).item()
        for a, b in zip(results["ring"], results["gathered"], strict=True)
    ]
    (folder / str(rank)).write_text(json.dumps({"steps": found, "differences": differences}))
    dist.barrier()
    os._exit(0)  # threads of gloo that are still there abort an ordinary exit at times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--both-ways", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.folder, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.cpu.ring", *sys.argv[1:], "--folder", folder]
        children = [
            subprocess.Popen([*command, "--rank", str(rank)], cwd=ROOT)
            for rank in range(options.ranks)
        ]
        codes = [child.wait() for child in children]
        if any(codes):
            raise RuntimeError(f"exit codes of the ranks: {codes}")
        found = [json.loads((Path(folder) / str(r)).read_text()) for r in range(options.ranks)]
    report: dict[str, object] = {
        "ranks": options.ranks, "rows": options.rows, "width": options.width,
        "both_ways": options.both_ways, "rounds": options.rounds,
    }  # fmt: skip
    for form in ("ring", "gathered"):
        steps = [rank["steps"][form] for rank in found]
        report[f"{form}_s"] = round(median(s for s, _ in steps[0]), 3)
        report[f"{form}_peak_mib"] = round(max(median(mib for _, mib in rank) for rank in steps), 1)
    ratios = [r[0] / g[0] for r, g in zip(*found[0]["steps"].values(), strict=True)]
    report["time_ratio"] = round(median(ratios), 3)
    report["memory_ratio"] = round(report["ring_peak_mib"] / report["gathered_peak_mib"], 3)  # pyright: ignore
    for i, name in enumerate(("loss", "d_queries", "d_documents")):
        report[f"{name}_difference"] = max(rank["differences"][i] for rank in found)
    report |= machine() | {"threads": 1}
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
