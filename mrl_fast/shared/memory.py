"""Tensors for native code: dtype and device are named, whatever torch's defaults are at the time.

``torch.set_default_dtype`` and ``torch.device(...)`` contexts change what a plain ``torch.empty``
makes, in other threads too; C++ would read fp32 from it all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HOST = torch.device("cpu")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=HOST)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=HOST)


def full(shape: tuple[int, ...], value: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=HOST)


def arange(begin: int, end: int) -> Tensor:
    """``[end - begin]`` int64."""
    return torch.arange(begin, end, dtype=torch.int64, device=HOST)


def lasting(*shape: int, dtype: torch.dtype) -> Tensor:
    """As ``empty``, for tensors that outlive the call: they can be written to later, even if made
    under ``torch.inference_mode``."""
    with torch.inference_mode(False):
        return empty(*shape, dtype=dtype)


def address(x: Tensor | None, dtype: torch.dtype) -> int:
    """The address of x for native code, 0 for None. The last axis is contiguous; the caller passes
    other strides on.

    Raises:
        TypeError: x is not what native code takes it for; a bug here, never the user's fault.
    """
    if x is None:
        return 0
    if x.dtype is not dtype or not x.is_cpu or x.layout is not torch.strided:
        raise TypeError(f"expected {dtype} on the CPU, got {x.dtype} on {x.device}, {x.layout}")
    if x.ndim and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise TypeError(f"expected a contiguous last axis, got strides {x.stride()}")
    return x.data_ptr()
