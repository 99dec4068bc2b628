"""The specification of training: every loss in plain PyTorch, one prefix after the other. Slow,
differentiable more than once, any float dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast.shared.types import NestedLoss, Prediction


def matryoshka_logits(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:  # [G, B, V]
    """``weights``: G tensors ``[V, d_g]``; a tied head's are its own prefixes."""
    return torch.stack(
        [F.linear(x[:, : w.shape[1]], w, b) for w, b in zip(weights, biases, strict=True)]
    )


def matryoshka_cross_entropy(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    dim_weights: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> NestedLoss:
    if class_weight is not None:
        class_weight = class_weight.to(x.dtype)
    per_dim = torch.stack(
        [
            F.cross_entropy(
                logits,
                target,
                weight=class_weight,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction=reduction,
            )
            for logits in matryoshka_logits(x, weights, biases)
        ]
    )  # [G] or [G, B]
    c = dim_weights.to(per_dim.dtype).reshape(-1, *[1] * (per_dim.ndim - 1))
    return NestedLoss((c * per_dim).sum(0), per_dim.detach())


def matryoshka_predict(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Prediction:
    best = matryoshka_logits(x, weights, biases).softmax(-1).max(-1)
    return Prediction(best.indices, best.values)


def similarities(
    x: Tensor, y: Tensor, dims: Sequence[int], normalize: bool = True
) -> Tensor:  # [G, B, C]
    def prefix(t: Tensor, d: int) -> Tensor:
        return F.normalize(t[:, :d]) if normalize else t[:, :d]

    return torch.stack([prefix(x, d) @ prefix(y, d).T for d in dims])


def info_nce_rows(
    queries: Tensor,
    all_queries: Tensor,
    positives: Tensor,
    documents: Tensor,
    dims: Sequence[int],
    *,
    scale: Tensor | float,
    directions: Sequence[str],
    partition_mode: str,
    hardness_mode: str | None,
    hardness_strength: float,
    mask: Mapping[str, Tensor],
    normalize: bool,
    own_query: Tensor,
    own_document: Tensor,
    period: int,
) -> Tensor:  # [G, B]
    """``own_query`` and ``own_document`` ``[B]``: each row's own among all; documents equal to it
    modulo ``period`` are its own too."""
    sides = {"query": (queries, all_queries), "doc": (positives, documents)}
    rows = torch.arange(len(queries), device=queries.device)
    own = torch.arange(len(documents), device=queries.device) % period == own_document[:, None]
    is_positive = torch.zeros_like(own)
    is_positive[rows, own_document] = True
    logits = {}
    for name in directions:
        left, right = name.split("_to_")
        y = similarities(sides[left][0], sides[right][1], dims, normalize)
        z = y * scale
        if name == "query_to_doc" and hardness_mode is not None:
            hard = {
                "in_batch_negatives": ~own,
                "hard_negatives": own & ~is_positive,
                "all_negatives": ~is_positive,
            }[hardness_mode]
            z = z + torch.where(hard, hardness_strength * y.detach(), 0.0)
        if name == "query_to_query":
            itself = torch.arange(z.shape[2], device=z.device) == own_query[:, None]
            z = z.masked_fill(itself, -torch.inf)
        if name == "doc_to_doc":
            z = z.masked_fill(own, -torch.inf)
        if name in mask:
            z = z.masked_fill(mask[name], -torch.inf)
        logits[name] = z
    hit = logits["query_to_doc"][:, rows, own_document]
    if partition_mode == "joint":
        return torch.cat(list(logits.values()), dim=2).logsumexp(2) - hit
    return torch.stack([z.logsumexp(2) for z in logits.values()]).mean(0) - hit


def sigmoid_rows(
    queries: Tensor,
    documents: Tensor,
    dims: Sequence[int],
    scale: Tensor | float,
    bias: Tensor | float,
    target: Tensor,
) -> Tensor:  # [G, B]
    columns = torch.arange(len(documents), device=queries.device)
    sign = torch.where(columns == target[:, None], 1.0, -1.0).to(queries.dtype)
    z = similarities(queries, documents, dims) * scale + bias
    return -F.logsigmoid(sign * z).sum(2)


def distill_rows(
    queries: Tensor,
    documents: Tensor,
    dims: Sequence[int],
    rows: Tensor,
    cols: Tensor | None,
    temperature: float,
) -> Tensor:  # [G, B]
    """The teacher's two sides, or its scores and None."""
    teacher = rows if cols is None else F.normalize(rows) @ F.normalize(cols).T
    teacher = (teacher.detach() / temperature).to(queries.dtype).softmax(1)
    logp = (similarities(queries, documents, dims) / temperature).log_softmax(2)
    return F.kl_div(logp, teacher.expand_as(logp), reduction="none").sum(2)
