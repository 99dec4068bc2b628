"""Rows of int8 codes: each begins with the fp32 scale that a code of it is multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor

from mrl_fast.shared.native import SCALE_BYTES

CODED = torch.int8  # the dtype of rows that are scaled


def header(dtype: torch.dtype) -> int:
    """How many elements of a stored row come before its columns."""
    return SCALE_BYTES if dtype == CODED else 0


def values_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the values that stored rows stand for."""
    return torch.float32 if dtype == CODED else dtype


def values(rows: Tensor) -> Tensor:
    """What stored rows, ``[n, columns + header]``, stand for: ``[n, columns]``, fp32 where they
    are codes."""
    if rows.dtype != CODED:
        return rows
    # A copy, as scales lie at any byte.
    scales = rows[:, :SCALE_BYTES].clone(memory_format=torch.contiguous_format)
    return rows[:, SCALE_BYTES:].float() * scales.view(torch.float32)
