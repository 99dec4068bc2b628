"""Arrays in, arrays of the same kind out: torch tensors, numpy arrays and DLPack objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.shared.checks import check_dense


def as_tensor(x: Any, name: str) -> Tensor:
    """``x`` as a dense tensor over the same memory; only the last axis is made contiguous, by a
    copy where it is not."""
    if isinstance(x, Tensor):
        tensor = check_dense(x.detach(), name)
    elif isinstance(x, np.ndarray):
        tensor = _from_numpy(x, name)
    elif type(x).__module__.partition(".")[0] == "pyarrow":
        tensor = _from_numpy(_from_arrow(x, name), name)
    elif hasattr(x, "__dlpack__"):
        try:
            tensor = torch.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            kind = type(x).__name__
            raise TypeError(f"{name}: expected a DLPack object, got {kind}: {error}") from error
    else:
        raise TypeError(
            f"{name}: expected a tensor, a numpy array or a DLPack object, got {type(x).__name__}"
        )
    return tensor if tensor.ndim == 0 or tensor.stride(-1) == 1 else tensor.contiguous()


def _from_numpy(x: np.ndarray, name: str) -> Tensor:
    if not x.dtype.isnative or x.dtype.hasobject:
        raise TypeError(f"{name}: expected a native numeric dtype, got {x.dtype}")
    if any(s < 0 or s % x.itemsize for s in x.strides):
        x = np.ascontiguousarray(x)
    if not x.flags.writeable:  # torch warns that writing would be undefined; nothing here writes
        x = np.asarray(_Unlocked(x))
    try:
        return torch.from_numpy(x)
    except TypeError:
        raise TypeError(f"{name}: expected a numeric dtype, got {x.dtype}") from None


def _from_arrow(x: Any, name: str) -> np.ndarray:
    """A pyarrow array of numbers, ``[n]``, or of lists of one length, ``[n, D]``, over the same
    memory; a chunked one is copied together unless it is of one chunk."""
    import pyarrow as pa

    if isinstance(x, pa.ChunkedArray):
        x = x.chunk(0) if x.num_chunks == 1 else x.combine_chunks()
    if isinstance(x, pa.ExtensionArray):
        x = x.storage
    if not isinstance(x, pa.Array):
        raise TypeError(f"{name}: expected a pyarrow array, got {type(x).__name__}")
    values, shape = x, [len(x)]
    if pa.types.is_fixed_size_list(x.type):
        values, shape = x.flatten(), [len(x), x.type.list_size]
    if x.null_count or values.null_count:
        row = x.is_valid().index(False).as_py()
        row = values.is_valid().index(False).as_py() // shape[-1] if row < 0 else row
        raise ValueError(f"{name}: expected no nulls, got one in row {row}")
    try:
        return values.to_numpy(zero_copy_only=True).reshape(shape)
    except pa.ArrowException:
        raise TypeError(
            f"{name}: expected numbers or a FixedSizeListArray of them, got {x.type}"
        ) from None


class _Unlocked:
    """A read-only array's memory, as an array without the read-only flag."""

    def __init__(self, locked: np.ndarray):
        self.keepalive = locked
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
    """A NamedTuple of tensors as arrays of the kind and on the device of ``x``; or written to
    ``out``, a tuple of contiguous tensors or arrays of the same fields."""
    convert = like(x)
    found = map(convert, result) if out is None else _fill(out, result, as_tensor(x, "").device)
    converted = type(result)(*found)
    for name, value in getattr(result, "__dict__", {}).items():  # what it says beside its fields
        setattr(converted, name, convert(value) if isinstance(value, Tensor) else value)
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
