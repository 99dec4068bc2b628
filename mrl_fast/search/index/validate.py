"""What an index is handed, checked: each error names the argument, what was expected and what
came."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Collection, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.shared.arrays import as_integers, as_numbers, as_vectors
from mrl_fast.shared.checks import check_finite, dtype_name
from mrl_fast.shared.dispatch import triton_is_interpreted
from mrl_fast.shared.memory import HOST
from mrl_fast.shared.native import METRICS

NARROWEST = 64  # of dims that nobody named


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
    checked = valued(as_vectors(x, name), name)
    if checked.shape[1] != width:
        raise ValueError(f"{name}: expected width {width}, got {checked.shape[1]}")
    return checked


def valued(x: Tensor, name: str) -> Tensor:
    if x.is_meta:
        raise ValueError(f"{name}: expected values, got a tensor on meta")
    return x


def vectors(x: Any, name: str, width: int) -> Tensor:
    """``[n, width]``, finite, on the CPU."""
    checked = matrix(x, name, width).cpu()
    check_finite(checked, name)
    return checked


def ids(x: Any, name: str = "ids") -> Tensor:
    """``[n]`` int64, on the CPU: of integers of any width, in an array, a list, a range or a pandas
    Series or another collection, or of a single one."""
    return _of_ids(as_integers(_listed(x, name), name), name)


def _listed(x: Any, name: str) -> Any:
    """Arrays of objects and collections that are no arrays as lists, anything else as it is."""
    kind = getattr(getattr(x, "dtype", None), "kind", None)
    if isinstance(x, np.ndarray) and x.shape == (0,) and kind == "f":
        return []  # which numpy makes fp64
    values = x
    if isinstance(x, (str, bytes)):
        values = [x]
    elif kind in ("O", "U", "S"):
        values = np.ravel(x).tolist() if np.ndim(x) < 2 else np.asarray(x).tolist()
    elif isinstance(x, Collection) and not isinstance(x, (range, Mapping)):
        has_own_form = any(hasattr(x, own) for own in ("dtype", "to_numpy", "__dlpack__"))
        values = x if has_own_form or isinstance(x, (list, tuple)) else list(x)
    if isinstance(values, (list, tuple)):
        if any(issubclass(kind, (str, bytes)) for kind in set(map(type, values))):
            raise TypeError(
                f"{name}: expected integers, got {dtype_name(x)}: ids are integers: keep a table "
                "of your own from strings to them"
            )
    return values


def _of_ids(x: Tensor, name: str) -> Tensor:
    if x.ndim > 1:
        raise ValueError(f"{name}: expected shape [n], got {list(x.shape)}")
    return x.to(HOST).reshape(-1)


def new_ids(x: Any, count: int) -> Tensor:
    """``[count]`` int64, at least 0, none of them twice."""
    if isinstance(x, Set):
        raise TypeError(f"ids: expected them in the order of the vectors, got {type(x).__name__}")
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
    values = _listed(x, "allowed")
    numbers = as_numbers(values, "allowed")
    if numbers.dtype not in (torch.bool, torch.uint8):
        listed = _of_ids(as_integers(values, "allowed"), "allowed")
        if len(listed) == size > 2 and bool(((listed == 0) | (listed == 1)).all()):
            raise ValueError(
                f"allowed: expected ids, or a mask as bool or uint8, got {size} of 0 and 1 "
                f"({dtype_name(x)}), which looks like a mask: give it as bool or uint8"
            )
        return listed
    if numbers.shape != (size,):
        kind = "bool" if numbers.dtype == torch.bool else "0 or 1, as uint8 is a mask,"
        got = list(numbers.shape)
        raise ValueError(f"allowed: expected a {kind} for each of {size} ids, got shape {got}")
    if numbers.dtype == torch.uint8 and bool((numbers > 1).any()):
        raise ValueError(
            f"allowed: expected 0 or 1 in a mask of {dtype_name(x)}, got {int(numbers.max())} "
            "(ids are of another dtype)"
        )
    return numbers.bool()


def threshold(x: Any, metric: str) -> float:
    """A score of the metric."""
    value = number(x, "threshold")
    if value > 0 and METRICS[metric].differences:
        raise ValueError(
            f"threshold: expected at most 0, as scores of {metric!r} are −squared distance "
            f"(−r² for what lies within r), got {x}"
        )
    return value


def check_order(ids: Any, vectors: Any) -> None:
    """Raises where vectors came first."""
    if getattr(ids, "ndim", 1) == 2 and getattr(vectors, "ndim", 1) < 2:
        raise TypeError("ids: expected update(ids, vectors), got the vectors first")


def number(x: Any, name: str) -> float:
    """Finite."""
    try:
        value = math.nan if isinstance(x, bool) else float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return value
