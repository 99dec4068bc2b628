"""Every loss that is timed, ours and the rivals', as steps: forward, backward, gradients.

    python -m benchmarks.rivals CASE PROVIDER [ROWS]      # one step's extra peak memory, in MiB

Rivals see the same embeddings and weights. "compiled" is the loop over prefixes under
torch.compile; sentence-transformers' losses run over a model that hands out fixed embeddings.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl_fast import (
    matryoshka_cross_entropy,
    matryoshka_info_nce,
    matryoshka_logits,
    matryoshka_predict,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # of a step; fp64 to judge by
Step = Callable[[], list[Tensor]]


class Case(NamedTuple):
    kind: str
    rows: int
    classes: int  # of a head; InfoNCE has as many documents as queries
    dims: tuple[int, ...]
    repetitions: int = 5
    quick: bool = False  # only the rivals that may be the best


NOMIC = (64, 128, 256, 512, 768)
VOCABULARY = (16, 32, 64, 128, 256, 512, 1024)
RESNET = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CASES = {
    # in-batch negatives of a text encoder, and half as many
    "info_nce": Case("info_nce", 8192, 8192, NOMIC, 3),
    "info_nce-half": Case("info_nce", 4096, 4096, NOMIC, 5, True),
    "clip": Case("clip", 4096, 4096, NOMIC, 3),
    # MRL-E over a vocabulary
    "tied": Case("tied", 2048, 32768, VOCABULARY, 2),
    "tied-half": Case("tied", 1024, 32768, VOCABULARY, 2, True),
    "separate": Case("separate", 2048, 32768, VOCABULARY, 2),
    # the paper's ImageNet head, MRL-E and MRL
    "imagenet": Case("tied", 1024, 1000, RESNET, 9),
    "imagenet-double": Case("tied", 2048, 1000, RESNET, 9),
    "imagenet-separate": Case("separate", 1024, 1000, RESNET, 9),
    # no gradients: every logit, and the best class only
    "logits": Case("logits", 1024, 8192, VOCABULARY),
    "logits-double": Case("logits", 2048, 8192, VOCABULARY),
    "predict": Case("predict", 1024, 32768, VOCABULARY),
    "predict-double": Case("predict", 2048, 32768, VOCABULARY),
}
GPU_CASES = {
    "info_nce-gpu": Case("info_nce", 32768, 32768, NOMIC, 9),
    "tied-gpu": Case("tied", 16384, 30522, (12, 24, 48, 96, 192, 384, 768), 9),
    "imagenet-gpu": Case("tied", 4096, 1000, RESNET, 9),
    "logits-gpu": Case("logits", 8192, 30522, (12, 24, 48, 96, 192, 384, 768), 9),
}


class Fixed(nn.Sequential):
    """Stands for an encoder: its features are the embeddings."""

    def __init__(self):
        super().__init__(nn.Identity())

    def forward(self, features):  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"sentence_embedding": features["embedding"]}

    def get_embedding_dimension(self):
        return None


SLOW = {"sentence_transformers_cached", "linear_cross_entropy_chunked"}


def providers(case: Case) -> dict[str, Step]:
    torch.manual_seed(0)
    steps = {
        "info_nce": _info_nce,
        "clip": _clip,
        "tied": _cross_entropy,
        "separate": _cross_entropy,
        "logits": _logits,
        "predict": _predict,
    }[case.kind](case)
    return {name: step for name, step in steps.items() if not (case.quick and name in SLOW)}


def step_of(leaves: list[Tensor], loss: Callable[[], Tensor]) -> Step:
    def step() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    return step


def embeddings(case: Case) -> list[Tensor]:
    q = torch.randn(case.rows, case.dims[-1])
    p = q + torch.randn_like(q)
    return [t.to(DEVICE, DTYPE).requires_grad_() for t in (q, p)]


def _info_nce(case: Case) -> dict[str, Step]:
    q, p = leaves = embeddings(case)
    ours = step_of(leaves, lambda: matryoshka_info_nce(q, p, case.dims).loss)
    try:
        from sentence_transformers.sentence_transformer import losses
    except ModuleNotFoundError:  # the same by hand
        target = torch.arange(case.rows, device=DEVICE)

        def by_hand() -> Tensor:
            total = q.new_zeros(())
            for d in case.dims:
                logits = 20.0 * F.normalize(q[:, :d]) @ F.normalize(p[:, :d]).T
                total = total + F.cross_entropy(logits, target)
            return total

        return {
            "mrl_fast": ours,
            "loop": step_of(leaves, by_hand),
            "compiled": step_of(leaves, torch.compile(by_hand)),
        }

    model = Fixed()
    inner = losses.MultipleNegativesRankingLoss(model)  # pyright: ignore[reportArgumentType]
    nested = losses.MatryoshkaLoss(model, inner, [*case.dims])  # pyright: ignore
    cached = losses.CachedMultipleNegativesRankingLoss(
        model,  # pyright: ignore[reportArgumentType]
        mini_batch_size=512,  # 32 is a tenth leaner and five times slower, 2048 a quarter faster
    )
    # This replaces the method of `cached` that is called below by one that sums over the dims.
    losses.MatryoshkaLoss(model, cached, [*case.dims])  # pyright: ignore[reportArgumentType]

    def loop() -> Tensor:
        return sum(
            (inner.compute_loss_from_embeddings([q[:, :d], p[:, :d]], None) for d in case.dims),  # pyright: ignore
            q.new_zeros(()),
        )

    def by_chunks() -> list[Tensor]:
        q.grad = p.grad = None
        cached.calculate_loss([[q], [p]], None, with_backward=True)
        return [g for g in (q.grad, p.grad) if g is not None]

    return {
        "mrl_fast": ours,
        "loop": step_of(leaves, loop),
        "sentence_transformers": step_of(
            leaves, lambda: nested([{"embedding": q}, {"embedding": p}], None)
        ),
        "sentence_transformers_cached": by_chunks,
        "compiled": step_of(leaves, torch.compile(loop)),
    }


def _clip(case: Case) -> dict[str, Step]:
    q, p = leaves = embeddings(case)
    target = torch.arange(case.rows, device=DEVICE)

    def loop() -> Tensor:
        total = q.new_zeros(())
        for d in case.dims:
            logits = 20.0 * F.normalize(q[:, :d]) @ F.normalize(p[:, :d]).T
            total = (
                total + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            )
        return total

    options = dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    return {
        "mrl_fast": step_of(
            leaves,
            lambda: matryoshka_info_nce(q, p, case.dims, **options).loss,  # pyright: ignore
        ),
        "loop": step_of(leaves, loop),
        "compiled": step_of(leaves, torch.compile(loop)),
    }


def head_of(case: Case) -> tuple[Tensor, list[Tensor], Tensor]:
    x = torch.randn(case.rows, case.dims[-1]).to(DEVICE, DTYPE).requires_grad_()
    widths = case.dims if case.kind == "separate" else case.dims[-1:]
    weights = [
        (torch.randn(case.classes, d) / d**0.5).to(DEVICE, DTYPE).requires_grad_() for d in widths
    ]
    return x, weights, torch.randint(case.classes, (case.rows,)).to(DEVICE)


def _cross_entropy(case: Case) -> dict[str, Step]:
    x, weights, target = head_of(case)
    tied = case.kind != "separate"
    leaves = [x, *weights]

    def heads() -> list[Tensor]:
        return [weights[0][:, :d] for d in case.dims] if tied else weights

    def loop() -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for d, w in zip(case.dims, heads(), strict=True):
            total = total + F.cross_entropy(F.linear(x[:, :d], w), target)
        return total

    def fused(options) -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for d, w in zip(case.dims, heads(), strict=True):
            total = total + F.linear_cross_entropy(x[:, :d], w, target, **options)
        return total

    steps = {
        "mrl_fast": step_of(
            leaves,
            lambda: (
                matryoshka_cross_entropy(x, weights[0] if tied else weights, target, case.dims).loss
            ),
        ),
        "loop": step_of(leaves, loop),
        "compiled": step_of(leaves, torch.compile(loop)),
    }
    if hasattr(F, "linear_cross_entropy"):
        chunked = {"options": torch.nn.LinearCrossEntropyOptions()}
        steps["linear_cross_entropy"] = step_of(leaves, lambda: fused({}))
        steps["linear_cross_entropy_chunked"] = step_of(leaves, lambda: fused(chunked))
    if DEVICE == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ModuleNotFoundError:
            return steps
        liger = LigerFusedLinearCrossEntropyLoss()
        steps["liger"] = step_of(
            leaves,
            lambda: sum(
                (liger(w, x[:, :d], target) for d, w in zip(case.dims, heads(), strict=True)),
                x.new_zeros(()),
            ),
        )
    return steps


def _logits(case: Case) -> dict[str, Step]:
    x, (w,), _ = head_of(case)

    def loop() -> Tensor:
        return torch.stack([F.linear(x[:, :d], w[:, :d]) for d in case.dims])

    def in_place() -> Tensor:
        out = x.new_empty(len(case.dims), case.rows, case.classes)
        for g, d in enumerate(case.dims):
            torch.mm(x[:, :d], w[:, :d].T, out=out[g])
        return out

    return without_gradients(
        {
            "mrl_fast": lambda: [matryoshka_logits(x, w, case.dims)],
            "loop": lambda: [loop()],
            "loop_in_place": lambda: [in_place()],
            "list": lambda: [F.linear(x[:, :d], w[:, :d]) for d in case.dims],
        }
    )


def _predict(case: Case) -> dict[str, Step]:
    x, (w,), _ = head_of(case)

    def loop() -> list[Tensor]:
        best = [F.linear(x[:, :d], w[:, :d]).softmax(-1).max(-1) for d in case.dims]
        return [torch.stack([b.values for b in best]), torch.stack([b.indices for b in best])]

    compiled = torch.compile(loop)
    return without_gradients(
        {
            "mrl_fast": lambda: [*reversed(matryoshka_predict(x, w, case.dims))],
            "loop": loop,
            "compiled": compiled,
        }
    )


def without_gradients(steps: dict[str, Step]) -> dict[str, Step]:
    return {name: torch.no_grad()(step) for name, step in steps.items()}


def flops(case: Case) -> float:
    """FLOPs of our step: 2 a pair and column forward, 6 backward; Σd columns for separate heads."""
    columns = sum(case.dims) if case.kind == "separate" else case.dims[-1]
    return (2.0 if case.kind in ("logits", "predict") else 8.0) * case.rows * case.classes * columns


def peak_mib(step: Step) -> float:
    """The most memory that a step takes beyond what was in use before, its results included."""
    if DEVICE == "cuda":
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(field: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field))

    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak from here on
    before = status("VmRSS:")
    step()
    return (status("VmHWM:") - before) / 2**10


def main() -> None:
    case, provider = ({**CASES, **GPU_CASES})[sys.argv[1]], sys.argv[2]
    if len(sys.argv) > 3:
        rows = int(sys.argv[3])
        case = case._replace(rows=rows, classes=rows if case.kind == "info_nce" else case.classes)
    # This loads libraries and compiles, without leaving in the allocator what a large step would.
    small = case._replace(
        rows=64, classes=64 if case.kind in ("info_nce", "clip") else case.classes
    )
    if provider == "compiled":
        providers(case)[provider]()
    else:
        providers(small)[provider]()
    gc.collect()
    steps = providers(case)
    print(round(peak_mib(steps[provider]), 1))


if __name__ == "__main__":
    main()
