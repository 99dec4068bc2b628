"""What sentence-transformers' scripts import: its semantic search and its mining of hard negatives,
which need nothing of that library, and its losses, which need it and are loaded when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mrl_fast.integrations.sentence_transformers.mining import mine_hard_negatives
from mrl_fast.search.semantic import semantic_search

if TYPE_CHECKING:
    from mrl_fast.integrations.sentence_transformers.losses import Matryoshka2dLoss, MatryoshkaLoss

__all__ = ["Matryoshka2dLoss", "MatryoshkaLoss", "mine_hard_negatives", "semantic_search"]


def __getattr__(name: str) -> Any:
    if name not in ("Matryoshka2dLoss", "MatryoshkaLoss"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mrl_fast.integrations.sentence_transformers import losses

    return getattr(losses, name)
