"""What an index is handed, checked: each error names the argument, what was expected and what
came."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.shared.arrays import as_tensor
from mrl_fast.shared.checks import (
    check_finite,
    check_int,
    check_matrix,
    dtype_name,
)
from mrl_fast.shared.dispatch import triton_is_interpreted
from mrl_fast.shared.memory import HOST

NARROWEST = 64  # of dims that nobody named
NO_IDS = (torch.bool, torch.complex64, torch.complex128)
LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1  # of int64


def device(x: Any) -> str:
    """``"cpu"``, ``"cuda"`` or ``"cuda:<number>"``, where kernels can run."""
    if isinstance(x, torch.device):
        x = str(x)
    if not isinstance(x, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", x):
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:<number>', got {x!r}")
    if x == "cpu":
        return x
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"device: {x!r} needs the triton package, which is not installed")
    number = int(x.partition(":")[2] or 0)
    if not triton_is_interpreted() and number >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {x!r} "
            "(without one, set TRITON_INTERPRET=1 before the first import of triton)"
        )
    return x


def default_dims(width: int) -> tuple[int, ...]:
    """A width and its halves down to 64: 768 is (96, 192, 384, 768)."""
    dims = [width]
    while dims[0] // 2 >= NARROWEST:
        dims.insert(0, dims[0] // 2)
    return tuple(dims)


def matrix(x: Any, name: str, width: int) -> Tensor:
    """``[n, width]``, floating point."""
    checked = check_matrix(as_tensor(x, name), name, given=x)
    if checked.shape[1] != width:
        raise ValueError(f"{name}: expected width {width}, got {checked.shape[1]}")
    if checked.is_meta:
        raise ValueError(f"{name}: expected values, got a tensor on meta")
    return checked


def vectors(x: Any, name: str, width: int) -> Tensor:
    """``[n, width]``, finite, on the CPU."""
    checked = matrix(x, name, width).cpu()
    check_finite(checked, name)
    return checked


def ids(x: Any, name: str = "ids") -> Tensor:
    """``[n]`` int64, on the CPU: of integers of any width, in an array, a list, a range or a pandas
    Series, or of a single one."""
    return _as_ids(_numbers(x, name), x, name)


def _as_ids(numbers: Tensor, given: Any, name: str) -> Tensor:
    kind = dtype_name(given)
    if numbers.dtype.is_floating_point or numbers.dtype in NO_IDS:
        raise TypeError(f"{name}: expected integers, got {kind}")
    if numbers.ndim > 1:
        raise ValueError(f"{name}: expected shape [n], got {list(numbers.shape)}")
    checked = numbers.to(HOST, torch.int64).reshape(-1)
    if numbers.dtype == torch.uint64 and bool((checked < 0).any()):
        number = int(checked[checked < 0][0]) + (1 << 64)
        raise ValueError(f"{name}: expected ids below 2^63, got {number} ({kind})")
    return checked


def _numbers(x: Any, name: str) -> Tensor:
    """What an array, a list, a range, a Series or a number holds, as a tensor."""
    if isinstance(x, (int, np.generic)):
        x = np.asarray(x)
    elif isinstance(x, (list, tuple, range)):
        x = _listed(x, name)
    elif hasattr(x, "to_numpy") and not hasattr(x, "__dlpack__"):
        x = x.to_numpy()
    return as_tensor(x, name)


def _listed(x: Sequence[Any], name: str) -> np.ndarray:
    kinds = set(map(type, x))
    if kinds <= {bool, np.bool_} and kinds:
        return np.asarray(x)
    if kinds <= {int}:
        try:
            return np.asarray(x, np.int64)
        except OverflowError:
            pass  # which one, is said below
    numbers = [check_int(number, f"{name}[{i}]", LOWEST, HIGHEST) for i, number in enumerate(x)]
    return np.asarray(numbers, np.int64)


def new_ids(x: Any, count: int) -> Tensor:
    """``[count]`` int64, at least 0, none of them twice."""
    checked = ids(x)
    if len(checked) != count:
        raise ValueError(f"ids: expected shape [{count}], got {list(checked.shape)}")
    if count and checked.min() < 0:
        raise ValueError(
            f"ids: expected ids of at least 0, got {int(checked.min())} ({dtype_name(x)})"
        )
    if not bool((checked.diff() > 0).all()):
        values, counts = checked.unique(return_counts=True)
        if len(values) < count:
            raise ValueError(f"ids: expected none twice, got {int(values[counts > 1][0])} again")
    return checked


def allowed(x: Any, size: int) -> Tensor | None:
    """``[n]`` int64, or ``[size]`` bool wherever it is; None is all."""
    if x is None:
        return None
    numbers = _numbers(x, "allowed")
    if numbers.dtype != torch.bool:
        return _as_ids(numbers, x, "allowed")
    if numbers.shape != (size,):
        got = list(numbers.shape)
        raise ValueError(f"allowed: expected a bool for each of {size} ids, got shape {got}")
    return numbers


def number(x: Any, name: str) -> float:
    """Finite."""
    try:
        value = math.nan if isinstance(x, bool) else float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return value
