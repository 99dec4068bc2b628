"""Filters of metadata as LangChain's FAISS store has them, asked of a document."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from langchain_core.documents import Document

from mrl_fast.integrations.stores.metadata import plain

Filter = dict[str, Any] | Callable[[Document], bool]
Test = Callable[[dict[str, Any]], bool]  # of a document's metadata

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$neq": operator.ne,
    "$gt": operator.gt,
    "$lt": operator.lt,
    "$gte": operator.ge,
    "$lte": operator.le,
    "$in": lambda has, values: has in values,
    "$nin": lambda has, values: has not in values,
}
JOINS = {"$and": all, "$or": any}


def keep_of(filter: Filter | None) -> Callable[[Document], bool] | None:
    """Which documents to search; None: all.

    Raises:
        TypeError, ValueError: Neither a dict nor a function; an operator that there is not.
    """
    if filter is None or callable(filter):
        return filter
    test = _test(filter, "filter")
    return lambda document: test(document.metadata)


def _test(filter: Any, name: str) -> Test:
    """All of a dict's conditions."""
    if not isinstance(filter, dict):
        wanted = "a dict or a function of a Document" if name == "filter" else "a dict"
        raise TypeError(f"{name}: expected {wanted}, got {type(filter).__name__}")
    tests = [_condition(key, value, f"{name}[{key!r}]") for key, value in filter.items()]
    return lambda metadata: all(test(metadata) for test in tests)


def _condition(key: Any, value: Any, name: str) -> Test:
    if key in JOINS:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name}: expected a list of filters, got {type(value).__name__}")
        join, tests = JOINS[key], [_test(one, f"{name}[{i}]") for i, one in enumerate(value)]
        return lambda metadata: join(test(metadata) for test in tests)
    if key == "$not":
        inner = _test(value, name)
        return lambda metadata: not inner(metadata)
    if str(key).startswith("$"):
        raise ValueError(f"{name}: expected one of {', '.join(JOINS)}, $not, got {key!r}")
    if isinstance(value, dict) and any(str(one).startswith("$") for one in value):
        compared = [_comparison(key, one, wanted, name) for one, wanted in value.items()]
        return lambda metadata: all(test(metadata) for test in compared)
    wanted = _wanted(value, name)
    if isinstance(wanted, list):  # one of them; or the list itself, where metadata hold one
        return lambda metadata: (
            key in metadata and (metadata[key] in wanted or metadata[key] == wanted)
        )
    return lambda metadata: key in metadata and metadata[key] == wanted


def _comparison(key: str, sign: str, value: Any, name: str) -> Test:
    """Values of kinds that cannot be compared, such as a number and text, or a number and a key
    that is missing, are neither less nor greater."""
    if sign not in COMPARISONS:
        raise ValueError(f"{name}: expected one of {', '.join(COMPARISONS)}, got {sign!r}")
    compare, wanted = COMPARISONS[sign], _wanted(value, f"{name}[{sign!r}]")
    if sign in ("$in", "$nin") and not isinstance(wanted, list):
        raise TypeError(f"{name}[{sign!r}]: expected a list, got {type(wanted).__name__}")

    def test(metadata: dict[str, Any]) -> bool:
        try:
            return compare(metadata.get(key), wanted)
        except TypeError:
            return False

    return test


def _wanted(value: Any, name: str) -> Any:
    """As metadata would hold it; anything else would silently find nothing."""
    return plain(list(value) if isinstance(value, (set, frozenset, range)) else value, name)
