"""LlamaIndex's metadata filters, asked of a node."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilters

# Keys under which other stores keep the id of a node's document.
DOCUMENT_KEYS = ("ref_doc_id", "doc_id", "document_id")


def keep_of(
    node_ids: list[str] | None, filters: MetadataFilters | None, doc_ids: list[str] | None
) -> Callable[[BaseNode], bool] | None:
    """Which nodes to search; None: all. A LlamaIndex index passes ``[]`` where it has no
    ``node_ids``."""
    if not node_ids and filters is None and doc_ids is None:
        return None
    nodes = set(node_ids) if node_ids else None
    documents = None if doc_ids is None else set(doc_ids)
    return lambda node: (
        (nodes is None or node.node_id in nodes)
        and (documents is None or node.ref_doc_id in documents)
        and (filters is None or passes(node, filters))
    )


def passes(node: BaseNode, filters: MetadataFilters) -> bool:
    """Whether a node's metadata pass the filters, nested or not."""
    if not filters.filters:
        return True
    results = (
        passes(node, one)
        if isinstance(one, MetadataFilters)
        else _matches(_value(node, one.key), one.operator, one.value)
        for one in filters.filters
    )
    if filters.condition == FilterCondition.OR:
        return any(results)
    if filters.condition == FilterCondition.NOT:
        return not any(results)
    return all(results)


def _value(node: BaseNode, key: str) -> Any:
    if key in DOCUMENT_KEYS and key not in node.metadata:
        return node.ref_doc_id
    return node.metadata.get(key)


TESTS: dict[FilterOperator, Callable[[Any, Any], bool]] = {
    FilterOperator.EQ: operator.eq,
    FilterOperator.GT: operator.gt,
    FilterOperator.LT: operator.lt,
    FilterOperator.GTE: operator.ge,
    FilterOperator.LTE: operator.le,
    FilterOperator.IN: lambda has, value: has in value,
    FilterOperator.ANY: lambda has, value: any(one in has for one in value),
    FilterOperator.ALL: lambda has, value: all(one in has for one in value),
    FilterOperator.CONTAINS: lambda has, value: value in has,
    FilterOperator.TEXT_MATCH: lambda has, value: str.find(has, value) >= 0,
    FilterOperator.TEXT_MATCH_INSENSITIVE: lambda has, value: value.lower() in has.lower(),
}
OPPOSITES = {FilterOperator.NE: FilterOperator.EQ, FilterOperator.NIN: FilterOperator.IN}


def _matches(has: Any, wanted: FilterOperator, value: Any) -> bool:
    """Metadata that are missing, or of a type that cannot be compared, equal nothing and are in
    nothing."""
    if wanted == FilterOperator.IS_EMPTY:
        return has is None or has == "" or has == []
    if wanted in OPPOSITES:
        return not _matches(has, OPPOSITES[wanted], value)
    if has is None:
        return False
    try:
        return bool(TESTS[wanted](has, value))
    except (TypeError, AttributeError):
        return False
