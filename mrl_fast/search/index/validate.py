"""What an index is handed, checked: each error names the argument, what was expected and what
came."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.shared.arrays import as_tensor
from mrl_fast.shared.checks import check_finite, check_matrix, check_stages
from mrl_fast.shared.dispatch import triton_is_interpreted

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
    checked = check_matrix(as_tensor(x, name), name)
    if checked.shape[1] != width:
        raise ValueError(f"{name}: expected width {width}, got {checked.shape[1]}")
    return checked


def vectors(x: Any, name: str, width: int) -> Tensor:
    """``[n, width]``, finite, on the CPU."""
    checked = matrix(x, name, width).cpu()
    check_finite(checked, name)
    return checked


def ids(x: Any) -> Tensor:
    """``[n]`` int64, on the CPU."""
    checked = as_tensor(x, "ids").cpu()
    if checked.dtype != torch.int64:
        raise TypeError(f"ids: expected int64, got {checked.dtype}")
    if checked.ndim != 1:
        raise ValueError(f"ids: expected shape [n], got {list(checked.shape)}")
    return checked


def new_ids(x: Any, count: int) -> Tensor:
    """``[count]`` int64, at least 0, none of them twice."""
    checked = ids(x)
    if len(checked) != count:
        raise ValueError(f"ids: expected shape [{count}], got {list(checked.shape)}")
    if count and checked.min() < 0:
        raise ValueError(f"ids: expected ids of at least 0, got {int(checked.min())}")
    if not bool((checked.diff() > 0).all()):
        values, counts = checked.unique(return_counts=True)
        if len(values) < count:
            raise ValueError(f"ids: expected none twice, got {int(values[counts > 1][0])} again")
    return checked


def allowed(x: Any, size: int) -> Tensor:
    """``[n]`` int64 or ``[size]`` bool."""
    checked = as_tensor(x, "allowed")
    if checked.dtype not in (torch.int64, torch.bool) or checked.ndim != 1:
        got = f"{list(checked.shape)} {checked.dtype}"
        raise TypeError(f"allowed: expected [n] int64 or [{size}] bool, got {got}")
    if checked.dtype == torch.bool and len(checked) != size:
        raise ValueError(f"allowed: expected a bool for each of {size} ids, got {len(checked)}")
    return checked


def stages(x: Any, dims: Sequence[int], k: int) -> list[tuple[int, int]]:
    """Stages by dims of the index, the last of which keeps k."""
    checked = list(check_stages(x))
    for i, (dim, _) in enumerate(checked):
        if dim not in dims:
            raise ValueError(f"stages[{i}] dim: expected one of {tuple(dims)}, got {dim}")
    if checked[-1][1] < k:
        raise ValueError(f"stages: expected a last keep of at least k={k}, got {checked[-1][1]}")
    return [*checked[:-1], (checked[-1][0], k)]


def number(x: Any, name: str) -> float:
    """Finite."""
    try:
        value = math.nan if isinstance(x, bool) else float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return value
