"""What ``tune`` tries, and what it claims of it: chains, losses, and the bound on the mean loss."""

import math

import numpy as np
import pytest
import torch

from mrl_fast import SearchResult
from mrl_fast.search.index.tuning import Aim, _chains, _losses, _lower_bound, _walk
from tests.helpers.tuning import DIMS, Shape


def test_chains_go_from_safe_to_cheap():
    index = Shape(5000, DIMS)
    chains = _chains(index, 10)
    assert [chain[0] for chain in chains] == [
        [(8, 4096), (64, 10)],
        [(16, 4096), (64, 10)],
        [(32, 4096), (64, 10)],
        [(8, 4096), (16, 1024), (64, 10)],
    ]
    assert [stages[0][1] for stages in chains[3]] == [4096 >> i for i in range(9)] + [10]
    assert chains[3][5:] == [
        [(8, keep), (16, 32 if keep == 128 else max(10, keep // 4)), (64, 10)]
        for keep in (128, 64, 32, 16, 10)
    ]
    assert _chains(index, 100)[0][0] == [(8, 5000), (64, 100)]  # 64k, capped at the rows


# Upper 95 % limits of a Poisson mean after 0, 1, … events, as tabled.
LIMITS = (2.996, 4.744, 6.296, 7.754, 9.154)


@pytest.mark.parametrize(
    ("losses", "worst", "events"),
    [
        ([], 0.5, 0.5 * LIMITS[0]),
        ([1.0, 1.0], 1.0, LIMITS[2]),
        ([0.1] * 4, 0.1, 0.1 * LIMITS[4]),
        ([0.1, 1.0], 1.0, LIMITS[1] + 0.1 * (LIMITS[2] - LIMITS[1])),
    ],
)
def test_bound_by_hand(losses, worst, events):
    sample = torch.tensor(losses + [0.0] * (256 - len(losses)), dtype=torch.float64)
    bound = _lower_bound(sample, worst, 0.05)
    assert bound < 1 and bound == pytest.approx(1 - events / 256, abs=1e-4)


def test_bound_of_a_hopeless_list_is_not_negative():
    assert _lower_bound(torch.ones(256, dtype=torch.float64), 1.0, 0.05) == 0


@pytest.mark.parametrize("loss", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("n", [512, 1024])
def test_bound_covers_the_mean(loss, n):
    generator = torch.Generator().manual_seed(n)
    events = torch.rand(1000, n, generator=generator) < 0.01 / loss  # their mean loss is 0.01
    samples = events.double() * loss
    wrong = [_lower_bound(x, max(0.5, float(x.max())), 0.05) > 0.99 for x in samples]
    student = samples.mean(1) + 1.65 * samples.std(1) / math.sqrt(n) < 0.01
    assert np.mean(wrong) <= 0.05 < student.double().mean()


def losses_like(*values, n=512):
    """Per list one sample: so many queries lose so much."""
    for count, loss in values:
        yield torch.tensor([loss] * count + [0.0] * (n - count), dtype=torch.float64)


def test_walk_stops_at_the_first_failure():
    lists = losses_like((0, 0.0), (5, 0.1), (300, 0.1), (0, 0.0), (0, 0.0))
    results = list(_walk(lists, Aim(0.99, 0.05, 0.5)))
    assert [bound >= 0.99 for _, bound in results] == [True, True, False]
    assert [mean for mean, _ in results] == pytest.approx([1, 1 - 0.5 / 512, 1 - 30 / 512])
    assert len(list(lists)) == 1  # nothing further was searched than one ahead


def test_walk_fears_what_the_next_list_shows():
    def bound(*values):
        return next(_walk(losses_like(*values), Aim(0.9, 0.05, 0.5)))[1]

    assert bound((0, 0.0)) == bound((0, 0.0), (3, 0.2)) == pytest.approx(1 - 1.498 / 512, abs=1e-4)
    assert bound((0, 0.0), (1, 1.0)) == pytest.approx(1 - 2.996 / 512, abs=1e-4)
    assert bound((1, 1.0)) == pytest.approx(1 - 4.744 / 512, abs=1e-4)


def test_losses_count_ties_and_nothing_else():
    exact = SearchResult(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[7, 5, 9]]))
    for scores, ids, count, expected in [
        ([3.0, 2.0, 1.0], [7, 5, 9], 3, 0.0),
        ([3.0, 1.0, 0.5], [7, 4, 6], 3, 1 / 3),  # 4 ties with the third
        ([3.0, 1 - 4e-7, 1 - 8e-7], [7, 4, 6], 3, 1 / 3),  # 4 by rounding, 6 not
        ([3.0, 2.0, 0.5], [7, 5, 9], 3, 0.0),  # a neighbour, whatever its score
        ([3.0, -math.inf, -math.inf], [7, -1, -1], 3, 2 / 3),
        ([3.0, 2.0, -math.inf], [7, 5, -1], 2, 0.0),
        ([1.0, 0.5, 0.2], [9, 3, 2], 2, 1.0),  # 9 is not among the best two
    ]:
        found = SearchResult(torch.tensor([scores]), torch.tensor([ids]))
        assert _losses(found, exact, count).tolist() == pytest.approx([expected])
    negative = SearchResult(-exact.scores.flip(1), exact.ids)  # −1, −2, −3: l2
    below = SearchResult(torch.tensor([[-1.0, -2.0, -3.000001]]), torch.tensor([[7, 5, 4]]))
    far = SearchResult(torch.tensor([[-1.0, -2.0, -3.1]]), torch.tensor([[7, 5, 4]]))
    assert _losses(below, negative, 3).tolist() == [0]
    assert _losses(far, negative, 3).tolist() == pytest.approx([1 / 3])
    missing = SearchResult(torch.full((1, 1), -math.inf), torch.tensor([[-1]]))
    assert _losses(missing, missing, 1).tolist() == [1]
