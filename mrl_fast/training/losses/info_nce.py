"""InfoNCE over nested prefixes: in-batch negatives, hard negatives, both ways, CLIP, GIST masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.shared.checks import check_choice, check_number, check_vector
from mrl_fast.shared.dispatch import choose
from mrl_fast.shared.types import NestedLoss, SpreadOut
from mrl_fast.training import reference
from mrl_fast.training.losses.embeddings import Side, check_pairs
from mrl_fast.training.losses.reductions import (
    REDUCTIONS,
    check_classes,
    check_dim_weights,
    check_scale,
    nested_loss,
)
from mrl_fast.training.losses.spread_out import RowsOfRanks, check_spread_out, spread_out_terms
from mrl_fast.training.ops import Fold, fold
from mrl_fast.training.ring.fold import around, ring_fold
from mrl_fast.training.ring.ranks import Ranks, check_ranks, gather_rows
from mrl_fast.training.spec import FoldSpec, InfoNCESpec

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
Masks = Tensor | Mapping[str, Tensor] | None


def matryoshka_info_nce(
    queries: Tensor,
    documents: Tensor | Sequence[Tensor],
    dims: Sequence[int],
    *,
    dim_weights: Tensor | Sequence[float] | None = None,
    scale: Tensor | float = 20.0,
    target: Tensor | None = None,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    mask: Masks = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    spread_out: SpreadOut | Sequence[Any] | None = None,
    impl: str | None = None,
) -> NestedLoss:
    """InfoNCE of every nested prefix, summed, each prefix normalised on its own.

    By default equals ``sum(c * F.cross_entropy(scale * F.normalize(q[:, :d]) @ F.normalize(p[:,
    :d]).T, target) for c, d in zip(dim_weights, dims))`` with no score matrix in memory. Options as
    in sentence-transformers' MultipleNegativesRankingLoss; ``directions=("query_to_doc",
    "doc_to_query"), partition_mode="per_direction"`` is CLIP's symmetric loss. Saves a few
    numbers a row and prefix, and fp32 copies of half-precision inputs. fp32 statistics and gradient
    sums and fp64 norms for every input dtype. Differentiable once.

    Args:
        queries: ``[B, D]``, any row stride.
        documents: ``[C, D]`` with ``C >= B``, positives first, or a sequence ``[positives,
            negatives_1, …]`` of ``[B, D]``: only a sequence says whose the negatives are.
        dims: Prefix widths, strictly ascending, each in ``[1, D]``.
        dim_weights: c_g, ``[G]``; default all 1: a sum over prefixes, not a mean.
        scale: Inverse temperature, > 0; a tensor of one element may be learned (with a
            ``hardness_mode`` its value is read, which waits for a GPU and breaks a graph).
        target: ``[B]`` int64, the positive's row in the documents (of a sequence, laid end to end);
            default: row i. A query's own documents are then its target alone.
        directions: Which similarities are in the denominator: ``"query_to_doc"``, always, and any
            of ``"query_to_query"`` (but its own), ``"doc_to_query"`` and ``"doc_to_doc"`` (the
            positive's, but those of the same query).
        partition_mode: ``"joint"``, one softmax over all directions, or ``"per_direction"``, the
            mean of their log-partitions (no same-side directions then).
        hardness_mode: Adds ``hardness_strength`` · cosine, a constant to the gradient, to the
            scores of ``"in_batch_negatives"``, of one's own ``"hard_negatives"`` or of
            ``"all_negatives"``, in the direction query_to_doc.
        hardness_strength: >= 0.
        mask: ``[B, C]`` bool, True is excluded from query_to_doc (a false negative, as GISTEmbed
            finds it); or a mapping from directions to such masks, of a direction's rows and
            columns. A positive that is masked makes the loss infinite. With a ``group`` columns
            are those of all ranks: block by block, and rank by rank in each.
        normalize: False takes raw dot products.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over queries.
        group: A ``torch.distributed`` process group, gloo or nccl: the documents, and queries where
            a direction needs them, are those of all ranks. They travel from rank to rank in pieces
            and are nowhere gathered (but for ``impl="reference"``); gradients come back the same
            way. The loss is that of this rank's rows, and its backward gives a row the gradient of
            the sum of all ranks' losses, as DDP expects, which averages. Ranks may have different
            numbers of rows: ``"mean"`` divides by the mean number of queries a rank, so that the
            mean of the ranks' losses is that of one large batch. The call and its backward are
            collective: every rank makes both. ``torch.distributed.group.WORLD`` is all ranks, None
            only this one.
        spread_out: Adds ``matryoshka_spread_out`` of the queries and of every block of documents,
            each compared with itself, to each query's loss: ``SpreadOut(1.0, 1.0)`` as in
            sentence-transformers' GlobalOrthogonalRegularizationLoss. Directions, hardness, masks
            and the scale do not change it. With a group it is of all ranks' rows.
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; never falls back. None picks by device.

    Returns:
        NestedLoss: ``loss`` (scalar, or ``[B]`` with ``"none"``) and detached ``per_dim`` (``[G]``
            or ``[G, B]``).

    Raises:
        ValueError, TypeError: An argument of the wrong shape, dtype, device or range.

    Source: van den Oord et al. 2018 (InfoNCE); Kusupati et al., NeurIPS 2022, section 3 (nested,
    normalised per prefix); Lan et al. 2025, equation 5 (hardness).
    """
    queries, sequence, dims = check_pairs(queries, documents, dims)
    scale = check_scale(scale, "scale", queries)
    check_choice(reduction, "reduction", REDUCTIONS)
    _check_directions(directions, partition_mode)
    _check_hardness(hardness_mode, hardness_strength)
    spread = None if spread_out is None else check_spread_out(spread_out, "spread_out")
    dim_weights = check_dim_weights(dim_weights, len(dims), queries)
    if target is not None:
        check_vector(target, "target", len(queries), queries, dtype=torch.int64)
        sequence = [torch.cat(sequence)]
        check_classes(target, len(sequence[0]))
    elif len(sequence[0]) < len(queries):
        raise ValueError(
            f"documents: expected at least {len(queries)} positives, got {len(sequence[0])}"
        )
    impl = choose(impl, queries, sequence[0])
    ranks = None
    if group is not None:
        options = tuple(directions), partition_mode, hardness_mode, hardness_strength, normalize
        masks = sorted(mask) if isinstance(mask, Mapping) else mask is not None
        kind = impl == "reference", masks, spread
        ranks = check_ranks(group, queries, sequence, dims, options, kind, learned=[scale])
    widths = _widths(queries, sequence, ranks)
    mask = _check_mask(mask, widths, directions, queries)

    local = torch.arange(len(queries), dtype=torch.int64, device=queries.device)
    positive = local if target is None else target
    spec = InfoNCESpec(
        queries=queries, all_queries=queries,
        positives=sequence[0][: len(queries)] if target is None else sequence[0][target],
        documents=sequence[0] if len(sequence) == 1 else torch.cat(sequence), dims=dims,
        scale=scale, directions=tuple(directions), partition_mode=partition_mode,
        hardness_mode=hardness_mode, hardness_strength=float(hardness_strength), mask=mask,
        normalize=normalize, own_query=local, own_document=positive, period=len(sequence[0]),
        blocks=len(sequence), ranks=ranks,
    )  # fmt: skip
    rows = _rows(spec, sequence, impl)
    if spread is not None:
        rows = rows + _spread(queries, sequence, dims, spread, normalize, ranks, impl)
    count = len(queries) if ranks is None else ranks.mean_queries
    return nested_loss(rows, dim_weights, reduction, count)


def _spread(queries, blocks, dims, options, normalize, ranks: Ranks | None, impl) -> Tensor:
    """The spread-out terms of the queries and of every block, ``[G, 1]``."""
    held = None
    if ranks is not None:
        counts = [ranks.queries, *[ranks.documents] * len(blocks)]
        held = [RowsOfRanks(ranks, its) for its in counts]
    return spread_out_terms([queries, *blocks], dims, options, normalize, held, impl)


def _widths(queries: Tensor, blocks: Sequence[Tensor], ranks: Ranks | None) -> dict[str, int]:
    """Columns of a mask over documents, and over queries: those of all ranks."""
    if ranks is None:
        return {"doc": sum(map(len, blocks)), "query": len(queries)}
    return {"doc": sum(ranks.documents) * len(blocks), "query": sum(ranks.queries)}


def _gathered(spec: InfoNCESpec, blocks: Sequence[Tensor], ranks: Ranks) -> InfoNCESpec:
    """With the rows of all ranks, block by block, and this rank's places among them."""
    all_queries = spec.queries
    if {"query_to_query", "doc_to_query"} & set(spec.directions):
        all_queries = gather_rows(spec.queries, ranks.queries, ranks)
    return spec._replace(
        all_queries=all_queries,
        documents=torch.cat([gather_rows(block, ranks.documents, ranks) for block in blocks]),
        own_query=spec.own_query + sum(ranks.queries[: ranks.rank]),
        own_document=spec.own_document + sum(ranks.documents[: ranks.rank]),
        period=sum(ranks.documents),
    )


def _rows(spec: InfoNCESpec, blocks: Sequence[Tensor], impl: str) -> Tensor:  # [G, B]
    if impl == "reference":
        gathered = spec if spec.ranks is None else _gathered(spec, blocks, spec.ranks)
        return reference.info_nce_rows(gathered)

    def side(x: Tensor) -> Side:
        return Side.from_embeddings(x, spec.dims, spec.normalize)

    def statistics(left: Side, right: Side, direction: str, **options: Any) -> Fold:
        fold_spec = FoldSpec(
            left.x, right.x, spec.dims, row_scale=left.scaled(spec.scale),
            col_scale=right.inverse, mask=spec.mask.get(direction),
            compute_dtype=left.compute_dtype, **options,
        )  # fmt: skip
        if spec.ranks is None:
            return fold(fold_spec, impl)
        of_queries = direction.endswith("query")
        counts = spec.ranks.queries if of_queries else spec.ranks.documents
        blocks = 1 if of_queries else spec.blocks
        return ring_fold(fold_spec, around(spec.ranks, counts, blocks), impl)

    q, d = side(spec.queries), side(spec.documents)
    own: dict[str, Any] = dict(target=spec.own_document, period=spec.period)
    boosts = _boosts(spec)
    both_ways = "doc_to_query" in spec.directions
    # The scores of doc_to_query are the columns of query_to_doc, unless boosts or masks make the
    # two differ.
    by_columns = both_ways and not boosts and not spec.mask
    to_doc = statistics(q, d, "query_to_doc", columns=by_columns, **own, **boosts)
    parts = [(to_doc.row_max, to_doc.row_log)]  # maximum and log-sum of each direction
    if "query_to_query" in spec.directions:
        f = statistics(q, q, "query_to_query", target=spec.own_query, exclude_own=True)
        parts.append((f.row_max, f.row_log))
    if by_columns:
        parts.append((to_doc.col_max[:, spec.own_document], to_doc.col_log[:, spec.own_document]))
    needs_positives = "doc_to_doc" in spec.directions or (both_ways and not by_columns)
    p = side(spec.positives) if needs_positives else q
    if both_ways and not by_columns:
        f = statistics(p, q, "doc_to_query")
        parts.append((f.row_max, f.row_log))
    if "doc_to_doc" in spec.directions:
        f = statistics(p, d, "doc_to_doc", exclude_own=True, **own)
        parts.append((f.row_max, f.row_log))

    # Relative to the log-sum of query_to_doc, so that the small loss of a confident row keeps its
    # digits.
    logs = [log + (top - to_doc.row_max) - to_doc.row_log for top, log in parts]
    if spec.partition_mode == "per_direction":
        return torch.stack(logs).mean(0) - to_doc.hit
    return torch.stack(logs).logsumexp(0) - to_doc.hit


def _boosts(spec: InfoNCESpec) -> dict[str, float]:
    """The fold's factors for hardness: z + strength · cosine is z · (1 + strength / scale)."""
    if spec.hardness_mode is None or not spec.hardness_strength:
        return {}
    value = spec.scale.detach() if isinstance(spec.scale, Tensor) else spec.scale
    boost = 1.0 + spec.hardness_strength / float(value)
    modes = {
        "own_boost": ("hard_negatives", "all_negatives"),
        "other_boost": ("in_batch_negatives", "all_negatives"),
    }
    return {name: boost for name, of in modes.items() if spec.hardness_mode in of}


def _check_hardness(mode: str | None, strength: float) -> None:
    if mode not in HARDNESS:
        raise ValueError(f"hardness_mode: expected one of {HARDNESS}, got {mode!r}")
    check_number(strength, "hardness_strength")


def _check_directions(directions: Sequence[str], partition_mode: str) -> None:
    if isinstance(directions, str):
        raise TypeError(f"directions: expected a sequence of names, got {directions!r}")
    for name in directions:
        check_choice(name, "directions", DIRECTIONS)
    if "query_to_doc" not in directions or len(set(directions)) != len(directions):
        raise ValueError(
            f"directions: expected distinct names, 'query_to_doc' among them, got {directions!r}"
        )
    check_choice(partition_mode, "partition_mode", ("joint", "per_direction"))
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            "partition_mode: expected 'joint' with 'query_to_query' or 'doc_to_doc', which hold no "
            "positive, got 'per_direction'"
        )


def _check_mask(
    mask: Masks, widths: Mapping[str, int], directions: Sequence[str], like: Tensor
) -> dict[str, Tensor]:
    """Masks by direction; ``widths`` has the number of documents and of queries on all ranks."""
    masks = {"query_to_doc": mask} if isinstance(mask, Tensor) else dict(mask or {})
    for name, value in masks.items():
        label = "mask" if isinstance(mask, Tensor) else f"mask[{name!r}]"
        check_choice(name, "mask", tuple(directions))
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{label}: expected a bool tensor, got {kind}")
        expected = [len(like), widths[name.split("_to_")[1]]]
        if list(value.shape) != expected:
            raise ValueError(f"{label}: expected shape {expected}, got {list(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{label}: expected a tensor on {like.device}, got {value.device}")
    return masks
