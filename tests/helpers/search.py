"""The metrics that there are, and search by brute force, as the specification scores it."""

import torch

from mrl_fast.search.reference import SCORES
from mrl_fast.shared.checks import METRICS
from mrl_fast.shared.dispatch import module_of

__all__ = ["METRICS", "RUNS", "brute_force", "held", "metrics_of"]


def metrics_of(impl):
    return module_of(impl, "search").METRICS


# Without a GPU, Triton runs in its interpreter.
RUNS = [(impl, metric) for impl in ("cpp", "triton") for metric in metrics_of(impl)]


def held(x, dtype):
    """What an index of that dtype keeps of vectors, fp32."""
    if dtype != "int8":
        return x.to(getattr(torch, dtype)).float()
    largest = x.float().abs().amax(dim=1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # 127 / x would be 127 · (1 / x)
    codes = (x.float() * inverse.where(largest > 0, 0)).round()
    return codes * (largest / 127)


def brute_force(q, x, metric):
    """Scores ``[B, N]`` in fp64. Equal rows have scores of the same bits, wherever they stand."""
    distinct, which = torch.unique(x.double(), dim=0, return_inverse=True)
    return SCORES[metric](q.double(), distinct)[:, which]
