"""Ranks whose tensors do not fit their peers': every one of them raises the same error."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from mrl_fast import matryoshka_distill, matryoshka_info_nce, matryoshka_sigmoid_loss


def first(d):
    return d if isinstance(d, torch.Tensor) else d[0]


LOSSES = {
    "info_nce": lambda q, d, group: matryoshka_info_nce(q, d, (4, 8), group=group).loss,
    "dims": lambda q, d, group: (
        matryoshka_info_nce(q, d, (4, 7 + dist.get_rank()), group=group).loss
    ),
    "dtype": lambda q, d, group: (
        matryoshka_info_nce(
            *(t.to([torch.float16, torch.float32][dist.get_rank()]) for t in (q, d)),
            (4,),
            group=group,
        ).loss
    ),
    "frozen": lambda q, d, group: (
        matryoshka_info_nce(q, d.requires_grad_(dist.get_rank() == 1), (4, 8), group=group).loss
    ),
    "sigmoid": lambda q, d, group: (
        matryoshka_sigmoid_loss(q, first(d), (4, 8), scale=1.0, bias=0.0, group=group).loss
    ),
    "distill": lambda q, d, group: (
        matryoshka_distill((q, first(d)), (q, first(d)), (4, 8), group=group).loss
    ),
}
# loss, then each rank's number of queries, blocks, rows of a lone block, and width
CASES = [
    ("info_nce", [(6, 2, 6, 8), (6, 1, 6, 8)], "documents: expected as many blocks .* got [2, 1]"),
    ("info_nce", [(6, 1, 6, 8), (6, 1, 6, 9)], "queries: expected the same width .* got [8, 9]"),
    ("dims", [(6, 1, 6, 8), (6, 1, 6, 8)], "dims: expected the same dims and options .* rank"),
    ("dtype", [(6, 1, 6, 8), (6, 1, 6, 8)], "queries: expected the same dtype .* rank"),
    (
        "frozen",
        [(6, 1, 6, 8), (6, 1, 6, 8)],
        "documents: expected gradients to be wanted, or not, .* got [0, 1]",
    ),
    ("sigmoid", [(6, 1, 6, 8), (6, 1, 6, 9)], "queries: expected the same width .* got [8, 9]"),
    ("distill", [(6, 1, 6, 8), (6, 1, 6, 9)], "queries: expected the same width .* got [8, 9]"),
]


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    with open(f"{folder}/{rank}", "w") as errors:
        for name, shapes, _ in CASES:
            rows, blocks, lone, width = shapes[rank]
            d = [torch.ones(rows if blocks > 1 else lone, width)] * blocks
            d = d[0] if blocks == 1 else d
            try:
                LOSSES[name](torch.ones(rows, width), d, dist.group.WORLD)
                errors.write("nothing\n")
            except ValueError as error:
                errors.write(f"{error}\n")
        even = LOSSES["info_nce"](torch.eye(4, 8), torch.eye(4, 8), dist.group.WORLD)
        errors.write(f"{even.item():.4f}\n")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that are still there abort an ordinary exit at times


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What each rank wrote, a line a case."""
    folder = tmp_path_factory.mktemp("ranks")
    code = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('ranks', {__file__!r})\n"
        "ranks = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(ranks)\n"
        f"ranks.run_rank(int(sys.argv[1]), {str(folder)!r})\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [child.wait(300) for child in children] == [0, 0]
    return [(folder / str(rank)).read_text().splitlines() for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_ranks_that_do_not_fit_raise_the_same_error(case, errors):
    start, end = CASES[case][2].split(".* ")
    for lines in errors:
        assert lines[case].startswith(start.strip()) and lines[case].endswith(end), lines[case]
        assert "on every rank" in lines[case]


def test_ranks_go_on_after_an_error(errors):
    assert errors[0][-1] == errors[1][-1] and 0 < float(errors[0][-1]) < 10
