"""The extension, and how its kernels run: on which instruction set, and in whose threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import mrl_fast._C as _C
from mrl_fast._C import METRICS, SCALE_BYTES, TILE, DType, Rows, Stat, TileStat, pack_flags
from mrl_fast.shared import memory

__all__ = [
    "DTYPES",
    "ISA",
    "METRICS",
    "OPENMP",
    "SCALE_BYTES",
    "TILE",
    "_C",
    "Rows",
    "Stat",
    "TileStat",
    "chunks",
    "pack_flags",
    "product",
    "rows_of",
    "run",
]

DTYPES = {
    torch.float32: DType.F32,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.int8: DType.I8,
}

ISA = ""  # the instruction set; empty is the best this processor has. Tests set it.
_share = threading.local()  # threads of the calls of a thread that works beside others
threads: int | None = None  # of a call, as shared/threads.py sets it; None: as many as PyTorch's
# Whether kernels run in PyTorch's own thread team, which has to be GNU OpenMP's; else they start
# threads of their own.
OPENMP = any(map(_C.use_openmp, map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*"))))
PACKED_BYTES = 8 << 20  # of columns packed at a time: they stay in the last-level cache


def run() -> tuple[str, int]:
    """How a call runs: by which kernels, on how many threads at most."""
    return ISA, getattr(_share, "threads", None) or threads or torch.get_num_threads()


@contextmanager
def sharing(count: int) -> Iterator[None]:
    """Has the calls of this thread use so many threads, whatever others use."""
    _share.threads = count
    try:
        yield
    finally:
        _share.threads = None


def rows_of(x: Tensor) -> Tensor:
    """x with a contiguous last axis, whatever the row stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def chunks(size: int, step: int) -> Iterator[slice]:
    """Ranges of columns; ``step`` is rounded to whole tiles."""
    step = max(_C.TILE, step // _C.TILE * _C.TILE)
    for begin in range(0, size, step):
        yield slice(begin, min(begin + step, size))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, ``[B, V]`` fp32; a row's bits depend on neither the other rows nor the
    number of threads."""
    x, depth = rows_of(x.float()), weight.shape[1]
    out = memory.empty(len(x), len(weight))
    for part in chunks(len(weight), PACKED_BYTES // (4 * depth)):
        w = rows_of(weight[part].float())
        scores = _C.Scores(
            x=memory.address(x, torch.float32), x_stride=x.stride(0),
            w=memory.address(w, torch.float32), w_stride=w.stride(0),
            rows=len(x), cols=len(w), dims=[depth], first_col=part.start, cols_apart=len(weight),
        )  # fmt: skip
        to = memory.address(out[:, part], torch.float32)
        _C.store_scores(scores, run(), to, 0, out.stride(0))
    return out
