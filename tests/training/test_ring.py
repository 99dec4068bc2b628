"""The ring: losses over the rows of several ranks equal those of one process with all of them."""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from mrl_fast import matryoshka_info_nce
from mrl_fast.testing import assert_within_budget, rounding_bounds
from tests.helpers import ring_cases
from tests.helpers.losses import DIMS
from tests.helpers.ring_cases import CASES, LAYOUTS
from tests.helpers.ring_rank import CLIP, DEAD, LATE, LATENESS, RANKS, TIMEOUT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What four ranks left behind; one of them was killed at the end."""
    folder = tmp_path_factory.mktemp("ring")
    command = [sys.executable, "-m", "tests.helpers.ring_rank", str(folder)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment) for rank in range(RANKS)
    ]
    codes = [child.wait(600) for child in children]
    assert codes == [-9 if rank == DEAD else 0 for rank in range(RANKS)]
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(name, ranks):
    case = CASES[name]
    t = ring_cases.problem(case)
    parts = [found[name] for found, _ in ranks[: len(LAYOUTS[case.layout])]]
    actual = ring_cases.together(case, parts)
    if case.dtype == torch.bfloat16:  # the same as one process makes of inputs so rounded
        alone = ring_cases.run(case, t, None, None, case.dtype)
        torch.testing.assert_close(actual["loss"], alone["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(actual, alone, rtol=2**-7, atol=1e-6)
        return
    exact = ring_cases.run(case, t, None, "reference", torch.float64)
    if case.dtype == torch.float64:
        return torch.testing.assert_close(actual, exact)
    held = {
        name: x.to(case.dtype).double() if x.is_floating_point() else x for name, x in t.items()
    }  # what the ranks were given
    truth = ring_cases.run(case, held, None, "reference", torch.float64)["loss"]
    # atol: a row's sum of exp, whose largest is 1, is rounded once, as the loss of a sure row shows
    torch.testing.assert_close(actual["loss"].double(), truth.double(), rtol=1e-6, atol=2**-23)
    native = ring_cases.run(case, t, None, "reference", case.dtype)

    def whole():
        return [*ring_cases.run(case, t, None, "reference", torch.float64).values()]

    bounds = cache(lambda: rounding_bounds(whole))
    for i, (key, value) in enumerate(actual.items()):
        bound = partial(lambda i: bounds()[i], i)
        assert_within_budget(value, exact[key], native[key], name=f"{name}: {key}", bound=bound)


def test_rows_travel_in_several_pieces_and_none_are_gathered(ranks):
    for _, found in ranks:
        assert found["tours"] == 4  # 8 rows by 2
        assert 0 < found["gathered"] < 48  # numbers of rows and the like: less than one row


@pytest.mark.parametrize("way", ["checkpoint", "defaults"])
def test_in_a_training_loop(way, ranks):
    for _, found in ranks:
        for actual, expected in zip(found[way], found["plain"], strict=True):
            assert torch.equal(actual, expected)


def test_without_gradients(ranks):
    for found, training in ranks:
        assert torch.equal(training["no grad"], training["inference"])
        assert not training["no grad"].requires_grad and len(found)


def test_compiles_as_one_graph(ranks):
    for _, found in ranks[:2]:
        for actual, expected in zip(found["compiled"], found["even"], strict=True):
            assert torch.equal(actual, expected)


def test_ddp_gives_the_gradient_of_one_large_batch(ranks):
    t = ring_cases.problem(CASES["clip"])
    torch.manual_seed(0)
    model = torch.nn.Linear(48, 48)
    matryoshka_info_nce(model(t["q"].float()), t["p"].float(), DIMS, **CLIP).loss.backward()
    for _, found in ranks:
        for actual, p in zip(found["ddp"], model.parameters(), strict=True):
            torch.testing.assert_close(actual, p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["late", "late to backward", "dead"])
def test_a_rank_that_is_late_or_dead_is_an_error_on_all(what, folder):
    for rank in range(RANKS):
        if what == "dead" and rank == DEAD:
            continue
        found = torch.load(folder / f"{rank}-failures.pt")
        assert found[what] is not None, f"rank {rank} saw no error"
        _, message, seconds = found[what]
        waited = LATENESS * (rank == LATE and what != "dead")
        # a machine that does other things too; a hang would be of the default group's 30 minutes
        assert seconds < waited + TIMEOUT + 60, (rank, message)
