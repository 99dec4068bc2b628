"""sentence-transformers' losses that have a fused form over all prefixes: which they are, the
embeddings that they take, and their value from these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
from mrl_fast.training.losses.embeddings import Side, check_ranks, gather_rows, rank_of
from mrl_fast.training.losses.info_nce import matryoshka_info_nce
from mrl_fast.training.losses.reductions import check_dim_weights, nested_loss
from mrl_fast.training.ops import fold
from mrl_fast.training.spec import FoldSpec

# of a loss: its columns of embeddings [B, D], those of its guide, dims and their weights
Form = Callable[[Any, list[Tensor], list[Tensor], tuple[int, ...], Sequence[float]], NestedLoss]

MASK_BYTES = 1 << 24  # of a guide's cosines at a time
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
    group = _group(loss)
    anchors, positives = columns[:2]
    check_ranks(group, anchors, columns[1:])
    documents = [gather_rows(block, group) for block in columns[1:]]
    local = torch.arange(len(anchors), dtype=torch.int64, device=anchors.device)
    own = local + rank_of(group) * len(anchors)  # [B], each row's positive
    with torch.no_grad():
        units = [F.normalize(guide.double(), dim=1) for guide in guides]
        others = [gather_rows(unit, group) for unit in units[1:]]
        limit = (units[0] * units[1]).sum(1, keepdim=True)  # [B, 1]
        relative = loss.margin_strategy == "relative"
        limit = limit - loss.margin * (limit.abs() if relative else 1.0) + ROUNDING
    if loss.contrast_anchors:  # a rank's own
        candidates, guide_candidates = [*documents, anchors], [*others, units[0]]
    else:
        candidates, guide_candidates = documents, others
    hidden = _exceeds(units[0], torch.cat(guide_candidates), limit)
    hidden[local, own] = False
    blocks = [(anchors, torch.cat(candidates), hidden)]
    if loss.contrast_positives:
        hidden = _exceeds(units[1], others[0], limit)
        blocks.append((positives, documents[0], hidden))
    rows = _joint_rows(blocks, own, dims, 1.0 / loss.temperature)
    return nested_loss(rows, check_dim_weights(weights, len(dims), anchors), "mean", len(anchors))


def _joint_rows(
    blocks: Sequence[tuple[Tensor, Tensor, Tensor]],
    target: Tensor,
    dims: tuple[int, ...],
    scale: float,
) -> Tensor:  # [G, B]
    """InfoNCE with one softmax over blocks of scores: rows ``[B, D]``, columns ``[C, D]`` and what
    is left out of it, ``[B, C]``. The positives are in the first block."""
    impl = choose(None, *blocks[0][:2])
    if impl == "reference":
        scores = [
            (scale * reference.similarities(x, y, dims)).masked_fill(mask, -torch.inf)
            for x, y, mask in blocks
        ]
        hit = scores[0][
            :, torch.arange(len(target), dtype=torch.int64, device=target.device), target
        ]
        return torch.cat(scores, dim=2).logsumexp(2) - hit
    folds = []
    for x, y, mask in blocks:
        r, c = Side.from_embeddings(x, dims), Side.from_embeddings(y, dims)
        scales = dict(row_scale=r.scaled(scale), col_scale=c.inverse)
        options: dict[str, Any] = scales | dict(target=None if folds else target, mask=mask)
        spec = FoldSpec(r.x, c.x, dims, compute_dtype=r.compute_dtype, **options)
        folds.append(fold(spec, impl))
    first = folds[0]
    logs = [f.row_log + (f.row_max - first.row_max) - first.row_log for f in folds]
    return torch.stack(logs).logsumexp(0) - first.hit


def _exceeds(rows: Tensor, columns: Tensor, limit: Tensor) -> Tensor:
    """``rows @ columns.T > limit``, ``[B, C]`` bool; its scores in chunks of rows."""
    chunk = max(1, MASK_BYTES // (8 * max(1, len(columns))))
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        return torch.cat(
            [
                part @ columns.T > bound
                for part, bound in zip(rows.split(chunk), limit.split(chunk), strict=True)
            ]
        )


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
