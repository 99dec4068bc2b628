"""One of four ranks, as a process of its own: python -m tests.helpers.ring_rank FOLDER RANK.

It runs every case, then what belongs to a training loop, then is late, and one rank dies; FOLDER
gets what each found.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu import interpreter
from mrl_fast import matryoshka_info_nce
from mrl_fast.training.ring import travel
from tests.helpers.losses import BOTH_WAYS, DIMS
from tests.helpers.ring_cases import CASES, LAYOUTS, on_rank, problem, run

RANKS, DEAD, LATE = 4, 2, 3
TIMEOUT, LATENESS = 3.0, 5.0  # seconds, of the groups whose ranks come late or die
CLIP: dict[str, Any] = dict(directions=BOTH_WAYS, partition_mode="per_direction")


def small_pieces() -> None:
    """Several tours, the last of which some ranks have no rows for."""
    travel.PIECE_BYTES, travel.LEAST_ROWS = {"cpu": 1}, 2


def values(rank: int, two: Any) -> dict:
    found = {}
    for name, case in CASES.items():
        if rank < len(LAYOUTS[case.layout]):
            group = two if case.layout == "two" else dist.group.WORLD
            mine = on_rank(case, problem(case), rank)
            found[name] = run(case, mine, group, case.impl, case.dtype)
    return found


def gathered_numbers(call) -> int:
    """The most numbers that a rank gives to an all-gather or an all-reduce during the call."""
    sizes, originals = [0], (dist.all_gather, dist.all_reduce)

    def counting(original):
        def count(*tensors, **options):
            sizes.append(tensors[-1].numel())
            return original(*tensors, **options)

        return count

    dist.all_gather, dist.all_reduce = map(counting, originals)
    call()
    dist.all_gather, dist.all_reduce = originals
    return max(sizes)


def in_training(rank: int, two: Any) -> dict:
    """Clip's loss of a rank's rows under DDP, checkpointing, other defaults, compiled."""
    case, group = CASES["clip"], dist.group.WORLD
    t = {name: x.float() for name, x in on_rank(case, problem(case), rank).items()}

    def loss(q, p, group=group):
        return matryoshka_info_nce(q, p, DIMS, group=group, **CLIP).loss

    def gradients(call):
        q, p = (t[name].clone().requires_grad_() for name in ("q", "p"))
        return torch.autograd.grad(call(q, p), [q, p])

    route = travel.Route(group, LAYOUTS[case.layout], len(t["q"]), 1, [t["q"]])
    found: dict[str, Any] = {
        "tours": route.tours,
        "gathered": gathered_numbers(lambda: gradients(loss)),
    }
    found["plain"] = gradients(loss)
    found["checkpoint"] = gradients(lambda q, p: checkpoint(loss, q, p, use_reentrant=False))
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        found["defaults"] = gradients(loss)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        found["no grad"] = loss(t["q"], t["p"])
    with torch.inference_mode():
        found["inference"] = loss(t["q"], t["p"])
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(48, 48))
    loss(model(t["q"]), t["p"]).backward()
    found["ddp"] = [p.grad for p in model.parameters()]
    if rank < 2:
        even = dict(zip(("q", "p"), torch.randn(2, 2, 4, 48)[:, rank], strict=True))
        t |= even
        found["even"] = gradients(lambda q, p: loss(q, p, two))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own compiler
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            found["compiled"] = gradients(lambda q, p: compiled(q, p, two))
    return found


def failures(rank: int, to: Path) -> None:
    """Writes what this rank sees where one comes late to the loss, late to its backward, and
    dies."""

    dist.barrier()  # ranks that compile take longer
    groups = [dist.new_group(timeout=timedelta(seconds=TIMEOUT)) for _ in range(3)]

    def attempt(before=lambda: None, between=lambda: None):
        group = groups.pop()
        dist.barrier()
        q = torch.randn(6, 48, requires_grad=True)
        begin = time.monotonic()
        try:
            before()
            loss = matryoshka_info_nce(q, q.detach().clone().requires_grad_(), DIMS, group=group)
            between()
            loss.loss.backward()
        except Exception as error:  # which one it is is what is tested
            return type(error).__name__, str(error)[:200], time.monotonic() - begin
        return None

    def late():
        if rank == LATE:
            time.sleep(LATENESS)

    def dead():
        if rank == DEAD:
            os.kill(os.getpid(), signal.SIGKILL)

    found = {"late": attempt(before=late), "late to backward": attempt(between=late)}
    torch.save(found, to)
    torch.save(found | {"dead": attempt(between=dead)}, to)


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS
    )
    two = dist.new_group([0, 1])
    small_pieces()
    torch.manual_seed(1)
    torch.save([values(rank, two), in_training(rank, two)], folder / f"{rank}.pt")
    failures(rank, folder / f"{rank}-failures.pt")
    os._exit(0)  # threads of gloo that are still there abort an ordinary exit at times


if __name__ == "__main__":
    interpreter.install()
    main(Path(sys.argv[1]), int(sys.argv[2]))
