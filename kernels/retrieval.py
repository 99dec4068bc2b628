"""Exact top-k by prefix dot products, with no [B, N] score matrix.

Scan: one program owns BLOCK_B queries × BLOCK_N rows and writes the best score of every bucket of
    32
consecutive rows. A row among the k best lies in one of the k best buckets; so the k best and a few
more are scored again, pair by pair, by the canonical routine (fp32, one order of summation), and
what comes back is selected from those by (score, row). The scan's own rounding only decides which
buckets are looked at: where more of them lie within its error than were kept, as among thousands of
equal rows, the query is scored against every row instead.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.tiling import interpreted, operand, precision, tile_of
from torch import Tensor

BUCKET = 32  # consecutive rows
SPARE_BUCKETS = 64  # beyond k, for those within the scan's error
TEMPORARY_BYTES = 256 << 20
METRICS = {"ip": 0, "cosine": 1, "l2": 2}

Result = tuple[Tensor, Tensor]  # scores [B, k] fp32, rows [B, k] int64


@triton.jit
def _bucket_max_kernel(
    q_ptr,  # [B, dim]
    x_ptr,  # [N, dim]
    row_ptr,  # [N] fp32: cosine, the inverse norms; l2, the squared norms
    out_ptr,  # [B, buckets] fp32, contiguous
    B,
    N,
    dim,
    buckets,
    stride_qb,  # in elements, as the next; last axes are contiguous
    stride_xn,
    METRIC: tl.constexpr,
    BUCKET: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_n, mask_n, rows = tile_of(0, N, BLOCK_N)
    offs_b, mask_b, queries = tile_of(1, B, BLOCK_B)
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < dim
        q = tl.load(
            q_ptr + queries[:, None] * stride_qb + offs_d[None, :], mask_d[None, :], other=0.0
        )
        x = tl.load(x_ptr + rows[None, :] * stride_xn + offs_d[:, None], mask_d[:, None], other=0.0)
        acc = tl.dot(q, x, acc, input_precision=PRECISION)
    if METRIC == 1:
        acc = acc * tl.load(row_ptr + rows)[None, :]
    if METRIC == 2:
        acc = 2.0 * acc - tl.load(row_ptr + rows)[None, :]
    acc = tl.where(acc == acc, acc, float("inf"))  # a NaN is looked at, not lost
    acc = tl.where(mask_n[None, :], acc, -float("inf"))
    best = tl.max(tl.reshape(acc, (BLOCK_B, BLOCK_N // BUCKET, BUCKET)), axis=2)
    offs_u = tl.program_id(0).to(tl.int64) * (BLOCK_N // BUCKET) + tl.arange(0, BLOCK_N // BUCKET)
    tl.store(
        out_ptr + offs_b[:, None] * buckets + offs_u[None, :],
        best,
        mask_b[:, None] & (offs_u < buckets)[None, :],
    )


@triton.jit
def _pair_scores_kernel(
    q_ptr,  # [B, dim]
    x_ptr,  # [N, dim]
    rows_ptr,  # [B, C] int64, −1 is no row
    out_ptr,  # [B, C] fp32, contiguous
    C,
    dim,
    stride_qb,  # in elements, as the next two; last axes are contiguous
    stride_xn,
    stride_rb,
    METRIC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rows = tl.load(rows_ptr + b * stride_rb + offs_c, mask_c, other=-1)
    acc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    x_sq = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    q_sq = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, dim, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < dim
        q = tl.load(q_ptr + b * stride_qb + offs_d, mask_d, other=0.0).to(tl.float32)
        at = x_ptr + rows[:, None] * stride_xn + offs_d[None, :]
        x = tl.load(at, (rows >= 0)[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        if METRIC == 2:
            acc -= (q[None, :] - x) * (q[None, :] - x)
        else:
            acc += q[None, :] * x
        if METRIC == 1:
            x_sq += x * x
            q_sq += q * q
    score = tl.sum(acc, axis=1)
    if METRIC == 1:
        norm = tl.sqrt(tl.sum(x_sq, axis=1)) * tl.sqrt(tl.sum(q_sq, axis=0))
        score = tl.where(norm > 0, score / tl.where(norm > 0, norm, 1.0), 0.0)
    score = tl.where(rows >= 0, score, -float("inf"))
    tl.store(out_ptr + b * C + offs_c, score, mask_c)


def scan_blocks(x: Tensor) -> dict[str, int]:
    if interpreted():
        return dict(BLOCK_B=16, BLOCK_N=64, BLOCK_D=16, num_warps=1, num_stages=1)
    if x.element_size() == 2:
        return dict(BLOCK_B=64, BLOCK_N=256, BLOCK_D=64, num_warps=8, num_stages=3)
    return dict(BLOCK_B=64, BLOCK_N=128, BLOCK_D=32, num_warps=4, num_stages=3)


PAIR_BLOCKS = dict(BLOCK_C=32, BLOCK_D=64, num_warps=4)  # BLOCK_D fixes the order of summation


def bucket_maxima(q: Tensor, x: Tensor, row_values: Tensor | None, dim: int, metric: str) -> Tensor:
    """The best score, by the scan's arithmetic, of every query and bucket: ``[B, buckets]``."""
    blocks, buckets = scan_blocks(x), triton.cdiv(len(x), BUCKET)
    out = torch.empty(len(q), buckets, device=q.device)
    grid = triton.cdiv(len(x), blocks["BLOCK_N"]), triton.cdiv(len(q), blocks["BLOCK_B"])
    _bucket_max_kernel[grid](
        q, x, row_values, out, len(q), len(x), dim, buckets, q.stride(0), x.stride(0),
        METRIC=METRICS[metric], BUCKET=BUCKET, PRECISION=precision(x), **blocks,
    )  # fmt: skip
    return out


def pair_scores(q: Tensor, x: Tensor, rows: Tensor, dim: int, metric: str) -> Tensor:
    """The canonical score of each query with its own rows ``[B, C]``; −inf where there is none."""
    out = torch.empty(rows.shape, device=q.device)
    if out.numel():
        _pair_scores_kernel[(triton.cdiv(rows.shape[1], PAIR_BLOCKS["BLOCK_C"]), len(q))](
            q, x, rows, out, rows.shape[1], dim, q.stride(0), x.stride(0), rows.stride(0),
            METRIC=METRICS[metric], **PAIR_BLOCKS,
        )  # fmt: skip
    return out


def select(scores: Tensor, rows: Tensor, k: int) -> Result:
    """The k best pairs of each query by (score descending, row ascending)."""
    last = torch.iinfo(torch.int64).max
    by_row = torch.where(rows >= 0, rows, last).argsort(dim=1, stable=True)
    by_score = scores.gather(1, by_row).argsort(dim=1, descending=True, stable=True)[:, :k]
    order = by_row.gather(1, by_score)
    missing = (0, k - order.shape[1])
    pad = torch.nn.functional.pad
    found = rows.gather(1, order), scores.gather(1, order)
    return pad(found[1], missing, value=-torch.inf), pad(found[0], missing, value=-1)


def relative_error(x: Tensor, dim: int) -> float:
    """How far the scan's score may be from the canonical one, in units of the norms' product: both
    round every product and sum, and the metric's own terms; TF32 also rounds the operands."""
    rounding = 2 * (dim + 16) * 2.0**-24
    return rounding + (2.0**-9 if precision(x) == "tf32" else 0.0)


def prefix_topk(queries: Tensor, database: Tensor, k: int, dim: int, metric: str) -> Result:
    """The k best rows of each query. Waits for the device, to learn whether the scan sufficed."""
    q, x = operand(queries[:, :dim]), operand(database[:, :dim])
    buckets = triton.cdiv(len(x), BUCKET)
    kept = min(buckets, k + SPARE_BUCKETS)
    if kept == buckets:  # every row is looked at: nothing to scan for
        return score_all(q, x, k, dim, metric)
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)  # [N]
    widest = norms.max()
    row_values = {"ip": None, "cosine": norms.reciprocal().where(norms > 0, 0.0), "l2": norms**2}[
        metric
    ]
    q_norms = torch.linalg.vector_norm(q, dim=1, dtype=torch.float32)  # [B]
    unit = {"ip": q_norms * widest, "cosine": q_norms, "l2": (q_norms + widest) ** 2}[metric]
    error = unit * relative_error(x, dim)
    results = []
    step = max(1, TEMPORARY_BYTES // (4 * buckets + 48 * kept * BUCKET))
    for begin in range(0, len(q), step):
        part = q[begin : begin + step]
        best = bucket_maxima(part, x, row_values, dim, metric).topk(kept, dim=1)
        lanes = torch.arange(BUCKET, device=q.device)
        rows = (best.indices[:, :, None] * BUCKET + lanes).flatten(1)  # [b, kept · BUCKET]
        rows = torch.where(rows < len(x), rows, -1)
        scores, ids = select(pair_scores(part, x, rows, dim, metric), rows, k)
        # Not "worse by more than the error": true for NaN too
        short = ~(best.values[:, -1] < best.values[:, k - 1] - 2 * error[begin : begin + step])
        again = short.nonzero()[:, 0]
        if len(again):
            scores[again], ids[again] = score_all(part[again], x, k, dim, metric)
        results.append((scores, ids))
    if not results:
        return q.new_empty(0, k, dtype=torch.float32), q.new_empty(0, k, dtype=torch.int64)
    return torch.cat([s for s, _ in results]), torch.cat([i for _, i in results])


def score_all(q: Tensor, x: Tensor, k: int, dim: int, metric: str) -> Result:
    """The k best of all rows, every pair scored canonically; a chunk of rows at a time."""
    scores = torch.full((len(q), k), -torch.inf, device=q.device)
    ids = torch.full((len(q), k), -1, device=q.device)
    step = max(BUCKET, TEMPORARY_BYTES // (48 * max(1, len(q))) - k)
    for begin in range(0, len(x), step):
        rows = torch.arange(begin, min(begin + step, len(x)), device=q.device).expand(len(q), -1)
        found = pair_scores(q, x, rows, dim, metric)
        scores, ids = select(torch.cat([scores, found], 1), torch.cat([ids, rows], 1), k)
    return scores, ids


def rerank(
    queries: Tensor, database: Tensor, candidates: Tensor, k: int, dim: int, metric: str
) -> Result:
    q, x = operand(queries), operand(database)
    rows = candidates.contiguous()
    return select(pair_scores(q, x, rows, dim, metric), rows, k)


def funnel_search(
    queries: Tensor, database: Tensor, stages: Sequence[tuple[int, int]], metric: str
) -> Result:
    (dim, keep), *later = stages
    scores, ids = prefix_topk(queries, database, keep, dim, metric)
    for dim, keep in later:
        scores, ids = rerank(queries, database, ids, keep, dim, metric)
    return scores, ids
