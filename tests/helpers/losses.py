"""One call of each loss, for properties that all of them share; and a judge of a loss's numbers."""

import os
from functools import cache, partial

import torch

from mrl_fast import (
    matryoshka_cross_entropy,
    matryoshka_distill,
    matryoshka_info_nce,
    matryoshka_logits,
    matryoshka_sigmoid_loss,
    matryoshka_spread_out,
)
from mrl_fast.testing import assert_within_budget, rounding_bounds

DIMS = (8, 12, 48)
SEED = int(os.environ.get("MRL_FAST_SEED", 0))  # other random problems than the usual ones


def generator(seed=0):
    return torch.Generator().manual_seed(seed + 1_000_003 * SEED)


def tensors(*shapes, seed=0, dtype=torch.float32):
    g = generator(seed)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


TARGET = torch.arange(19)
TEACHER = tuple(t.detach() for t in tensors((19, 60), (30, 60), seed=1))
BOTH_WAYS = ("query_to_doc", "doc_to_query")
ALL_WAYS = (*BOTH_WAYS, "query_to_query", "doc_to_doc")

# Functions of x [19, 48], w [30, 48] and impl.
LOSSES = {
    "cross_entropy": lambda x, w, impl=None: matryoshka_cross_entropy(
        x, w, TARGET, DIMS, label_smoothing=0.1, dim_weights=(1, 0.5, 2), impl=impl
    ).loss,
    "info_nce": lambda x, w, impl=None: matryoshka_info_nce(x, w, DIMS, impl=impl).loss,
    "dot": lambda x, w, impl=None: matryoshka_info_nce(
        x, w, DIMS, scale=0.1, normalize=False, impl=impl
    ).loss,
    "clip": lambda x, w, impl=None: matryoshka_info_nce(
        x, w, DIMS, directions=BOTH_WAYS, partition_mode="per_direction", impl=impl
    ).loss,
    "all": lambda x, w, impl=None: matryoshka_info_nce(
        x, [w[:19], w[:19].flip(0)], DIMS, hardness_mode="all_negatives", hardness_strength=5.0,
        directions=ALL_WAYS, impl=impl,
    ).loss,
    "sigmoid": lambda x, w, impl=None: matryoshka_sigmoid_loss(
        x, w, DIMS, scale=10.0, bias=-9.7, impl=impl
    ).loss,
    "distill": lambda x, w, impl=None: matryoshka_distill(
        (x, w), TEACHER, DIMS, temperature=0.1, impl=impl
    ).loss,
    "spread_out": lambda x, w, impl=None: matryoshka_spread_out(
        [x, w], DIMS, weights=(1.0, 20.0), impl=impl
    ).loss,
    "logits": lambda x, w, impl=None: matryoshka_logits(x, w, DIMS, impl=impl).square().mean(),
}  # fmt: skip


def judge(fused, plain, make, dtype=torch.float32):
    """Checks a loss, each prefix's loss and the gradients against the budget; in fp64, where only
    the reference runs, that they are close. Four problems are judged as one, as PyTorch's own error
    on a few numbers says little.

    Args:
        fused: Gives the NestedLoss under test, from the inputs.
        plain: Gives each prefix's loss, ``[G]``, by PyTorch's own ops, in the inputs' dtype.
        make: Gives a seed's inputs, all of which get gradients; or a pair of these and a list of
            tensors that both functions take as ``given``.
        dtype: The dtype of the inputs under test.
    """

    def run(loss, dtype, seed):
        made, extra = make(seed), {}
        if isinstance(made[0], list):
            made, given = made
            extra["given"] = [t.to(dtype) for t in given]
        leaves = [t.to(dtype).requires_grad_() for t in made]
        out = loss(*leaves, **extra)
        total, per_dim = (out.sum(), out) if isinstance(out, torch.Tensor) else out
        values = torch.cat([total.detach().reshape(1), per_dim.detach()])
        return [values, *torch.autograd.grad(total, leaves)]

    def joined(loss, dtype):
        runs = [run(loss, dtype, seed) for seed in range(4)]
        return [torch.cat([r.reshape(-1) for r in rs]) for rs in zip(*runs, strict=True)]

    exact, actual = joined(plain, torch.float64), joined(fused, dtype)
    if dtype == torch.float64:
        return torch.testing.assert_close(actual, exact)
    bounds = cache(lambda: rounding_bounds(lambda: joined(plain, torch.float64)))
    for i, (a, e, n) in enumerate(zip(actual, exact, joined(plain, dtype), strict=True)):
        bound = partial(lambda i: bounds()[i], i)
        assert_within_budget(a, e, n, name=f"result {i}", bound=bound)
