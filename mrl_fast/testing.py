"""Assertions for kernels: an error budget against fp64, and a top-k that knows ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.mv, aten.dot}
SUMS = {aten.sum, aten.mean, aten.linalg_vector_norm}
LOG_SUMS = {aten.logsumexp, aten._log_softmax}
# Of the others those round that PyTorch calls pointwise, and these, which it does not.
ELEMENTWISE = {
    aten.rsub, aten._softmax, aten.log_sigmoid_forward, aten.log_sigmoid_backward,
    aten._log_softmax_backward_data, aten._softmax_backward_data, aten.softplus_backward,
    aten.elu_backward, aten.prelu,
}  # fmt: skip
# Their results are inputs, their negatives, or whole numbers.
EXACT = {
    aten.abs, aten.neg, aten.positive, aten.sign, aten.sgn, aten.clone, aten.where,
    aten.masked_fill, aten.clamp, aten.clamp_min, aten.clamp_max, aten.maximum, aten.minimum,
    aten.relu, aten.hardtanh, aten.threshold_backward, aten.nan_to_num, aten.copysign, aten.floor,
    aten.ceil, aten.round, aten.trunc,
}  # fmt: skip
LANES = 16  # sums over an axis are at least so many shorter ones, as those of vector registers


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    native: Tensor,
    *,
    name: str,
    factor: float = 2.0,
    bound: Callable[[], Tensor] | None = None,
) -> None:
    """``|actual − exact|`` may exceed neither ``factor`` × the error PyTorch itself makes in this
    dtype nor, element by element, ``bound``: PyTorch's own may be small by the luck of its BLAS.

    Args:
        actual: The result under test.
        exact: The same in fp64.
        native: What plain PyTorch gives in the dtype of the inputs.
        name: What failed, for the message.
        factor: Of the native error, plus one rounding of the largest exact value.
        bound: Gives the arithmetic's own error of each element, see ``rounding_bounds``; called
            where PyTorch's error is exceeded.
    """
    assert actual.shape == exact.shape, f"{name}: {list(actual.shape)}, not {list(exact.shape)}"
    if not exact.numel():
        return
    lost = ~torch.isfinite(native) & torch.isfinite(exact)
    assert not lost.any(), (
        f"{name}: PyTorch's own result has NaN or infinity at {int(lost.sum())} of {lost.numel()} "
        "places where the exact one has none, which is no budget"
    )
    eps = torch.finfo(native.dtype).eps * exact.abs().max().item()
    error = (actual.double() - exact).abs()
    budget = factor * ((native.double() - exact).abs().max().item() + eps)
    if bound is not None and not (error <= budget).all():
        budget = torch.maximum(bound(), torch.full_like(error, budget))
    else:
        budget = torch.full_like(error, budget)
    excess, at = (error - budget).nan_to_num(torch.inf).flatten().max(0)  # NaN fails too
    error, budget = error.flatten()[at], budget.flatten()[at]
    assert excess <= 0, f"{name}: error {error:.2e} exceeds {budget:.2e}"


def rounding_bounds(run: Callable[[], Sequence[Tensor]], samples: int = 8) -> list[Tensor]:
    """How far fp32 may be from the results of ``run``, which computes in fp64, forward and
    backward: each of its products and sums moves, at random up or down, by the error that n
    roundings leave, √n · 2⁻²⁴ · Σ |terms|, and results by three times the root of the mean square.

    The same on every machine, whatever the order of its sums.

    Source: Higham and Mary 2019 (√n for n); Parker 1997 (Monte Carlo arithmetic).
    """
    exact = run()
    squares = [torch.zeros_like(e) for e in exact]
    for seed in range(samples):
        with _Rounded(seed):
            moved = run()
        for square, m, e in zip(squares, moved, exact, strict=True):
            square += (m - e).square() / samples
    return [3 * square.sqrt() for square in squares]


def _rounds(func: Any) -> bool:
    kind = func.overloadpacket
    pointwise = torch.Tag.pointwise in func.tags and kind not in EXACT
    known = pointwise or kind in PRODUCTS | SUMS | LOG_SUMS | ELEMENTWISE
    return known and not func._schema.is_mutable


class _Rounded(TorchDispatchMode):
    """Results of fp64 operations off by what fp32 might make of them."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        # views stay views, and memory that is written in place stays what it is
        if not _rounds(func) or first.dtype != torch.float64 or not first.numel():
            return out
        moved = first + self._error(func, first, args, kwargs)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    def _error(self, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
        kind = func.overloadpacket
        if kind in PRODUCTS or kind in SUMS:
            sizes = tree_map(lambda x: x.abs() if isinstance(x, Tensor) else x, args)
            terms = (
                args[-2].shape[-1] if kind in PRODUCTS else args[0].numel() / out.numel() / LANES
            )
            size = func(*sizes, **kwargs) * max(1.0, terms) ** 0.5
        elif kind in LOG_SUMS:
            x, axis = args[0], args[1]
            terms = x.shape[axis] if kind is aten._log_softmax else x.numel() / out.numel()
            size = out.abs() + max(1.0, terms / LANES) ** 0.5
        else:
            size = out.abs()
            if kind is aten._log_softmax_backward_data:  # p − 1 at a target
                size = size + args[0].abs()
        sign = torch.randint(0, 2, out.shape, generator=self.generator).mul(2).sub(1)
        return (2.0**-24 * size * sign.to(out.device)).nan_to_num(0.0, 0.0, 0.0)  # of −∞: none


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
