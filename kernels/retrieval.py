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
from mrl_fast.kernels.tiling import chunks, interpreted, operand, precision, tile_of
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
def _sum_columns(x, ROWS: tl.constexpr, LOG_COLUMNS: tl.constexpr):  # [ROWS, 2^LOG_COLUMNS]
    """Sums of neighbours, then of neighbouring sums. tl.sum adds in an order that follows from how
    the loads were vectorised, hence from the strides: equal vectors would score differently."""
    for i in tl.static_range(LOG_COLUMNS):
        even, odd = tl.split(tl.reshape(x, (ROWS, 1 << (LOG_COLUMNS - 1 - i), 2)))
        x = even + odd
    return tl.reshape(x, (ROWS,))


@triton.jit
def _pair_scores_kernel(
    q_ptr,  # [B, dim]
    x_ptr,  # [N, dim]
    rows_ptr,  # [B, C] int64, −1 is no row
    out_ptr,  # [B, C] fp32, contiguous
    C,
    tiles,  # of BLOCK_C candidates; the grid is B · tiles, for its second axis ends at 65535
    dim,
    stride_qb,  # in elements, as the next two; last axes are contiguous
    stride_xn,
    stride_rb,
    METRIC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOG_BLOCK_D: tl.constexpr,
):
    BLOCK_D: tl.constexpr = 1 << LOG_BLOCK_D
    b = (tl.program_id(0) // tiles).to(tl.int64)
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rows = tl.load(rows_ptr + b * stride_rb + offs_c, mask_c, other=-1)
    acc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    x_sq = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    q_sq = tl.zeros((1, BLOCK_D), tl.float32)
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
            q_sq += q[None, :] * q[None, :]
    score = _sum_columns(acc, BLOCK_C, LOG_BLOCK_D)
    if METRIC == 1:
        x_norm = tl.sqrt(_sum_columns(x_sq, BLOCK_C, LOG_BLOCK_D))
        norm = x_norm * tl.sqrt(_sum_columns(q_sq, 1, LOG_BLOCK_D))
        score = tl.where(norm == 0, 0.0, score / tl.where(norm == 0, 1.0, norm))  # NaN stays NaN
    score = tl.where(rows >= 0, score, -float("inf"))
    tl.store(out_ptr + b * C + offs_c, score, mask_c)


def scan_blocks(x: Tensor) -> dict[str, int]:
    if interpreted():
        return dict(BLOCK_B=16, BLOCK_N=64, BLOCK_D=16, num_warps=1, num_stages=1)
    if x.element_size() == 2:
        return dict(BLOCK_B=64, BLOCK_N=256, BLOCK_D=64, num_warps=8, num_stages=3)
    return dict(BLOCK_B=64, BLOCK_N=128, BLOCK_D=32, num_warps=4, num_stages=3)


PAIR_BLOCKS = dict(BLOCK_C=32, LOG_BLOCK_D=6, num_warps=4)  # 64 columns: the order of summation


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
        tiles = triton.cdiv(rows.shape[1], PAIR_BLOCKS["BLOCK_C"])
        _pair_scores_kernel[(len(q) * tiles,)](
            q, x, rows, out, rows.shape[1], tiles, dim, q.stride(0), x.stride(0), rows.stride(0),
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


def scan_error(q: Tensor, x: Tensor, norms: Tensor, metric: str) -> Tensor:
    """Bound on how far a scan's score may be from the canonical one, ``[B]``.

    Both round every product and sum, tensor cores by truncation, and the metric's own terms: in all
    fewer than 2(d + 16) roundings of numbers no larger than the norms' product. TF32 also cuts the
    operands. Where squares leave fp32's normal range no such bound holds: infinite, so all rows are
    looked at."""
    dim = x.shape[1]
    relative = 2 * (dim + 16) * 2.0**-24 + (2.0**-9 if precision(x) == "tf32" else 0.0)
    q_norms = torch.linalg.vector_norm(q, dim=1, dtype=torch.float32)
    widest = norms.max()
    unit = {"ip": q_norms * widest, "cosine": q_norms, "l2": (q_norms + widest) ** 2}[metric]
    error = unit * relative + dim * torch.finfo(torch.float32).tiny
    if metric == "cosine":
        smallest = torch.where(norms > 0, norms, torch.inf).min()
        safe = torch.minimum(smallest, q_norms.where(q_norms > 0, torch.inf)) > 2.0**-40
        error = torch.where(safe, error, torch.inf)
    return error


def prefix_topk(queries: Tensor, database: Tensor, k: int, dim: int, metric: str) -> Result:
    """The k best rows of each query. Waits for the device, to learn whether the scan sufficed."""
    q, x = operand(queries[:, :dim]), operand(database[:, :dim])
    buckets = triton.cdiv(len(x), BUCKET)
    kept = min(buckets, k + SPARE_BUCKETS)
    if kept == buckets:  # every row is looked at: nothing to scan for
        return score_all(q, x, k, dim, metric)
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)  # [N]
    row_values = None
    if metric == "cosine":
        row_values = norms.reciprocal().where(norms != 0, 0.0)
    if metric == "l2":
        row_values = norms**2
    error = scan_error(q, x, norms, metric)
    lanes = torch.arange(BUCKET, device=q.device)
    results = empty(q, k)
    for part in chunks(len(q), query_step(buckets // 12 + kept * BUCKET)):
        maxima = bucket_maxima(q[part], x, row_values, dim, metric)
        best = maxima.topk(kept, dim=1)
        rows = (best.indices[:, :, None] * BUCKET + lanes).flatten(1)  # [b, kept · BUCKET]
        rows = torch.where(rows < len(x), rows, -1)
        scores, ids = select(pair_scores(q[part], x, rows, dim, metric), rows, k)
        # Not "worse by more than the error": true for NaN too
        short = ~(best.values[:, -1] < best.values[:, k - 1] - 2 * error[part])
        again = short.nonzero()[:, 0]
        if len(again):
            scores[again], ids[again] = score_all(q[part][again], x, k, dim, metric)
        results[0][part], results[1][part] = scores, ids
    return results


def score_all(q: Tensor, x: Tensor, k: int, dim: int, metric: str) -> Result:
    """The k best of all rows, every pair scored canonically; a chunk of queries and of rows at a
    time, at least as many rows as are kept."""
    results = empty(q, k)
    row_step = max(4096, k)
    for part in chunks(len(q), query_step(min(len(x), row_step) + k)):
        size = part.stop - part.start
        scores, ids = empty(q[part], k)
        for found in chunks(len(x), max(row_step, TEMPORARY_BYTES // (48 * size) - k)):
            rows = torch.arange(found.start, found.stop, device=q.device).expand(size, -1)
            new = pair_scores(q[part], x, rows, dim, metric)
            scores, ids = select(torch.cat([scores, new], 1), torch.cat([ids, rows], 1), k)
        results[0][part], results[1][part] = scores, ids
    return results


def rerank(
    queries: Tensor, database: Tensor, candidates: Tensor, k: int, dim: int, metric: str
) -> Result:
    q, x, candidates = operand(queries), operand(database), candidates.contiguous()
    results = empty(q, k)
    for part in chunks(len(q), query_step(candidates.shape[1])):
        rows = candidates[part]
        found = select(pair_scores(q[part], x, rows, dim, metric), rows, k)
        results[0][part], results[1][part] = found
    return results


def empty(q: Tensor, k: int) -> Result:
    shape = len(q), k
    return (
        torch.full(shape, -torch.inf, device=q.device),
        torch.full(shape, -1, dtype=torch.int64, device=q.device),
    )


def query_step(candidates: int) -> int:
    """Queries whose candidates fit the temporaries: 48 bytes each, scores, rows and sorting."""
    return max(1, TEMPORARY_BYTES // (48 * max(1, candidates)))


def funnel_search(
    queries: Tensor, database: Tensor, stages: Sequence[tuple[int, int]], metric: str
) -> Result:
    (dim, keep), *later = stages
    scores, ids = prefix_topk(queries, database, keep, dim, metric)
    for dim, keep in later:
        scores, ids = rerank(queries, database, ids, keep, dim, metric)
    return scores, ids
