"""Vectors, labels and ids as tensors, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.shared.arrays import as_integers, as_vectors
from mrl_fast.shared.checks import (
    check_dims,
    check_finite,
    check_same_device,
    check_vector,
    dtype_name,
)


def checked_vectors(
    queries: Any,
    database: Any,
    dims: Sequence[int],
    names: tuple[str, str] = ("queries", "database"),
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Two sets of finite vectors of one width, dtype and device, neither of them empty; and the
    dims, in any order."""
    q, x = (as_vectors(y, name) for y, name in zip((queries, database), names, strict=True))
    for y, name in zip((q, x), names, strict=True):
        if not len(y):
            raise ValueError(f"{name}: expected at least one row, got none")
        check_finite(y, name)
    name = names[1]
    check_same_device(x, name, q)
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected {q.dtype} as {names[0]}, got {dtype_name(database)}")
    if x.shape[1] != q.shape[1]:
        raise ValueError(f"{name}: expected width {q.shape[1]} as {names[0]}, got {x.shape[1]}")
    return q, x, check_dims(dims, q.shape[1], ascending=False)


def numbered(labels: dict[str, Any]) -> list[Any]:
    """Labels by their names; strings, if all of them are, as numbers in the strings' order."""
    strings = {name: _strings(x) for name, x in labels.items()}
    known = [x for x in strings.values() if x is not None]
    if not known:
        return [*labels.values()]
    for name, x in strings.items():
        if x is None:
            got = dtype_name(labels[name])
            raise TypeError(f"{name}: expected strings, as other labels are, got {got}")
    every = np.concatenate([x.ravel() for x in known])
    numbers = np.unique(every, return_inverse=True)[1].ravel()
    parts = np.split(numbers, np.cumsum([x.size for x in known])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, known, strict=True)]


def _strings(x: Any) -> np.ndarray | None:
    """An array, a Series or a list of strings, or of rows of them; None where x is of others."""
    x = x.to_numpy() if hasattr(x, "to_numpy") else x
    first = x
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, str) and not isinstance(x, str):
        x = np.array(x, dtype=object)
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "OTU":  # T: numpy's own strings
        return None
    return x.astype(str) if x.size and all(isinstance(value, str) for value in x.flat) else None


def checked_labels(x: Any, name: str, size: int | None, like: Tensor) -> Tensor:
    """``[size]`` int64 from 0 on, on ``like``'s device; of any size but 0 where that is None."""
    labels = as_integers(x, name)
    if not isinstance(x, Tensor):
        labels = labels.to(like.device)
    size = labels.numel() if size is None else size
    check_vector(labels, name, size, like, dtype=torch.int64)
    if not size:
        raise ValueError(f"{name}: expected at least one label, got none")
    if (least := int(labels.min())) < 0:
        raise ValueError(f"{name}: expected labels from 0 on, got {least}")
    return labels


def arange(begin: int, end: int, like: Tensor) -> Tensor:
    """``[end - begin]`` int64 on ``like``'s device."""
    return torch.arange(begin, end, dtype=torch.int64, device=like.device)
