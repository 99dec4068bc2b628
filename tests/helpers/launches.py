"""What each call launches and waits for, on a stand-in for a GPU: one JSON object a case.

    python -m tests.helpers.launches

It runs in a process of its own, as Triton must not be interpreted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.gpu import stub

stub.install()

import torch  # noqa: E402

from mrl_fast import (  # noqa: E402
    MatryoshkaIndex,
    funnel_search,
    matryoshka_cross_entropy,
    matryoshka_info_nce,
    matryoshka_logits,
    matryoshka_predict,
    prefix_topk,
    rerank,
)

DIMS = (64, 128, 256)


def on_device(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def step(loss: Callable[..., Any], *inputs: torch.Tensor) -> Callable[[], None]:
    leaves = [x.requires_grad_() for x in inputs]
    return lambda: loss(*leaves).loss.backward()


def cases() -> dict[str, Callable[[], Any]]:
    x, q = on_device(10_000_000, 64), on_device(1024, 64)
    wide, rows = on_device(100_000, 256), on_device(1024, 200, dtype=torch.int64)
    few = on_device(1024, 256)
    a, b, w = (on_device(n, 256) for n in (2048, 2048, 5000))
    c, d = (on_device(32768, 256) for _ in "cd")
    target = on_device(2048, dtype=torch.int64)
    index = MatryoshkaIndex((64, 256), device="cuda")
    coded = MatryoshkaIndex((64, 256), device="cuda", prefix_dtype="int8")
    for one in (index, coded):
        one.add(torch.randn(40_000, 256, generator=torch.Generator().manual_seed(0)))
    asked = on_device(8, 256, dtype=torch.float32)
    many = on_device(1024, 256, dtype=torch.float32)
    stages = [(64, 100), (256, 10)]
    return {
        "topk, one query": lambda: prefix_topk(q[:1], x, 100),
        "topk, 32 queries": lambda: prefix_topk(q[:32], x, 100),
        "topk, 1024 queries": lambda: prefix_topk(q, x, 100),
        "rerank": lambda: rerank(few, wide, rows, 10),
        "funnel": lambda: funnel_search(few, wide, stages),
        "cross_entropy": step(lambda x, w: matryoshka_cross_entropy(x, w, target, DIMS), a, w),
        "info_nce": step(lambda q, p: matryoshka_info_nce(q, p, DIMS), a, b),
        "info_nce, chunks": step(lambda q, p: matryoshka_info_nce(q, p, DIMS), c, d),
        "logits": lambda: matryoshka_logits(a.detach(), w.detach(), DIMS),
        "predict": lambda: matryoshka_predict(a.detach(), w.detach(), DIMS),
        "index, stages": lambda: index.search(asked, 10, stages=stages),
        "index, codes": lambda: coded.search(asked, 10, stages=stages),
        "index, many queries": lambda: index.search(many, 10, stages=stages),
        "index, exact": lambda: index.search(asked, 10, exact=True),
        "index, exact by codes": lambda: coded.search(asked, 10, exact=True),
    } | {f"does not capture: {name}": call for name, call in impossible(asked).items()}


def impossible(x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Calls that a CUDA graph cannot capture, one for each reason, to see that the stub notices."""
    return {
        "item": lambda: x.amax().item(),
        "bool": lambda: bool((x > 0).any()),
        "cpu": lambda: x.cpu(),
        "mask": lambda: x[x > 0],
        "nonzero": lambda: x.nonzero(),
        "tensor": lambda: torch.tensor([1.0], device="cuda"),
        "to": lambda: torch.ones(3).to(x.device, non_blocking=True),
        "copy_": lambda: x[0, :3].copy_(torch.ones(3)),
        "synchronize": lambda: torch.cuda.synchronize(),
    }


def seen(call: Callable[[], Any]) -> dict[str, Any]:
    call()  # makes what is kept from call to call
    with stub.recorded() as record:
        call()
    return asdict(record) | {"kernels": record.kernels(), "capturable": record.capturable}


def main() -> None:
    for name, call in cases().items():
        found = seen(call)
        print(json.dumps({"case": name} | found), flush=True)


if __name__ == "__main__":
    main()
