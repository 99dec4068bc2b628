"""The CPU implementation (``impl="cpp"``): BLAS for the slab products, C++ SIMD kernels for
everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mrl_fast import _C
from mrl_fast._checks import METRICS, check_finite

WORKSPACE_BYTES = 64 << 20  # of scores held at a time, whatever B and V are
DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
}  # as enum DType in csrc/cpu/engine.h
# PyTorch's own thread team, where it is GNU OpenMP's; else the kernels start threads of their own.
OPENMP = any(map(_C.use_openmp, map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*"))))
ISA = ""  # the instruction set; empty is the best this processor has. Tests set it.

Matrices = tuple[Tensor, Tensor, Tensor | None]  # dx, dw, db


# --- losses ---


def slabs(dims: Sequence[int]) -> list[slice]:
    """The columns that are new to each prefix."""
    return [slice(begin, end) for begin, end in zip((0, *dims), dims, strict=False)]


def class_chunks(rows: int, classes: int, prefixes: int) -> Iterator[slice]:
    """Ranges of classes whose scores, one fp32 matrix a prefix and one more, fit the workspace."""
    step = max(64, WORKSPACE_BYTES // (4 * max(1, rows) * (prefixes + 1)))
    for begin in range(0, classes, step):
        yield slice(begin, min(begin + step, classes))


def nested_scores(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> Iterator[Tensor]:
    """S_g, ``[B, V]`` fp32, after each slab: one buffer that the next slab is added to."""
    scores = torch.zeros(x.shape[0], weight.shape[0])
    if bias is not None:
        scores += bias.float()
    for slab in slabs(dims):
        scores.addmm_(x[:, slab], weight[:, slab].float().T)
        yield scores


def logits_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> Tensor:  # [G, B, V]
    out = x.new_empty(len(dims), x.shape[0], weight.shape[0])
    for g, scores in enumerate(nested_scores(x.float(), weight, bias, dims)):
        out[g].copy_(scores)
    return out


def logits_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]
) -> Matrices:
    gradients = Gradients(x, weight, bias, dims)
    for chunk in class_chunks(len(x), len(weight), len(dims)):
        gradients.add(chunk, grad[:, :, chunk].float())
    return gradients.result()


class Gradients:
    """Sums dX, dW and db over chunks of classes, in fp32."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, dims: Sequence[int]):
        self.x, self.weight, self.bias, self.dims = x, weight, bias, dims
        self.x32 = x.float()
        self.dx = torch.zeros_like(self.x32)
        self.dw = torch.zeros_like(weight)
        self.db = None if bias is None else torch.zeros_like(bias)

    def add(self, chunk: slice, grad: Tensor) -> None:
        """Takes the score gradients A_g ``[G, B, chunk]`` fp32, and makes them the suffix sums T_g
        = Σ_{h >= g} A_h."""
        for g, slab in reversed(list(enumerate(slabs(self.dims)))):
            if g + 1 < len(self.dims):
                grad[g] += grad[g + 1]
            self.dx[:, slab].addmm_(grad[g], self.weight[chunk, slab].float())
            self.dw[chunk, slab] = (grad[g].T @ self.x32[:, slab]).to(self.dw.dtype)
        if self.db is not None:
            self.db[chunk] = grad[0].sum(0).to(self.db.dtype)

    def result(self) -> Matrices:
        return self.dx.to(self.x.dtype), self.dw, self.db


def cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    soft: Tensor | None,
    dims: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Row maximum, log Σ exp(z − maximum), target's and soft targets' log-probability: each ``[G,
    B]`` fp32."""
    shape = (len(dims), len(x))
    row_max, total = torch.full(shape, -torch.inf), torch.zeros(shape)
    z_target, z_soft = torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)
    x32, threads = x.float(), torch.get_num_threads()
    for chunk in class_chunks(len(x), len(weight), len(dims)):
        rows, columns = _targets_in(target, chunk)
        soft_chunk = None if soft is None else soft[chunk].contiguous()
        for g, scores in enumerate(nested_scores(x32, weight[chunk], _part(bias, chunk), dims)):
            z_target[g, rows] = scores[rows, columns]
            _C.softmax_stats(
                scores.data_ptr(), len(scores), scores.shape[1], _address(soft_chunk), threads, ISA,
                row_max[g].data_ptr(), total[g].data_ptr(), z_soft[g].data_ptr(),
            )  # fmt: skip
    log_sum = total.log_()
    logp_target = (z_target - row_max) - log_sum
    if soft is None:
        return row_max, log_sum, logp_target, None
    logp_soft = z_soft - soft.double().sum() * (row_max.double() + log_sum)
    return row_max, log_sum, logp_target, logp_soft.float()


def cross_entropy_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    soft: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    dims: Sequence[int],
    d_target: Tensor,
    d_soft: Tensor | None,
) -> Matrices:
    """Gradients from those of the two log-probabilities, ``[G, B]`` fp32 each."""
    gradients = Gradients(x, weight, bias, dims)
    # A = d_target·(δ − p) + d_soft·(soft − Σsoft·p)
    if soft is None or d_soft is None:
        p_scale = d_target.contiguous()
    else:
        p_scale, d_soft = d_target + d_soft * soft.sum(), d_soft.contiguous()
    threads = torch.get_num_threads()
    for chunk in class_chunks(len(x), len(weight), len(dims)):
        rows, columns = _targets_in(target, chunk)
        soft_chunk = None if soft is None or d_soft is None else soft[chunk].contiguous()
        grad = torch.empty(len(dims), len(x), chunk.stop - chunk.start)
        for g, scores in enumerate(
            nested_scores(gradients.x32, weight[chunk], _part(bias, chunk), dims)
        ):
            _C.softmax_grad(
                scores.data_ptr(), len(scores), scores.shape[1], _address(soft_chunk), threads, ISA,
                row_max[g].data_ptr(), log_sum[g].data_ptr(), p_scale[g].data_ptr(),
                0 if d_soft is None else d_soft[g].data_ptr(), grad[g].data_ptr(),
            )  # fmt: skip
            # 1 − p by expm1: near p = 1 a difference would keep few digits
            logp = (scores[rows, columns] - row_max[g, rows]) - log_sum[g, rows]
            at_target = d_target[g, rows] * -torch.expm1(logp)
            if soft is not None and d_soft is not None:
                at_target += d_soft[g, rows] * (soft[target[rows]] - soft.sum() * logp.exp())
            grad[g, rows, columns] = at_target
        gradients.add(chunk, grad)
    return gradients.result()


def _targets_in(target: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """The rows whose target lies in the chunk, and its column there."""
    rows = ((target >= chunk.start) & (target < chunk.stop)).nonzero()[:, 0]
    return rows, target[rows] - chunk.start


def _part(bias: Tensor | None, chunk: slice) -> Tensor | None:
    return None if bias is None else bias[chunk]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# --- retrieval ---


def prefix_topk(
    queries: Tensor, database: Tensor, k: int, dim: int, metric: str
) -> tuple[Tensor, Tensor]:
    return funnel_search(queries, database, [(dim, k)], metric)


def funnel_search(
    queries: Tensor, database: Tensor, stages: Sequence[tuple[int, int]], metric: str
) -> tuple[Tensor, Tensor]:
    none = torch.empty(0, 0)
    return search_rows(queries, none, database, len(database), stages, metric)


def search_rows(
    queries: Tensor,
    packed: Tensor,
    tail: Tensor,
    rows: int,
    stages: Sequence[tuple[int, int]],
    metric: str,
) -> tuple[Tensor, Tensor]:
    """Searches rows whose first columns lie in vertical tiles and whose others lie row-major.

    Args:
        packed: ``[ceil(rows / TILE), p, TILE]`` fp32, or empty where p is 0. The first stage's dim
            is at least p.
        tail: ``[>= rows, D - p]``, the other columns.
    """
    packed_dim = packed.shape[1]
    q = queries.float()  # [B, D]; a half-precision value is exact in fp32
    scores, ids = _results(q, stages[-1][1])
    problem = _C.search(
        packed.data_ptr(), packed_dim, tail.data_ptr(), DTYPES[tail.dtype], tail.stride(0), rows,
        q.data_ptr(), len(q), q.stride(0), METRICS.index(metric), list(stages),
        torch.get_num_threads(), ISA, scores.data_ptr(), ids.data_ptr(),
    )  # fmt: skip
    _refuse(problem, tail[:rows, : stages[-1][0] - packed_dim])
    return scores, ids


def rerank(
    queries: Tensor, database: Tensor, candidates: Tensor, k: int, dim: int, metric: str
) -> tuple[Tensor, Tensor]:
    q, candidates = queries.float(), candidates.contiguous()
    scores, ids = _results(q, k)
    problem = _C.rerank(
        database.data_ptr(), DTYPES[database.dtype], database.stride(0), len(database),
        q.data_ptr(), len(q), q.stride(0), METRICS.index(metric), candidates.data_ptr(),
        candidates.shape[1], dim, k, torch.get_num_threads(), ISA,
        scores.data_ptr(), ids.data_ptr(),
    )  # fmt: skip
    _refuse(problem, database[:, :dim])
    return scores, ids


def pack(vectors: Tensor, tiles: Tensor) -> None:
    """Writes ``[n, p]`` vectors into vertical tiles ``[ceil(n / TILE), p, TILE]`` fp32; padding is
    0."""
    problem = _C.pack_rows(
        vectors.data_ptr(), DTYPES[vectors.dtype], vectors.stride(0),
        len(vectors), vectors.shape[1], torch.get_num_threads(), ISA, tiles.data_ptr(),
    )  # fmt: skip
    _refuse(problem, vectors)


def _results(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)


def _refuse(problem: str, vectors: Tensor) -> None:
    if problem:
        check_finite(vectors, "database")
        raise ValueError(
            "database: expected scores within float32, got one beyond (vectors too large)"
        )
