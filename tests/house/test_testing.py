"""The assertions reject wrong answers."""

import pytest
import torch

from mrl_fast.testing import assert_same_topk, assert_within_budget


def test_budget_accepts_the_native_error_and_rejects_more():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    native = torch.tensor([1.0, 2.0 + 1e-6])
    assert_within_budget(native, exact, native, name="native")
    assert_within_budget(exact[:0], exact[:0], native[:0], name="empty")
    for wrong in ([1.0, 2.0 + 4e-6], [1.0, torch.nan], [torch.inf, 2.0]):
        with pytest.raises(AssertionError, match="wrong: error"):
            assert_within_budget(torch.tensor(wrong), exact, native, name="wrong")
    with pytest.raises(AssertionError, match=r"wrong: \[1\], not \[2\]"):
        assert_within_budget(native[:1], exact, native, name="wrong")


EXACT = torch.tensor([[0.5, 1.0, 1.0, -torch.inf]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("scores", "ids", "message"),
    [
        ([1.0, 1.0, 0.5, -torch.inf], [1, 2, 0, -1], None),
        ([1.0, 1.0, 0.5, -torch.inf], [2, 1, 0, -1], "order"),
        ([1.0, 0.5, 1.0, -torch.inf], [1, 0, 2, -1], "better row was left out"),
        ([1.0, 1.0, 0.5, -torch.inf], [1, 1, 0, -1], "a row twice"),
        ([1.0, 1.0, 0.6, -torch.inf], [1, 2, 0, -1], "a score is off"),
        ([1.0, 1.0, 0.5, 0.0], [1, 2, 0, -1], "missing neighbour has a score"),
        ([1.0, 1.0, -torch.inf, -torch.inf], [1, 2, -1, -1], "2 neighbours, not 3"),
        ([1.0, 1.0, torch.nan, -torch.inf], [1, 2, 0, -1], "a score is off"),
    ],
)
def test_topk(scores, ids, message):
    result = torch.tensor([scores]), torch.tensor([ids])
    if message is None:
        assert_same_topk(result, EXACT, name="right", tolerance=1e-6)
    else:
        with pytest.raises(AssertionError, match=message):
            assert_same_topk(result, EXACT, name="wrong", tolerance=1e-6)
