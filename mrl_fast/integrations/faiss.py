"""FAISS indexes to MatryoshkaIndex and back; the same as the index's own methods."""

from __future__ import annotations

from typing import Any

from mrl_fast.search.index import MatryoshkaIndex

from_faiss = MatryoshkaIndex.from_faiss


def to_faiss(index: MatryoshkaIndex) -> Any:
    """``index.to_faiss()``."""
    return index.to_faiss()


__all__ = ["from_faiss", "to_faiss"]
