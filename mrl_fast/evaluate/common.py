"""Checks of vectors and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.shared.checks import (
    check_dims,
    check_finite,
    check_matrix,
    check_same_device,
    check_vector,
)


def check_vectors(
    queries: Tensor,
    database: Tensor,
    dims: Sequence[int],
    names: tuple[str, str] = ("queries", "database"),
) -> tuple[int, ...]:
    """The dims, of two sets of finite vectors of one width, dtype and device; neither is empty."""
    for x, name in zip((queries, database), names, strict=True):
        if not len(check_matrix(x, name)):
            raise ValueError(f"{name}: expected at least one row, got none")
        check_finite(x, name)
    name = names[1]
    check_same_device(database, name, queries)
    if database.dtype != queries.dtype:
        raise TypeError(f"{name}: expected {queries.dtype} as {names[0]}, got {database.dtype}")
    if database.shape[1] != queries.shape[1]:
        raise ValueError(
            f"{name}: expected width {queries.shape[1]} as {names[0]}, got {database.shape[1]}"
        )
    return check_dims(dims, queries.shape[1])


def check_labels(labels: Any, name: str, size: int | None, like: Tensor) -> int:
    """The size of labels ``[size]`` int64 from 0 on, on ``like``'s device; None is any but 0."""
    if size is None:
        size = labels.numel() if isinstance(labels, Tensor) else 0
    check_vector(labels, name, size, like, dtype=torch.int64)
    if not size:
        raise ValueError(f"{name}: expected at least one label, got none")
    if (least := int(labels.min())) < 0:
        raise ValueError(f"{name}: expected labels from 0 on, got {least}")
    return size


def kind(x: Any) -> str:
    """What came, where a tensor was expected."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def arange(begin: int, end: int, like: Tensor) -> Tensor:
    """``[end - begin]`` int64 on ``like``'s device."""
    return torch.arange(begin, end, dtype=torch.int64, device=like.device)
