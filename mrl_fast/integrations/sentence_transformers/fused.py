"""sentence-transformers' losses that have a fused form over all prefixes: which they are, the
embeddings that they take, and their value from these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import batch_to_device, cos_sim, dot_score, pytorch_cos_sim
from torch import Tensor, nn

from mrl_fast.shared.dispatch import choose
from mrl_fast.shared.types import NestedLoss
from mrl_fast.training import reference
from mrl_fast.training.losses.embeddings import Side
from mrl_fast.training.losses.info_nce import matryoshka_info_nce
from mrl_fast.training.losses.reductions import check_dim_weights, nested_loss
from mrl_fast.training.ops import Fold, fold
from mrl_fast.training.ring.fold import around, exceeds, ring_fold
from mrl_fast.training.ring.ranks import Ranks, check_ranks, gather_rows
from mrl_fast.training.spec import FoldSpec

# of a loss: its columns of embeddings [B, D], those of its guide, dims and their weights
Form = Callable[[Any, list[Tensor], list[Tensor], tuple[int, ...], Sequence[float]], NestedLoss]

ROUNDING = 2**-40  # of a guide's cosines, in fp64: texts that are equal are no false negatives


def fused_form(loss: nn.Module) -> Form | None:
    """What computes a loss over all prefixes at once; None where only a loop does: another loss,
    another similarity, a subclass that overrides what the form stands for."""
    for kind, (form, methods, similarities) in FORMS.items():
        if isinstance(loss, kind) and all(
            getattr(type(loss), name) is getattr(kind, name) for name in methods
        ):
            given: Any = loss.similarity_fct
            return form if any(given is s or type(given) is s for s in similarities) else None
    return None


def embed(loss: Any, features: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Embeddings ``[B, D]`` of each column, and those of the loss's guide if it has one."""
    given = [dict(column) for column in features]  # a model writes into what it is given
    columns = embed_columns(loss.model, features)
    if not hasattr(loss, "guide"):
        return columns, []
    with torch.no_grad():
        if loss.must_retokenize:
            texts = [
                loss.tokenizer.batch_decode(_token_ids(column), skip_special_tokens=True)
                for column in given
            ]
            guide = loss.guide
            given = [batch_to_device(guide.preprocess(text), guide.device) for text in texts]
        return columns, embed_columns(loss.guide, given)


def _token_ids(column: dict[str, Any]) -> Any:
    """Each text's ids, of a padded batch or of texts laid end to end."""
    ids = column["input_ids"]
    if "cu_seq_lens_q" not in column:
        return ids
    return [part.tolist() for part in ids[0].split(column["cu_seq_lens_q"].diff().tolist())]


def ranking(
    loss: Any,
    columns: list[Tensor],
    guides: list[Tensor],
    dims: tuple[int, ...],
    weights: Sequence[float],
) -> NestedLoss:
    """MultipleNegativesRankingLoss. Prefixes are normalised first: dot products are cosines."""
    return matryoshka_info_nce(
        columns[0],
        columns[1:],
        dims,
        dim_weights=weights,
        scale=loss.scale,
        directions=tuple(dict.fromkeys(loss.directions)),
        partition_mode=loss.partition_mode,
        hardness_mode=loss.hardness_mode,
        hardness_strength=loss.hardness_strength,
        group=_group(loss),
    )


def gist(
    loss: Any,
    columns: list[Tensor],
    guides: list[Tensor],
    dims: tuple[int, ...],
    weights: Sequence[float],
) -> NestedLoss:
    """GISTEmbedLoss. Its guide's embeddings are not cut to prefixes, so that all share its masks,
    which are made of its cosines in fp64: a GPU's fp32 products may be of TF32."""
    if isinstance(loss, losses.GISTEmbedLoss) and len(columns) > 3:
        raise ValueError(f"sentence_features: expected 2 or 3 columns, got {len(columns)}")
    group, scale = _group(loss), 1.0 / loss.temperature
    anchors, positives = columns[:2]
    impl = choose(None, anchors, positives)
    ranks, count = None, len(anchors)
    if group is not None:
        options = loss.contrast_positives, dims, scale, impl == "reference"
        ranks = check_ranks(group, anchors, columns[1:], options)
        count = ranks.mean_queries
    with torch.no_grad():
        units = [F.normalize(guide.double(), dim=1) for guide in guides]
        limit = (units[0] * units[1]).sum(1, keepdim=True)  # [B, 1]
        relative = loss.margin_strategy == "relative"
        limit = limit - loss.margin * (limit.abs() if relative else 1.0) + ROUNDING
    own = torch.arange(len(anchors), dtype=torch.int64, device=anchors.device)  # its positive
    documents, others = columns[1:], units[1:]
    if ranks is not None and impl == "reference":
        documents = [gather_rows(block, ranks.documents, ranks) for block in documents]
        others = [gather_rows(unit, ranks.documents, ranks) for unit in others]
        own, ranks = own + sum(ranks.documents[: ranks.rank]), None
    guided = [Guided(anchors, documents, units[0], others, limit)]
    if loss.contrast_anchors:  # a rank's own
        guided.append(Guided(anchors, [anchors], units[0], [units[0]], limit, everywhere=False))
    if loss.contrast_positives:
        guided.append(Guided(positives, documents[:1], units[1], others[:1], limit))
    rows = _joint_rows(guided, own, dims, scale, impl, ranks)
    return nested_loss(rows, check_dim_weights(weights, len(dims), anchors), "mean", count)


class Guided(NamedTuple):
    """Rows and columns whose scores are left out where a guide's exceed a limit."""

    rows: Tensor  # [B, D]
    columns: Sequence[Tensor]  # [C, D] each
    guide_rows: Tensor  # [B, E] fp64
    guide_columns: Sequence[Tensor]  # [C, E] fp64 each
    limit: Tensor  # [B, 1]
    everywhere: bool = True  # columns are those of all ranks


def _joint_rows(
    parts: Sequence[Guided],
    target: Tensor,
    dims: tuple[int, ...],
    scale: float,
    impl: str,
    ranks: Ranks | None,
) -> Tensor:  # [G, B]
    """InfoNCE with one softmax over all parts; the positives are in the first, never left out."""
    if impl == "reference":
        scores = []
        for part in parts:
            hidden = exceeds(part.guide_rows, torch.cat(list(part.guide_columns)), part.limit)
            if not scores:
                hidden.scatter_(1, target[:, None], False)
            y = scale * reference.similarities(part.rows, torch.cat(list(part.columns)), dims)
            scores.append(y.masked_fill(hidden, -torch.inf))
        at = torch.arange(len(target), dtype=torch.int64, device=target.device)
        return torch.cat(scores, dim=2).logsumexp(2) - scores[0][:, at, target]
    folds: list[Fold] = []
    for part in parts:
        r = Side.from_embeddings(part.rows, dims)
        c = Side.from_embeddings(torch.cat(list(part.columns)), dims)
        guides = torch.cat(list(part.guide_columns))
        spec = FoldSpec(
            r.x, c.x, dims, row_scale=r.scaled(scale), col_scale=c.inverse,
            target=None if folds else target, compute_dtype=r.compute_dtype,
        )  # fmt: skip
        if ranks is not None and part.everywhere:
            way = around(ranks, ranks.documents, len(part.columns))
            way = way._replace(
                guide_rows=part.guide_rows, guide_cols=guides, guide_limit=part.limit
            )
            folds.append(ring_fold(spec, way, impl))
            continue
        hidden = exceeds(part.guide_rows, guides, part.limit)
        if not folds:
            hidden.scatter_(1, target[:, None], False)
        folds.append(fold(spec._replace(mask=hidden), impl))
    first = folds[0]
    logs = [f.row_log + (f.row_max - first.row_max) - first.row_log for f in folds]
    return torch.stack(logs).logsumexp(0) - first.hit


def _group(loss: Any) -> Any:
    gathers = loss.gather_across_devices and dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if gathers else None


DOT = (cos_sim, pytorch_cos_sim, dot_score)
FORMS: dict[type, tuple[Form, tuple[str, ...], tuple[Any, ...]]] = {
    losses.MultipleNegativesRankingLoss: (
        ranking,
        ("forward", "compute_loss_from_embeddings"),
        DOT,
    ),
    losses.CachedMultipleNegativesRankingLoss: (ranking, ("forward", "calculate_loss"), DOT),
    losses.GISTEmbedLoss: (gist, ("forward", "sim_matrix"), (nn.CosineSimilarity,)),
    losses.CachedGISTEmbedLoss: (
        gist,
        ("forward", "calculate_loss", "sim_matrix"),
        (nn.CosineSimilarity,),
    ),
}
