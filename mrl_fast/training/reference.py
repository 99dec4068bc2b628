"""The specification of training: every loss in plain PyTorch, one prefix after the other. Slow,
differentiable more than once, any float dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast.shared.types import NestedLoss, Prediction
from mrl_fast.training.spec import InfoNCESpec


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
    **options: Any,
) -> NestedLoss:
    """``options`` are those of ``F.cross_entropy``."""
    per_dim = torch.stack(
        [F.cross_entropy(z, target, **options) for z in matryoshka_logits(x, weights, biases)]
    )  # [G] or [G, B]
    c = dim_weights.to(per_dim.dtype).reshape(-1, *[1] * (per_dim.ndim - 1))
    return NestedLoss((c * per_dim).sum(0), per_dim.detach())


def matryoshka_predict(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Prediction:
    """Half precision is read as fp32, so that no two scores are equal by rounding alone."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # detached one by one: an export that holds torch.no_grad cannot be loaded again
    x, weights = x.detach().to(dtype), [weight.detach().to(dtype) for weight in weights]
    biases = [None if bias is None else bias.detach().to(dtype) for bias in biases]
    best = matryoshka_logits(x, weights, biases).softmax(-1).max(-1)
    return Prediction(best.indices, best.values)


def similarities(
    x: Tensor, y: Tensor, dims: Sequence[int], normalize: bool = True
) -> Tensor:  # [G, B, C]
    def prefix(t: Tensor, d: int) -> Tensor:
        return F.normalize(t[:, :d]) if normalize else t[:, :d]

    return torch.stack([prefix(x, d) @ prefix(y, d).T for d in dims])


def off_diagonal_moments(
    x: Tensor, dims: Sequence[int], normalize: bool = True
) -> Tensor:  # [G, 2]
    """Means of s and s² over the similarities s of different rows; 0 of a single row."""
    s = similarities(x, x, dims, normalize)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    s = s.masked_fill(itself, 0.0)
    sums = torch.stack([s.sum((1, 2)), s.square().sum((1, 2))], 1)
    return sums / max(len(x) * (len(x) - 1), 1)


def info_nce_rows(spec: InfoNCESpec) -> Tensor:  # [G, B]
    sides = {
        "query": (spec.queries, spec.all_queries),
        "doc": (spec.positives, spec.documents),
    }
    columns = torch.arange(len(spec.documents), dtype=torch.int64, device=spec.queries.device)
    own = columns % spec.period == spec.own_document[:, None]
    is_positive = columns == spec.own_document[:, None]
    logits = {}
    for name in spec.directions:
        left, right = name.split("_to_")
        y = similarities(sides[left][0], sides[right][1], spec.dims, spec.normalize)
        z = y * spec.scale
        if name == "query_to_doc" and spec.hardness_mode is not None:
            hard = {
                "in_batch_negatives": ~own,
                "hard_negatives": own & ~is_positive,
                "all_negatives": ~is_positive,
            }[spec.hardness_mode]
            z = z + torch.where(hard, spec.hardness_strength * y.detach(), 0.0)
        if name == "query_to_query":
            itself = (
                torch.arange(z.shape[2], dtype=torch.int64, device=z.device)
                == spec.own_query[:, None]
            )
            z = z.masked_fill(itself, -torch.inf)
        if name == "doc_to_doc":
            z = z.masked_fill(own, -torch.inf)
        if name in spec.mask:
            z = z.masked_fill(spec.mask[name], -torch.inf)
        logits[name] = z
    rows = torch.arange(len(spec.queries), dtype=torch.int64, device=spec.queries.device)
    hit = logits["query_to_doc"][:, rows, spec.own_document]
    if spec.partition_mode == "joint":
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
    columns = torch.arange(len(documents), dtype=torch.int64, device=queries.device)
    z = similarities(queries, documents, dims) * scale + bias
    return -F.logsigmoid(torch.where(columns == target[:, None], z, -z)).sum(2)


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
