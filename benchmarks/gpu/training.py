"""Part 5: losses and heads against eager and compiled loops over the prefixes, Liger and CCE.

A step is forward, backward and gradients; of a head without gradients a forward. Errors are the
largest deviation from fp64 on a few rows, as a part of the largest value of the same tensor, and
ours may be twice the loop's in the same dtype. At the timed shape, where offsets are large, our
gradients are held to the loop's; so are those of the compiled loop, which else is said to err as
the loop. FLOPs are those we execute: 2 a pair and column forward, 2 again in the backward, 4 for
both gradients. Bytes: inputs read twice, their gradients written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rivals
from benchmarks.gpu.measure import (
    DEVICE,
    DTYPES,
    OURS,
    Call,
    Row,
    Work,
    distinct,
    generator,
    lazily,
)
from benchmarks.gpu.rivals import installed
from benchmarks.rivals import NOMIC, RESNET, VOCABULARY, Case, step_of
from mrl_fast import (
    matryoshka_cross_entropy,
    matryoshka_info_nce,
    matryoshka_logits,
    matryoshka_predict,
)

HEADS = ("tied", "separate", "logits", "predict")
FORWARD_ONLY = ("logits", "predict")
JUDGED_ROWS = 253  # odd, so that no tile is whole
LARGE = {"bf16": 5e-2, "fp16": 1e-2, "fp32": 1e-4}  # from the loop, which rounds every prefix's sum
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
            ]  # a label is its logit's worth

        truth = copies(seen(steps_of(few, wide)["loop"]()))
        loop_error = error_of(seen(small["loop"]()), truth)
        steps = steps_of(self.case, leaves_of(self.case, dtype))
        large = copies(steps["loop"]())
        difference = error_of(steps[OURS](), large)
        limit = LARGE_TF32 if tf32 else LARGE[self.dtype]
        assert difference <= limit, f"at the timed shape {difference:.2e} from the loop"
        if self.dtype != "bf16":
            steps.pop("compiled", None)

        def judge(name: str) -> float:
            if name == "compiled":  # compiled for the timed shape only, where no fp64 is affordable
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


def same(kind: str, rows: int) -> Case:
    return Case(kind, rows, rows, NOMIC)


TRAININGS = [
    Training(same("info_nce", 32768), headline=True),
    Training(Case("tied", 8192, 32768, VOCABULARY), headline=True),
    Training(Case("tied", 4096, 1000, RESNET), headline=True),  # the paper's ImageNet head
    Training(same("clip", 16384), headline=True),
    Training(Case("tied", 4096, 128256, VOCABULARY), headline=True),
    Training(Case("separate", 8192, 32768, VOCABULARY), headline=True),
    Training(Case("logits", 8192, 32768, VOCABULARY), headline=True),
    Training(Case("predict", 8192, 128256, VOCABULARY), headline=True),
    Training(same("info_nce", 8192)),
    Training(Case("separate", 4096, 1000, RESNET)),
    *(Training(same("info_nce", 8192), "fp32", precision) for precision in ("high", "highest")),
    Training(same("info_nce", 8192), "fp16"),
    *(
        Training(Case("tied", 4096, 32768, VOCABULARY), "fp32", precision)
        for precision in ("high", "highest")
    ),
    Training(Case("tied", 4096, 32768, VOCABULARY), "fp16"),
    Training(same("clip", 8192), "fp32", "high"),
]


def leaves_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Queries and documents, or x ``[B, D]`` and the weights ``[V, d]``."""
    source = generator(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=DEVICE)

    first = randn(case.rows, case.dims[-1])
    if case.kind not in HEADS:
        leaves = [first, first + randn(*first.shape)]
    else:
        widths = case.dims if case.kind == "separate" else case.dims[-1:]
        leaves = [first, *(randn(case.classes, d) / d**0.5 for d in widths)]
    return [t.to(dtype).requires_grad_() for t in leaves]


def steps_of(case: Case, leaves: list[Tensor]) -> dict[str, Call]:
    if case.kind in FORWARD_ONLY:
        return rivals.without_gradients(_heads(case, *leaves))
    losses = _pairs(case, *leaves) if case.kind not in HEADS else _cross_entropy(case, leaves)
    if DEVICE == "cuda":
        losses["compiled"] = torch.compile(losses["loop"], dynamic=False)
    return {name: step_of(leaves, scaled(loss)) for name, loss in losses.items()}


def scaled(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """As a GradScaler would: fp16 has no room for the gradients of a mean, other dtypes do not
    mind."""
    return lambda: loss() * GRADIENT_SCALE


def _pairs(case: Case, q: Tensor, p: Tensor) -> dict[str, Callable[[], Tensor]]:
    target = torch.arange(case.rows, device=DEVICE)
    clip = case.kind == "clip"
    options: Any = {"impl": impl_of(q)}
    if clip:
        directions = ("query_to_doc", "doc_to_query")
        options |= {"directions": directions, "partition_mode": "per_direction"}

    def loop() -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for d in case.dims:
            scores = 20.0 * F.normalize(q[:, :d]) @ F.normalize(p[:, :d]).T
            loss = F.cross_entropy(scores, target)
            total = total + ((loss + F.cross_entropy(scores.T, target)) / 2 if clip else loss)
        return total

    return {OURS: lambda: matryoshka_info_nce(q, p, case.dims, **options).loss, "loop": loop}


def _cross_entropy(case: Case, leaves: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    x, *weights = leaves
    tied = case.kind == "tied"
    target = torch.randint(case.classes, (case.rows,), generator=generator(1), device=DEVICE)

    def summed(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        def over_prefixes() -> Tensor:
            total = torch.zeros((), device=DEVICE)
            for g, d in enumerate(case.dims):
                total = total + loss(x[:, :d], weights[0][:, :d] if tied else weights[g])
            return total

        return over_prefixes

    heads = weights[0] if tied else weights
    impl = impl_of(x)
    losses = {
        OURS: lambda: matryoshka_cross_entropy(x, heads, target, case.dims, impl=impl).loss,
        "loop": summed(lambda x, w: F.cross_entropy(F.linear(x, w), target)),
    }
    if hasattr(F, "linear_cross_entropy"):  # since PyTorch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        losses["linear_cross_entropy"] = summed(lambda x, w: F.linear_cross_entropy(x, w, target))
        losses["linear_cross_entropy_chunked"] = summed(
            lambda x, w: F.linear_cross_entropy(x, w, target, options=options)
        )
    if DEVICE == "cuda":
        if installed("liger_kernel"):
            losses["liger"] = lazily(lambda: summed(_liger(target)))
        if installed("cut_cross_entropy"):
            losses["cut_cross_entropy"] = lazily(lambda: summed(_cce(target)))
    return losses


def _liger(target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    module: Any = importlib.import_module("liger_kernel.transformers")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return lambda x, w: loss(w, x, target)


def _cce(target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    module: Any = importlib.import_module("cut_cross_entropy")
    return lambda x, w: module.linear_cross_entropy(x, w, target)


def _heads(case: Case, x: Tensor, w: Tensor) -> dict[str, Call]:
    dims, impl = case.dims, impl_of(x)

    def loop() -> list[Tensor]:
        best = [F.linear(x[:, :d], w[:, :d]).softmax(-1).max(-1) for d in dims]
        return [torch.stack([b.values for b in best]), torch.stack([b.indices for b in best])]

    def in_place() -> list[Tensor]:
        out = x.new_empty(len(dims), case.rows, case.classes)
        for g, d in enumerate(dims):
            torch.mm(x[:, :d], w[:, :d].T, out=out[g])
        return [out]

    if case.kind == "predict":
        steps: dict[str, Call] = {
            OURS: lambda: [*reversed(matryoshka_predict(x, w, dims, impl=impl))],
            "loop": loop,
        }
        if DEVICE == "cuda":
            steps["compiled"] = torch.compile(loop, dynamic=False)
        return steps
    return {
        OURS: lambda: [matryoshka_logits(x, w, dims, impl=impl)],
        "loop": lambda: [torch.stack([F.linear(x[:, :d], w[:, :d]) for d in dims])],
        "loop_in_place": in_place,
    }


def impl_of(x: Tensor) -> str:
    return "reference" if x.dtype == torch.float64 else "triton"


def moved_bytes(case: Case, size: int) -> float:
    columns = sum(case.dims) if case.kind == "separate" else case.dims[-1]
    inputs = case.rows * case.dims[-1] + case.classes * columns
    if case.kind == "logits":
        return size * (inputs + len(case.dims) * case.rows * case.classes)
    return size * inputs * (1 if case.kind == "predict" else 3)


def formula(case: Case) -> str:
    columns = "Σd" if case.kind == "separate" else "D"
    inputs = f"B·D + V·{columns}"
    if case.kind == "logits":
        return f"2·B·V·D FLOPs; {inputs} + G·B·V numbers"
    if case.kind == "predict":
        return f"2·B·V·D FLOPs; {inputs} numbers"
    return f"8·B·V·{columns} FLOPs, of which 2 recompute; 3·({inputs}) numbers"


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def error_of(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest deviation, as a part of the largest value of the same tensor."""
    return max(
        ((f.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-30)).item()
        for f, e in zip(found, exact, strict=True)
        if e.is_floating_point()
    )
