"""Arrays in, arrays of the same kind out: tensors, numpy arrays and DLPack objects; and lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.shared.checks import FLOATS, check_dense, check_int, check_matrix, dtype_name
from mrl_fast.shared.memory import HOST

LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1  # of int64
NO_INTEGERS = (torch.bool, torch.complex64, torch.complex128)


def as_tensor(x: Any, name: str) -> Tensor:
    """``x`` as a dense tensor over the same memory; only the last axis is made contiguous, by a
    copy where it is not."""
    if isinstance(x, Tensor):
        tensor = check_dense(x.detach(), name)
    elif isinstance(x, np.ndarray):
        tensor = _from_numpy(x, name, x)
    elif _is_arrow(x):
        tensor = _from_numpy(_from_arrow(x, name), name, x)
    elif hasattr(x, "to_numpy") and not hasattr(x, "__dlpack__"):
        tensor = _from_numpy(x.to_numpy(), name, x)  # of pandas
    elif hasattr(x, "__dlpack__"):
        try:
            tensor = torch.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            kind = type(x).__name__
            raise TypeError(f"{name}: expected a DLPack object, got {kind}: {error}") from error
    else:
        raise TypeError(
            f"{name}: expected a tensor, a numpy array, a pandas Series, a pyarrow array, another "
            f"DLPack object or a list of numbers, got {type(x).__name__}"
        )
    return tensor if tensor.ndim == 0 or tensor.stride(-1) == 1 else tensor.contiguous()


def as_vectors(
    x: Any, name: str, dtypes: tuple[torch.dtype, ...] = FLOATS, *, one: bool = False
) -> Tensor:
    """``[n, D]`` of one of the dtypes: an array, or a list of rows, which are arrays or lists of
    numbers; these become fp32. Where ``one`` is set, a single vector ``[D]`` becomes ``[1, D]``."""
    tensor = _of_rows(x, name) if isinstance(x, (list, tuple)) else as_tensor(x, name)
    return check_matrix(tensor[None] if one and tensor.ndim == 1 else tensor, name, dtypes, given=x)


def _of_rows(x: Sequence[Any], name: str) -> Tensor:
    try:
        if any(isinstance(row, (Tensor, np.ndarray)) for row in x):
            return torch.stack([as_tensor(row, name) for row in x])
        numbers = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected rows of one width, got {error}") from None
    if numbers.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected numbers, got {dtype_name(_innermost(x))}")
    vectors = torch.from_numpy(numbers.astype(np.float64)).float()
    whole = numbers.dtype.kind != "f" and numbers.size  # fp64 holds these up to 2^53
    large = whole and max(-int(numbers.min()), int(numbers.max())) > 1 << 53
    if whole and (large or not np.array_equal(vectors.numpy(), numbers)):
        raise ValueError(f"{name}: expected integers that float32 holds, got larger ones")
    return vectors


def _innermost(x: Sequence[Any]) -> Sequence[Any]:
    """The first of nested lists that holds no lists."""
    while x and isinstance(x[0], (list, tuple)):
        x = x[0]
    return x


def as_numbers(x: Any, name: str) -> Tensor:
    """An array, a Series or a number; or a list or a range of integers or of bools, or of rows of
    them."""
    if isinstance(x, (int, np.generic)):
        x = np.asarray(x)
    if not isinstance(x, (list, tuple, range)):
        return as_tensor(x, name)
    kinds = set(map(type, x))
    if kinds <= {bool, np.bool_} and kinds:
        return torch.from_numpy(np.asarray(x))
    if kinds <= {int}:
        try:
            return torch.from_numpy(np.asarray(x, np.int64))
        except OverflowError:
            pass  # which one, is said below
    if any(hasattr(row, "__len__") and not isinstance(row, str) for row in x):
        rows = [as_integers(row, f"{name}[{i}]") for i, row in enumerate(x)]
        if shapes := [list(row.shape) for row in rows if row.shape != rows[0].shape]:
            raise ValueError(
                f"{name}: expected rows of one shape, got {list(rows[0].shape)} and {shapes[0]}"
            )
        return torch.stack(rows)
    numbers = [check_int(number, f"{name}[{i}]", LOWEST, HIGHEST) for i, number in enumerate(x)]
    return torch.from_numpy(np.asarray(numbers, np.int64))


def as_integers(x: Any, name: str) -> Tensor:
    """int64, wherever they are: integers of any width, in what ``as_numbers`` takes."""
    numbers = as_numbers(x, name)
    if numbers.dtype.is_floating_point or numbers.dtype in NO_INTEGERS:
        raise TypeError(f"{name}: expected integers, got {dtype_name(x)}")
    integers = numbers.to(torch.int64)
    if numbers.dtype == torch.uint64 and bool((integers < 0).any()):
        number = int(integers[integers < 0].ravel()[0]) + (1 << 64)
        raise ValueError(f"{name}: expected integers below 2^63, got {number} ({dtype_name(x)})")
    return integers


def _is_arrow(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "pyarrow"


def _from_numpy(x: np.ndarray, name: str, given: Any) -> Tensor:
    if not x.dtype.isnative or x.dtype.hasobject:
        raise TypeError(f"{name}: expected a native numeric dtype, got {dtype_name(given)}")
    if any(s < 0 or s % x.itemsize for s in x.strides):
        x = np.ascontiguousarray(x)
    if not x.flags.writeable:  # torch warns that writing would be undefined; nothing here writes
        x = np.asarray(_Unlocked(x))
    try:
        return torch.from_numpy(x)
    except TypeError:
        raise TypeError(f"{name}: expected a numeric dtype, got {dtype_name(given)}") from None


def _from_arrow(x: Any, name: str) -> np.ndarray:
    """A pyarrow array of numbers, ``[n]``, or of lists of one length, ``[n, D]``, over the same
    memory; a chunked one is copied into one piece unless it has a single chunk."""
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
        return lambda t: t if t.device == x.device else t.to(x.device)
    if isinstance(x, np.ndarray):
        return lambda t: t.cpu().numpy()
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__().from_dlpack
    return lambda t: t


def result_like(x: Any, result: Any, out: Any = None) -> Any:
    """A NamedTuple of tensors as arrays of the kind and on the device of ``x``; or written to
    ``out``, a tuple of contiguous tensors or arrays of the same fields."""
    convert = like(x)
    found = map(convert, result) if out is None else _fill(out, result, _place(x))
    converted = type(result)(*found)
    for name, value in getattr(result, "__dict__", {}).items():  # what it says beside its fields
        setattr(converted, name, convert(value) if isinstance(value, Tensor) else value)
    return converted


def _place(x: Any) -> torch.device:
    return HOST if isinstance(x, (list, tuple)) else as_tensor(x, "").device


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
