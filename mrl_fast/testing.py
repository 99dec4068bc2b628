"""Assertions for kernels: an error budget against fp64, and a top-k that knows ties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, exact: Tensor, native: Tensor, *, name: str, factor: float = 2.0
) -> None:
    """``|actual − exact|`` may not exceed ``factor`` × the error PyTorch itself makes in this
    dtype.

    Args:
        actual: The result under test.
        exact: The same in fp64.
        native: What plain PyTorch gives in the dtype of the inputs.
        name: What failed, for the message.
        factor: Of the native error, plus one rounding of the largest exact value.
    """
    assert actual.shape == exact.shape, f"{name}: {list(actual.shape)}, not {list(exact.shape)}"
    if not exact.numel():
        return
    eps = torch.finfo(native.dtype).eps * exact.abs().max().item()
    error = (actual.double() - exact).abs().max().item()
    budget = factor * ((native.double() - exact).abs().max().item() + eps)
    assert error <= budget, f"{name}: error {error:.2e} exceeds {budget:.2e}"  # NaN fails too


def assert_same_topk(result: Any, exact_scores: Tensor, *, name: str, tolerance: float) -> None:
    """A top-k is right if its rows are distinct, its scores are theirs, in order, and none better
    is left out.

    Args:
        result: Scores ``[B, k]`` and ids ``[B, k]``.
        exact_scores: ``[B, N]`` fp64, of every row; −inf where a row is no candidate.
        name: What failed, for the message.
        tolerance: Largest absolute error of a score.
    """
    scores, ids = result
    k = scores.shape[1]
    expected = exact_scores.topk(min(k, exact_scores.shape[1]), dim=1).values  # [B, <= k]
    found = int(torch.isfinite(expected).sum())
    present = ids >= 0
    assert int(present.sum()) == found, f"{name}: {int(present.sum())} neighbours, not {found}"
    assert (scores[~present] == -torch.inf).all(), f"{name}: a missing neighbour has a score"
    assert (ids[~present] == -1).all(), f"{name}: a missing neighbour has an id"
    for row, mine in zip(ids, present, strict=True):
        assert mine[: int(mine.sum())].all(), f"{name}: a gap among the neighbours"
        assert len(row[mine].unique()) == int(mine.sum()), f"{name}: a row twice"
    if not found:
        return
    theirs = exact_scores.gather(1, ids.clamp(min=0))[present]
    wrong = (scores[present].double() - theirs).abs().max().item()
    assert wrong <= tolerance, f"{name}: a score is off by {wrong:.2e}"
    best = expected[torch.isfinite(expected)]
    wrong = (scores[present].double() - best).abs().max().item()
    assert wrong <= tolerance, f"{name}: a better row was left out, by {wrong:.2e}"
    ordered = (scores[:, :-1] > scores[:, 1:]) | (
        (scores[:, :-1] == scores[:, 1:]) & ((ids[:, :-1] < ids[:, 1:]) | ~present[:, 1:])
    )
    assert ordered.all(), f"{name}: not in the order of (score, row)"
