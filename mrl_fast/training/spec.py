"""The arguments of a fold and of InfoNCE, each as one object: packed once, read by every
implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

NO_PERIOD = 1 << 62  # a row's own column is its target alone


class FoldSpec(NamedTuple):
    """Nested scores S_g = x[:, :d_g] @ weight[:, :d_g].T and how they are folded.

    z_g = row_scale_g · col_scale_g · S_g + bias. y is z, but z · own_boost at a row's own columns
    other than its target and z · other_boost at columns of others; boosts change values and not
    gradients (dy/dz = 1). Excluded scores are −∞.
    """

    x: Tensor  # [B, >= dims[-1]]
    weight: Tensor  # [V, >= dims[-1]]
    dims: Sequence[int]  # [G], checked
    bias: Tensor | None = None  # [V]
    row_scale: Tensor | None = None  # [G, B] fp32; both scales or neither
    col_scale: Tensor | None = None  # [G, V] fp32
    target: Tensor | None = None  # [B] int64, the column of each row's positive
    soft: Tensor | None = None  # [V] or [B, V], weights of a row's scores in soft_sum
    mask: Tensor | None = None  # [B, V] bool, True excludes
    period: int = NO_PERIOD  # columns equal to the target modulo this are a row's own
    exclude_own: bool = False  # excludes a row's own columns, its target too: there is no hit
    own_boost: float = 1.0
    other_boost: float = 1.0
    link: str = "softmax"  # or "sigmoid", for sums of softplus
    columns: bool = False  # also fold over the rows of each column
    compute_dtype: torch.dtype | None = None  # of x and weight in products, as tensor cores ask

    @property
    def has_hit(self) -> bool:
        return self.target is not None and not self.exclude_own


class Upstream(NamedTuple):
    """A fold's statistics, and the derivatives of the loss by them; None is not there, or 0."""

    row_max: Tensor  # [G, B], as all of rows
    row_log: Tensor
    col_max: Tensor | None  # [G, V], as all of columns
    col_log: Tensor | None
    d_row: Tensor  # by row_log
    d_hit: Tensor | None
    d_soft: Tensor | None  # by soft_sum, fp32
    d_col: Tensor | None  # by col_log


class InfoNCESpec(NamedTuple):
    """InfoNCE after its checks; options as the public op's. For the reference the rows of all ranks
    are gathered; else all rows are this rank's, but masks have columns for those of all."""

    queries: Tensor  # [B, D]
    all_queries: Tensor  # [>= B, D]
    positives: Tensor  # [B, D]
    documents: Tensor  # [C, D]
    dims: tuple[int, ...]
    scale: Tensor | float
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float
    mask: Mapping[str, Tensor]  # by direction
    normalize: bool
    own_query: Tensor  # [B], each query's own row in all_queries
    own_document: Tensor  # [B], each query's positive in documents
    period: int  # documents equal to own_document modulo this are the query's own
    blocks: int  # of equal size that the documents consist of
    ranks: Any = None  # see ring.ranks.Ranks


SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", Sequence[int]: "int[]", int: "int", bool: "bool",
    float: "float", str: "str", torch.dtype | None: "ScalarType?",
}  # fmt: skip


def schema_of(*records: type, returns: int) -> str:
    """The flat schema of an op whose arguments are the fields of NamedTuples, then ``impl``."""
    fields = [
        f"{SCHEMA_TYPES[kind]} {name}"
        for record in records
        for name, kind in get_type_hints(record).items()
    ]
    return f"({', '.join([*fields, 'str impl'])}) -> ({', '.join(['Tensor'] * returns)})"
