"""Recall counts the k best and what ties with the k-th, and nothing else."""

import math

import pytest
import torch

from mrl_fast.shared.recall import count_found
from mrl_fast.shared.types import SearchResult


def result(scores, ids):
    scores = None if scores is None else torch.tensor([scores])
    return SearchResult(scores, torch.tensor([ids]))


@pytest.mark.parametrize(
    ("found", "exact", "expected"),
    [
        (([3.0, 2.0, 1.0], [7, 5, 9]), ([3.0, 2.0, 1.0], [7, 5, 9]), 3),
        (([1.0, 3.0, 2.0], [9, 7, 5]), ([3.0, 2.0, 1.0], [7, 5, 9]), 3),  # in any order
        (([3.0, 1.0, 0.5], [7, 4, 6]), ([3.0, 2.0, 1.0], [7, 5, 9]), 2),  # 4 ties with the third
        (([3.0, 2.0, 0.5], [7, 5, 9]), ([3.0, 2.0, 1.0], [7, 5, 9]), 3),  # one of the best
        (([2.0, 1.5, 0.5], [4, 6, 8]), ([3.0, 2.0, 1.0], [7, 5, 9]), 0),  # ties with the second
        (([1.0, 1.0, 1.0, 1.0], [1, 2, 3, 4]), ([2.0, 1.0], [7, 5]), 2),  # at most k
        (([3.0, -math.inf], [7, -1]), ([3.0, 2.0], [7, 5]), 1),
        (([3.0, -math.inf], [7, -1]), ([3.0, -math.inf], [7, -1]), 1),  # there is but one
        (([math.inf, 1.0], [4, 5]), ([math.inf, math.inf], [7, 8]), 1),
        (([math.inf, -math.inf], [4, -1]), ([-math.inf], [-1]), 0),
        (([1.0, -math.inf], [4, -1]), ([3.0, -math.inf], [7, -1]), 0),
        (([3.0, -math.inf], [7, -1]), ([3.0, -math.inf], [7, 8]), 1),  # 8 overflowed
        (([math.nan, 1.0], [4, 5]), ([math.nan, math.nan], [7, 8]), 0),
        (([0.0], [4]), ([0.0], [7]), 1),
        (([3.0, 2.0], [7, 4]), (None, [7, 5]), 1),
        (([3.0, 2.0, 2.0], [7, 5, 4]), (None, [7, 5, 6]), 3),  # 4 ties with 5, as 6 must
        (([3.0, 3.0, 2.0], [7, 4, 5]), (None, [7, 5, 6]), 2),  # 4 ties with 7, which is not last
        (([math.inf, math.inf], [4, 5]), (None, [7, 8]), 0),
        (([3.0, 3.0], [4, 5]), (None, [7, 8]), 0),
        (([3.0, -math.inf], [7, -1]), (None, [7, -1]), 1),
    ],
)
def test_table(found, exact, expected):
    assert count_found(result(*found), result(*exact)).tolist() == [expected]


def test_tolerance_is_a_share_of_the_last_score():
    exact = result([-1.0, -200.0], [7, 5])
    for score, tolerance, expected in [(-200.1, 1e-3, 2), (-199.9, 1e-3, 2), (-200.5, 1e-3, 1),
                                       (-200.1, 0.0, 1)]:  # fmt: skip
        found = result([-1.0, score], [7, 4])
        assert count_found(found, exact, tolerance=tolerance).tolist() == [expected]


def test_queries_are_counted_apart():
    exact = SearchResult(torch.tensor([[2.0], [1.0]]), torch.tensor([[0], [1]]))
    found = SearchResult(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1, 2], [4, 5]]))
    assert count_found(found, exact).tolist() == [0, 1]
