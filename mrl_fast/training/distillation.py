"""A teacher's similarity rows and a student's: their KL divergence, and the student's gradients.

Teacher probabilities are made for some rows at a time. Columns may be a part of all: then the
divergence is that of the part's own softmaxes, and gradients are told the log-sums of all columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mrl_fast.shared.dispatch import module_of
from mrl_fast.training.ops import Fold
from mrl_fast.training.spec import FoldSpec, Upstream

CHUNK_BYTES = 16 << 20  # of teacher probabilities held at a time


class DistillSpec(NamedTuple):
    """What the op reads: the student's sides in fp32, and the teacher."""

    x: Tensor  # [B, D]
    weight: Tensor  # [C, D]
    dims: Sequence[int]
    row_scale: Tensor  # [G, B] fp32
    col_scale: Tensor  # [G, C] fp32
    rows: Tensor  # the teacher's scores [B, C], or its normalised rows [B, E]
    cols: Tensor | None  # [C, E]
    temperature: float
    compute_dtype: torch.dtype | None

    def fold(self, part: slice, soft: Tensor) -> FoldSpec:
        """The student's fold of some rows, with the teacher's probabilities."""
        return FoldSpec(
            self.x[part], self.weight, self.dims, row_scale=self.row_scale[:, part],
            col_scale=self.col_scale, soft=soft, compute_dtype=self.compute_dtype,
        )  # fmt: skip

    def teacher(self) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of rows, and the teacher's scores over the temperature there, ``[b, C]`` fp32."""
        step = max(64, CHUNK_BYTES // (4 * max(1, len(self.weight))))
        for begin in range(0, len(self.rows), step):
            part = slice(begin, min(begin + step, len(self.rows)))
            rows, cols = self.rows[part], self.cols
            # The backward makes these again, and must get the same in any autocast context.
            with torch.autocast(rows.device.type, enabled=False):
                scores = rows.float() if cols is None else rows @ cols.T
                yield part, scores / self.temperature


class Student(NamedTuple):
    """What a backward is given: statistics of the forward, and the loss's derivative with respect
    to the KL; ``[G, B]``."""

    row_max: Tensor
    row_log: Tensor
    log_sum: Tensor  # [B] fp64, of the teacher, see Divergence
    d_kl: Tensor


class Divergence(NamedTuple):
    """Of every row and prefix, with the student's statistics and the teacher's."""

    kl: Tensor  # [G, B] fp64, as the next
    row_log: Tensor
    row_max: Tensor  # [G, B] fp32
    log_sum: Tensor  # [B] fp64, of the teacher's scores over the temperature


def log_sums(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The scores ``[b, C]`` less their row's maximum, and the log Σ exp of these, ``[b]`` fp64,
    with that maximum: −∞ where all scores are."""
    top = scores.amax(1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    shifted = scores - top
    return shifted, torch.stack([shifted.exp().sum(1, dtype=torch.float64).log(), top[:, 0]])


def divergence(spec: DistillSpec, impl: str) -> Divergence:
    """KL of each row's softmax from the teacher's, over the columns of ``spec``."""
    out = torch.empty_like(spec.row_scale)
    found = Divergence(out.double(), out.double(), out, out[0].double())
    if not len(spec.weight):
        for t, value in zip(found, (0.0, 0.0, -torch.inf, -torch.inf), strict=True):
            t.fill_(value)
        return found
    for part, scores in spec.teacher():
        shifted, (log, top) = log_sums(scores)
        logp = shifted - torch.where(log == -torch.inf, 0.0, log).float()[:, None]
        p = logp.exp()
        f = Fold(*module_of(impl, "training").fold_forward(spec.fold(part, p)))
        entropy = torch.where(p > 0, p * logp, 0.0).double().sum(1)  # −H, [b]
        found.kl[:, part] = entropy - f.soft_sum  # a small difference of larger numbers
        found.row_max[:, part], found.row_log[:, part] = f.row_max, f.row_log
        found.log_sum[part] = log + top
    return found


def student_gradients(
    spec: DistillSpec, student: Student, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight and both scales, by the statistics of these columns, or of more of
    which they are a part."""
    dx, dw, d_rows, d_cols = (
        torch.zeros_like(t, memory_format=torch.contiguous_format)
        for t in (spec.x, spec.weight, spec.row_scale, spec.col_scale)
    )
    for part, scores in spec.teacher() if len(spec.weight) else ():
        shifted, (_, top) = log_sums(scores)
        p = (shifted - (student.log_sum[part] - top).float()[:, None]).exp()
        row_max, row_log, d_kl = (
            t[:, part] for t in (student.row_max, student.row_log, student.d_kl)
        )
        # A fold's soft sum takes Σ p of the student's softmax, a part of the columns all of it.
        rest = (1.0 - p.sum(1, dtype=torch.float64)).float() * d_kl
        upstream = Upstream(row_max, row_log, None, None, rest, None, -d_kl, None)
        found = module_of(impl, "training").fold_backward(spec.fold(part, p), upstream)
        dx[part], more, _, d_rows[:, part], more_cols = found
        dw += more
        d_cols += more_cols
    return dx, dw, d_rows, d_cols


def empty_divergence(spec: DistillSpec) -> tuple[Tensor, ...]:
    """Tensors as those of the forward op, with nothing in them."""
    scale = spec.row_scale
    log_sum = scale.new_empty(scale.shape[1], dtype=torch.float64)
    return *(torch.empty_like(scale) for _ in range(3)), log_sum


def empty_gradients(spec: DistillSpec) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (spec.x, spec.weight, spec.row_scale, spec.col_scale)
    )
