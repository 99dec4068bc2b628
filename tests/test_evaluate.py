"""The evaluation helpers, on vectors whose answers are known."""

import torch

from mrl_fast import SearchResult, prefix_topk
from mrl_fast.evaluate import linear_probe_accuracy, nearest_neighbour_accuracy, recall_at_k


def two_classes(count, seed):
    """Column 0 says nothing about the class, column 1 everything."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    noise = torch.randn(count, generator=generator)
    return torch.stack([noise, 10.0 * labels - 5.0], dim=1), labels


def test_accuracy_by_prefix():
    train, test = two_classes(200, 0), two_classes(100, 1)
    nearest = nearest_neighbour_accuracy(*train, *test, (1, 2))
    assert 0.3 < nearest[0] < 0.7 and nearest[1] == 1.0
    linear = linear_probe_accuracy(*train, *test, (1, 2), steps=100, batch=64)
    assert 0.3 < linear[0] < 0.7 and linear[1] == 1.0


def test_probe_is_reproducible_and_leaves_the_generator_alone():
    train, test = two_classes(60, 0), two_classes(40, 1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = linear_probe_accuracy(*train, *test, (1, 2), steps=5, seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert linear_probe_accuracy(*train, *test, (1, 2), steps=5, seed=3) == first


def test_recall_counts_ties_and_nothing_else():
    database = torch.tensor([[3.0], [2.0], [2.0], [1.0]])
    query = torch.ones(1, 1)
    exact = prefix_topk(query, database, 2)
    assert isinstance(exact, SearchResult) and exact.ids.tolist() == [[0, 1]]
    for ids, expected in [
        ([0, 1], 1.0),
        ([2, 0], 1.0),
        ([0, 3], 0.5),
        ([0, -1], 0.5),
        ([3, -1], 0),
    ]:
        assert recall_at_k(torch.tensor([ids]), exact, query, database) == expected
