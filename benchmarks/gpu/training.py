"""Rows of losses and heads against eager and compiled loops over the prefixes.

A step is forward, backward and gradients; of a head without gradients a forward. Errors are the
largest deviation from fp64 on a few rows, as a part of the largest value of the same tensor, and
ours may be twice the loop's in the same dtype. At the timed shape, where offsets are large, our
gradients are compared with the loop's. So are those of the compiled loop, whose error is otherwise
taken to be the loop's. FLOPs are those we execute: 2 a pair and column forward, 2 again in the
backward, 4 for both gradients. Bytes: inputs read twice, their gradients written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rivals
from benchmarks.gpu.measure import (
    COMPILED,
    DEVICE,
    DTYPES,
    OURS,
    Call,
    Row,
    Work,
    distinct,
    generator,
)
from benchmarks.rivals import NOMIC, RESNET, VOCABULARY, Case, step_of
from mrl_fast import (
    matryoshka_cross_entropy,
    matryoshka_info_nce,
    matryoshka_predict,
)

HEADS = ("tied", "logits", "predict")
FORWARD_ONLY = ("logits", "predict")
JUDGED_ROWS = 253  # odd, so that no tile is whole
# The most that ours may differ from the loop, which rounds every prefix's sum.
LARGE = {"bf16": 5e-2, "fp16": 1e-2, "fp32": 1e-4}
LARGE_TF32 = 1e-2
GRADIENT_SCALE = 4096.0


class Training(NamedTuple):
    case: Case
    dtype: str = "bf16"
    precision: str = "highest"
    headline: bool = False

    @property
    def name(self) -> str:
        tf32 = "-tf32" if self.precision == "high" else ""
        kind, rows, classes, dims, *_ = self.case
        return f"{kind}-{self.dtype}{tf32}-b{rows}-v{classes}-d{dims[-1]}"

    @property
    def shape(self) -> str:
        dims = self.case.dims
        pairs = f"{self.case.rows:,} × {self.case.classes:,}"
        return f"{pairs}, {len(dims)} dims {dims[0]}…{dims[-1]}"

    def tiny(self) -> Training:
        classes = 24 if self.case.kind in HEADS else 10
        case = self.case._replace(rows=10, classes=classes, dims=(4, 8, 16))
        return self._replace(case=case, headline=False)

    def work(self) -> Work:
        if DEVICE == "cuda":
            torch._dynamo.reset()
        dtype, tf32 = DTYPES[self.dtype], self.precision == "high"
        few = self.case._replace(rows=min(self.case.rows, JUDGED_ROWS))
        few = few if few.kind in HEADS else few._replace(classes=few.rows)
        leaves = leaves_of(few, dtype)
        small = steps_of(few, leaves)
        wide = [t.detach().double().requires_grad_() for t in leaves]

        def seen(found: list[Tensor]) -> list[Tensor]:
            if few.kind != "predict":
                return found
            logits = steps_of(few._replace(kind="logits"), wide)["loop"]()[0]
            return [
                found[0],
                logits.gather(2, found[1][:, :, None]),
            ]  # labels count by their logits

        truth = copies(seen(steps_of(few, wide)["loop"]()))
        loop_error = error_of(seen(small["loop"]()), truth)
        steps = steps_of(self.case, leaves_of(self.case, dtype))
        large = copies(steps["loop"]())
        difference = error_of(steps[OURS](), large)
        limit = LARGE_TF32 if tf32 else LARGE[self.dtype]
        assert difference <= limit, f"at the timed shape {difference:.2e} from the loop"
        if self.dtype != "bf16":
            steps.pop(COMPILED, None)

        def judge(name: str) -> float:
            if name == COMPILED:  # compiled for the timed shape only, where no fp64 is affordable
                agreed = error_of(steps[name](), large)
                return loop_error if agreed <= limit else agreed
            return error_of(seen(small[name]()), truth)

        budget = 2 * (loop_error + torch.finfo(dtype).eps)
        return Work(
            steps, judge, "error", budget, moved_bytes(self.case, dtype.itemsize),
            {"tf32" if tf32 else self.dtype: rivals.flops(self.case)}, formula(self.case),
            {"difference_from_loop": difference},
        )  # fmt: skip


def rows(*, tiny: bool) -> Iterator[Row]:
    for spec, made in distinct(TRAININGS, tiny=tiny):
        yield Row(spec.name, made.shape, spec.dtype, made.work, spec.precision, spec.headline)


TRAININGS = [
    Training(Case("info_nce", 32768, 32768, NOMIC), headline=True),
    Training(Case("tied", 8192, 32768, VOCABULARY), headline=True),
    Training(Case("tied", 4096, 1000, RESNET), headline=True),  # the paper's ImageNet head
    Training(Case("predict", 8192, 128256, VOCABULARY), headline=True),
    *(
        Training(Case("info_nce", 8192, 8192, NOMIC), "fp32", precision)
        for precision in ("highest", "high")
    ),
]


def leaves_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Queries and documents, or x ``[B, D]`` and the weights ``[V, D]``."""
    source = generator(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=DEVICE)

    first = randn(case.rows, case.dims[-1])
    if case.kind in HEADS:
        other = randn(case.classes, case.dims[-1]) / case.dims[-1] ** 0.5
    else:
        other = first + randn(*first.shape)
    return [t.to(dtype).requires_grad_() for t in (first, other)]


def steps_of(case: Case, leaves: list[Tensor]) -> dict[str, Call]:
    if case.kind in FORWARD_ONLY:
        return rivals.without_gradients(_heads(case, *leaves))
    losses = (_cross_entropy if case.kind in HEADS else _pairs)(case, *leaves)
    if DEVICE == "cuda":
        losses[COMPILED] = torch.compile(losses["loop"], dynamic=False)
    return {name: step_of(leaves, scaled(loss)) for name, loss in losses.items()}


def scaled(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Scales a loss as a GradScaler would: the gradients of a mean are too small for fp16, and
    other dtypes do not mind."""
    return lambda: loss() * GRADIENT_SCALE


def _pairs(case: Case, q: Tensor, p: Tensor) -> dict[str, Callable[[], Tensor]]:
    target = torch.arange(case.rows, device=DEVICE)

    def loop() -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for d in case.dims:
            scores = 20.0 * F.normalize(q[:, :d]) @ F.normalize(p[:, :d]).T
            total = total + F.cross_entropy(scores, target)
        return total

    return {
        OURS: lambda: matryoshka_info_nce(q, p, case.dims, impl=impl_of(q)).loss,
        "loop": loop,
    }


def _cross_entropy(case: Case, x: Tensor, w: Tensor) -> dict[str, Callable[[], Tensor]]:
    target = torch.randint(case.classes, (case.rows,), generator=generator(1), device=DEVICE)

    def loop() -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for d in case.dims:
            total = total + F.cross_entropy(F.linear(x[:, :d], w[:, :d]), target)
        return total

    return {
        OURS: lambda: matryoshka_cross_entropy(x, w, target, case.dims, impl=impl_of(x)).loss,
        "loop": loop,
    }


def _heads(case: Case, x: Tensor, w: Tensor) -> dict[str, Call]:
    dims = case.dims
    if case.kind == "logits":  # what a prediction is judged by
        return {"loop": lambda: [torch.stack([F.linear(x[:, :d], w[:, :d]) for d in dims])]}

    def loop() -> list[Tensor]:
        best = [F.linear(x[:, :d], w[:, :d]).softmax(-1).max(-1) for d in dims]
        return [torch.stack([b.values for b in best]), torch.stack([b.indices for b in best])]

    steps: dict[str, Call] = {
        OURS: lambda: [*reversed(matryoshka_predict(x, w, dims, impl=impl_of(x)))],
        "loop": loop,
    }
    if DEVICE == "cuda":
        steps[COMPILED] = torch.compile(loop, dynamic=False)
    return steps


def impl_of(x: Tensor) -> str:
    return "reference" if x.dtype == torch.float64 else "triton"


def moved_bytes(case: Case, size: int) -> float:
    inputs = (case.rows + case.classes) * case.dims[-1]
    return size * inputs * (1 if case.kind in FORWARD_ONLY else 3)


def formula(case: Case) -> str:
    if case.kind in FORWARD_ONLY:
        return "2·B·V·D FLOPs; (B + V)·D numbers"
    return "8·B·V·D FLOPs, of which 2 recompute; 3·(B + V)·D numbers"


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def error_of(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest deviation, as a part of the largest value of the same tensor."""
    return max(
        ((f.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-30)).item()
        for f, e in zip(found, exact, strict=True)
        if e.is_floating_point()
    )
