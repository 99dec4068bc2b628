"""Vectors for the tests of kernels."""

import torch
from mrl_fast.kernels.search import METRICS

__all__ = ["DTYPES", "METRICS", "make_vectors"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


def make_vectors(rows, width, device, *, seed=0, dtype=torch.float32):
    """A slice of a wider matrix, so that strides are real."""
    wide = torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(seed))
    return wide.to(device, dtype)[:, :width]
