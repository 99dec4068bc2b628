"""Arrays in, arrays of the same kind out: torch tensors, numpy arrays and DLPack objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.shared.types import ExactResult


def as_tensor(x: Any, name: str) -> Tensor:
    """``x`` as a tensor over the same memory; only the last axis is made contiguous, by a copy
    where it is not."""
    if isinstance(x, Tensor):
        tensor = x.detach()
    elif isinstance(x, np.ndarray):
        if not x.dtype.isnative or x.dtype.hasobject:
            raise TypeError(f"{name}: expected a native numeric dtype, got {x.dtype}")
        if any(s < 0 or s % x.itemsize for s in x.strides):
            x = np.ascontiguousarray(x)
        if (
            not x.flags.writeable
        ):  # torch warns that writing would be undefined; nothing here writes
            x = np.asarray(_Unlocked(x))
        try:
            tensor = torch.from_numpy(x)
        except TypeError:
            raise TypeError(f"{name}: expected a numeric dtype, got {x.dtype}") from None
    elif hasattr(x, "__dlpack__"):
        tensor = torch.from_dlpack(x)
    else:
        raise TypeError(
            f"{name}: expected a tensor, a numpy array or a DLPack object, got {type(x).__name__}"
        )
    return tensor if tensor.ndim == 0 or tensor.stride(-1) == 1 else tensor.contiguous()


class _Unlocked:
    """A read-only array's memory, as an array without the read-only flag."""

    def __init__(self, locked: np.ndarray):
        self.locked = locked  # keeps the memory alive
        interface = dict(locked.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def like(x: Any) -> Callable[[Tensor], Any]:
    """A function that turns a result tensor into the kind of array that ``x`` is, where it is."""
    if isinstance(x, Tensor):
        return lambda t: t.to(x.device)
    if isinstance(x, np.ndarray):
        return lambda t: t.cpu().numpy()
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__().from_dlpack
    return lambda t: t


def result_like(x: Any, result: Any, out: Any = None) -> Any:
    """A NamedTuple of tensors with each as the kind of array that ``x`` is, where it is; or, where
    there is one, as ``out``, a tuple of contiguous tensors or arrays of the same fields."""
    convert = like(x)
    found = map(convert, result) if out is None else _fill(out, result, as_tensor(x, "").device)
    converted = type(result)(*found)
    if isinstance(result, ExactResult):
        converted.rows_touched = convert(result.rows_touched)
    return converted


def _fill(out: Any, result: Any, device: torch.device) -> Any:
    targets = [as_tensor(x, f"out.{name}") for x, name in zip(out, result._fields, strict=True)]
    for name, target, source in zip(result._fields, targets, result, strict=True):
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(
                f"out.{name}: expected {list(source.shape)} {source.dtype}, "
                f"got {list(target.shape)} {target.dtype}"
            )
        if target.device != device:
            raise ValueError(f"out.{name}: expected one on {device}, got {target.device}")
    for target, source in zip(targets, result, strict=True):
        target.copy_(source)
    return out
