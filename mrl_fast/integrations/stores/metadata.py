"""Metadata as JSON holds them, checked when they come in: nothing is found out only at a save."""

from __future__ import annotations

import math
from datetime import date, time
from typing import Any

import numpy as np

CONVERTED = "biufUO"  # numpy's kinds of dtypes whose values are Python's


def plain_metadata(metadata: Any, owner: str) -> dict[str, Any]:
    """A copy that JSON gives back as it is: numpy's numbers and arrays, and tuples, become Python's
    numbers and lists.

    Args:
        owner: Whose metadata these are, for errors: ``"document 'id1'"``.

    Raises:
        ValueError: No dict; NaN or infinity, keys other than text, dates and other objects. Names
            the owner and the key.
    """
    name = f"{owner}: metadata"
    if not isinstance(metadata, dict):
        raise ValueError(f"{name}: expected a dict, got {type(metadata).__name__}")
    try:
        return plain(metadata, name)
    except RecursionError:
        raise ValueError(f"{name}: expected fewer levels of lists and dicts") from None


def plain(value: Any, name: str) -> Any:
    """A value of metadata as JSON gives it back; ``name`` is its place, for errors."""
    if isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in CONVERTED:
        value = value.tolist()
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"{name}: expected a number that JSON can hold, got {value}; None says that there "
                "is none"
            )
        return value
    if isinstance(value, (list, tuple)):
        return [plain(one, f"{name}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{name}: expected keys of text, got {key!r}")
        return {key: plain(one, f"{name}[{key!r}]") for key, one in value.items()}
    advice = "; its isoformat() is text" if isinstance(value, (date, time)) else ""
    raise ValueError(
        f"{name}: expected what JSON can hold (text, numbers, bool, None, lists, dicts), got "
        f"{type(value).__name__}{advice}"
    )


def names_of(ids: Any) -> list[str]:
    """Ids as text: the digits of integers, ``""`` for None.

    Args:
        ids: A list, array, Series or range.

    Raises:
        TypeError: One text instead of several; an id of another kind.
    """
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"ids: expected a list of ids, got one {type(ids).__name__}: {ids!r}")
    return [_name(one, f"ids[{i}]") for i, one in enumerate(ids)]


def _name(one: Any, place: str) -> str:
    if one is None or isinstance(one, str):
        return one or ""
    if isinstance(one, (int, np.integer)) and not isinstance(one, bool):
        return str(int(one))
    raise TypeError(f"{place}: expected text or an integer, got {type(one).__name__}")
