"""Losses over the rows of several ranks: the same problem whole, and as each rank has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mrl_fast import matryoshka_distill, matryoshka_info_nce, matryoshka_sigmoid_loss
from tests.helpers.losses import ALL_WAYS, BOTH_WAYS, DIMS, generator

LAYOUTS = {"ragged": (5, 3, 0, 8), "even": (4, 4, 4, 4), "two": (7, 4)}  # rows of each rank
BLOCKS = 2  # of documents: positives and one hard negative each


class Case(NamedTuple):
    """One loss over the ranks of a layout.

    ``loss`` takes named tensors, a group and ``impl``; its ``options`` tell the problem apart.
    """

    layout: str
    loss: Callable[..., Any]
    options: dict[str, Any]
    noise: float = 1.0  # of positives about their queries; 0.05: p >= .999
    frozen: tuple[str, ...] = ()  # tensors that take no gradient
    learned: tuple[tuple[str, float], ...] = ()  # scalars that do
    impl: str | None = None
    dtype: torch.dtype = torch.float32


def info_nce(t, group, impl, **options):
    if "mask" in t:
        options["mask"] = t["mask"]
    masks = {name.removeprefix("mask:"): t[name] for name in t if name.startswith("mask:")}
    if masks:
        options["mask"] = masks
    if "scale" in t:
        options["scale"] = t["scale"]
    return matryoshka_info_nce(t["q"], [t["p"], t["n"]], DIMS, group=group, impl=impl, **options)


def aimed(t, group, impl, **options):
    """Every second row's positive is another row's hard negative on the same rank."""
    size = len(t["q"])
    place = t["place"][:, 0] if group is not None else t["place"].sum(1)
    target = torch.where(t["place"][:, 0] % 2 == 0, place + size, place)
    return matryoshka_info_nce(
        t["q"], [t["p"], t["n"]], DIMS, group=group, impl=impl, target=target, **options
    )


def lone(t, group, impl, **options):
    """Documents in one tensor, two more a rank than queries."""
    target = None
    if group is None:  # ranks' documents lie end to end
        target = t["place"].sum(1) + 2 * t["number"]
    return matryoshka_info_nce(
        t["q"], t["d"], DIMS, group=group, impl=impl, target=target, **options
    )


def sigmoid(t, group, impl):
    return matryoshka_sigmoid_loss(
        t["q"], t["p"], DIMS, scale=t["scale"], bias=t["bias"], group=group, impl=impl
    )


def distill(t, group, impl, kind, **options):
    student, teacher = (t["q"], t.get("d")), (t["tq"], t["td"])
    if kind == "single":
        student, teacher = t["q"], t["tq"]
    if kind == "scores":
        teacher = t["scores"]
    return matryoshka_distill(student, teacher, DIMS, group=group, impl=impl, **options)


def of_info_nce(layout="ragged", **case):
    fields = {name: case.pop(name) for name in Case._fields if name in case}
    return Case(layout, fields.pop("loss", info_nce), case, **fields)


BOTH = (("scale", 10.0), ("bias", -9.0))
CASES: dict[str, Case] = {
    "plain": of_info_nce(),
    "even": of_info_nce("even"),
    "two ranks": of_info_nce("two"),
    "weights": of_info_nce(dim_weights=(0.5, 2.0, 1.0)),
    "sum": of_info_nce(reduction="sum"),
    "rows": of_info_nce(reduction="none"),
    "clip": of_info_nce(directions=BOTH_WAYS, partition_mode="per_direction"),
    "clip of two": of_info_nce("two", directions=BOTH_WAYS, partition_mode="per_direction"),
    "joint": of_info_nce(directions=BOTH_WAYS),
    "all ways": of_info_nce(directions=ALL_WAYS),
    "in-batch hardness": of_info_nce(hardness_mode="in_batch_negatives", hardness_strength=5.0),
    "own hardness": of_info_nce(hardness_mode="hard_negatives", hardness_strength=5.0),
    "hardness, all ways": of_info_nce(
        hardness_mode="all_negatives", hardness_strength=5.0, directions=ALL_WAYS
    ),
    "scale": of_info_nce(learned=(("scale", 14.0),), directions=BOTH_WAYS),
    "dot": of_info_nce(normalize=False, scale=0.1),
    "mask": of_info_nce(noise=0.5, mask="query_to_doc"),
    "masks": of_info_nce(mask="all", directions=ALL_WAYS),
    "target": of_info_nce(loss=aimed),
    "target, all ways": of_info_nce(loss=aimed, directions=ALL_WAYS),
    "lone": of_info_nce(loss=lone),
    "confident": of_info_nce(noise=0.05, scale=50.0),
    "confident, both ways": of_info_nce(noise=0.05, scale=50.0, directions=BOTH_WAYS),
    "frozen documents": of_info_nce(frozen=("p", "n")),
    "frozen queries": of_info_nce(frozen=("q",)),
    "spread out": of_info_nce(spread_out=(10.0, 10.0)),
    "spread out, rows": of_info_nce(spread_out=(10.0, 10.0), reduction="none"),
    "fp64, spread out": of_info_nce(spread_out=(10.0, 10.0), dtype=torch.float64),
    "sigmoid": Case("ragged", sigmoid, {}, learned=BOTH),
    "sigmoid of two": Case("two", sigmoid, {}, learned=BOTH),
    "distill": Case("ragged", distill, {"kind": "single", "temperature": 0.1}),
    "distill pairs": Case("ragged", distill, {"kind": "pair", "temperature": 1.0}),
    "distill scores": Case("ragged", distill, {"kind": "scores", "temperature": 0.05}),
    "fp64": of_info_nce(directions=ALL_WAYS, dtype=torch.float64),
    "fp64 sigmoid": Case("ragged", sigmoid, {}, learned=BOTH, dtype=torch.float64),
    "fp64 distill": Case(
        "ragged", distill, {"kind": "pair", "temperature": 0.2}, dtype=torch.float64
    ),
    "bf16": of_info_nce(directions=BOTH_WAYS, dtype=torch.bfloat16),
    "kernels": of_info_nce("two", directions=BOTH_WAYS, impl="triton"),
    "kernels, hardness": of_info_nce(
        "two", hardness_mode="all_negatives", hardness_strength=5.0, impl="triton"
    ),
    "kernels, sigmoid": Case("two", sigmoid, {}, learned=BOTH, impl="triton"),
    "kernels, distill": Case("two", distill, {"kind": "pair", "temperature": 0.1}, impl="triton"),
}


def problem(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """All ranks' tensors, fp64, ranks end to end."""
    g, counts = generator(seed), LAYOUTS[case.layout]
    rows, documents = sum(counts), sum(counts) + 2 * len(counts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    q = normal(rows, 48) * torch.linspace(0.2, 5, rows, dtype=torch.float64)[:, None]
    near = q + case.noise * normal(rows, 48)
    number = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # of a row's rank
    first = torch.tensor([sum(counts[:i]) for i in range(len(counts))])[number]
    t = {"q": q, "place": torch.stack([torch.arange(rows) - first, first], 1), "number": number}
    if case.loss in (info_nce, aimed, sigmoid):
        t["p"] = near
    if case.loss in (info_nce, aimed):
        t["n"] = normal(rows, 48)
    if case.loss in (lone, distill):
        d = normal(documents, 48)
        d[torch.arange(rows) + 2 * number] = near
        t["d"] = d
    if case.loss is distill:
        t["tq"], t["td"] = normal(rows, 60), normal(documents, 60)
        t["scores"] = F.normalize(t["tq"]) @ F.normalize(t["td"]).T
        if case.options["kind"] == "single":
            del t["d"]
    widths = {"query_to_doc": BLOCKS * rows, "query_to_query": rows}
    widths |= {"doc_to_query": rows, "doc_to_doc": BLOCKS * rows}
    if wanted := case.options.get("mask"):
        for name in widths if wanted == "all" else [wanted]:
            mask = torch.rand(rows, widths[name], generator=g) < 0.3
            mask[torch.arange(rows), torch.arange(rows)] = False
            t["mask" if wanted != "all" else f"mask:{name}"] = mask
    return t


def on_rank(case: Case, t: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A rank's rows of every tensor."""
    counts = LAYOUTS[case.layout]

    def mine(name: str, x: Tensor) -> Tensor:
        sizes = [n + 2 * (name in ("d", "td")) for n in counts]
        return x.split(sizes)[rank]

    return {name: mine(name, x) for name, x in t.items()}


def run(case: Case, t: dict[str, Tensor], group: Any, impl: str | None, dtype: torch.dtype):
    """Loss (of rows, where it is of rows), each prefix's, and gradients by name."""
    wide = {name: x.to(dtype).clone() if x.is_floating_point() else x for name, x in t.items()}
    if case.loss is distill and "scores" in wide:  # a teacher's scores stay as they are
        wide["scores"] = t["scores"].to(torch.promote_types(dtype, torch.float32))
    leaves = [n for n in ("q", "p", "n", "d") if n in t and n not in case.frozen]
    for name in leaves:
        wide[name].requires_grad_()
    kind = torch.promote_types(dtype, torch.float32)
    for name, value in case.learned:
        wide[name] = torch.tensor(value, dtype=kind, requires_grad=True)
        leaves.append(name)
    options = {name: value for name, value in case.options.items() if name != "mask"}
    out = case.loss(wide, group, impl, **options)
    total = out.loss
    if total.ndim:  # rows: each with a weight of its own
        total = (total * torch.cos(t["place"].sum(1)).to(total.dtype)).sum()
    grads = torch.autograd.grad(total, [wide[name] for name in leaves])
    values = {"loss": out.loss.detach(), "per_dim": out.per_dim}
    return values | {f"d_{n}": grad for n, grad in zip(leaves, grads, strict=True)}


def together(case: Case, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all ranks as those of one process: means as DDP takes them."""
    reduction = case.options.get("reduction", "mean")
    share = 1 / len(parts) if reduction == "mean" else 1.0
    rows = reduction == "none"
    joined = {}
    for name in parts[0]:
        found = [part[name] for part in parts]
        if rows and name in ("loss", "per_dim"):
            joined[name] = torch.cat(found, dim=-1)
        elif name in ("loss", "per_dim", "d_scale", "d_bias"):
            joined[name] = torch.stack(found).sum(0) * share
        else:
            joined[name] = torch.cat(found) * share
    return joined
