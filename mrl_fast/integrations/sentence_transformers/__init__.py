"""What sentence-transformers' scripts import: its semantic search and its mining of hard negatives,
which need nothing of that library, and its losses, which need it and are loaded when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mrl_fast.integrations.sentence_transformers.mining import mine_hard_negatives
from mrl_fast.search.semantic import semantic_search

if TYPE_CHECKING:
    from mrl_fast.integrations.sentence_transformers.losses import Matryoshka2dLoss, MatryoshkaLoss
    from mrl_fast.integrations.sentence_transformers.spread_out import (
        GlobalOrthogonalRegularizationLoss,
    )

__all__ = [
    "GlobalOrthogonalRegularizationLoss",
    "Matryoshka2dLoss",
    "MatryoshkaLoss",
    "mine_hard_negatives",
    "semantic_search",
]


def __getattr__(name: str) -> Any:
    if name in ("Matryoshka2dLoss", "MatryoshkaLoss"):
        from mrl_fast.integrations.sentence_transformers import losses

        return getattr(losses, name)
    if name == "GlobalOrthogonalRegularizationLoss":
        from mrl_fast.integrations.sentence_transformers import spread_out

        return spread_out.GlobalOrthogonalRegularizationLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
