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
    *,
    searched: bool = False,
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Two sets of finite vectors of one width, dtype and device, neither of them empty; and the
    dims, in any order. Two dtypes become fp32. What is ``searched`` may be wider than the queries,
    and is cut, and a query may be a vector ``[D]``."""
    q, x = as_vectors(queries, names[0], one=searched), as_vectors(database, names[1])
    for y, name in zip((q, x), names, strict=True):
        if not len(y):
            raise ValueError(f"{name}: expected at least one row, got none")
        check_finite(y, name)
    name = names[1]
    check_same_device(x, name, q)
    if x.dtype != q.dtype:
        q, x = q.float(), x.float()
    if searched and x.shape[1] > q.shape[1]:
        x = x[:, : q.shape[1]]
    if x.shape[1] != q.shape[1]:
        raise ValueError(f"{name}: expected width {q.shape[1]} as {names[0]}, got {x.shape[1]}")
    return q, x, check_dims(dims, q.shape[1], ascending=False)


def numbered(labels: dict[str, Any]) -> list[Any]:
    """Labels by their names; strings, if all of them are, as numbers in the strings' order, and
    bools as 0 and 1."""
    labels = {name: _listed(x) for name, x in labels.items()}
    strings = {name: _strings(x) for name, x in labels.items()}
    known = [x for x in strings.values() if x is not None]
    if not known:
        return [_unbooled(x) for x in labels.values()]
    for name, x in strings.items():
        if x is None:
            got = dtype_name(labels[name])
            raise TypeError(f"{name}: expected strings, as other labels are, got {got}")
    every = np.concatenate([x.ravel() for x in known])
    numbers = np.unique(every, return_inverse=True)[1].ravel()
    parts = np.split(numbers, np.cumsum([x.size for x in known])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, known, strict=True)]


def _listed(x: Any) -> Any:
    """A list of what is a sequence and no array, as a column of ``datasets`` is."""
    known = isinstance(x, (list, tuple, range, str, bytes)) or hasattr(x, "dtype")
    return list(x) if isinstance(x, Sequence) and not known else x


def _unbooled(x: Any) -> Any:
    if getattr(x, "dtype", None) in (torch.bool, np.dtype(bool)):
        return x.long() if isinstance(x, Tensor) else np.asarray(x, np.int64)
    if isinstance(x, (list, tuple)) and x and {*map(type, x)} <= {bool, np.bool_}:
        return [*map(int, x)]
    return x


def _strings(x: Any) -> np.ndarray | None:
    """An array, a Series or a list of strings, or of rows of them; None where x is of others.
    Bytes are UTF-8."""
    x = x.to_numpy() if hasattr(x, "to_numpy") else x
    first = x
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, (str, bytes)) and not isinstance(x, (str, bytes)):
        x = np.array(x, dtype=object)
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "OSTU":  # T: numpy's own strings
        return None
    if x.size and all(isinstance(value, bytes) for value in x.flat):
        return np.char.decode(x.astype(bytes), "utf-8", "surrogateescape")  # no byte is lost
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
