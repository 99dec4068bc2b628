"""The scan: every row's prefix product with every query, of which only what may matter is kept.

One program owns BLOCK_B queries and walks tiles of BLOCK_N rows, one flat loop over the tiles'
blocks of columns. Of each bucket of 16 rows that one thread holds, the best score is compared with
the query's threshold; a bucket that is not below goes to the query's buffer. Scores are never
written. Tiles are taken in an order that spreads the first few over all rows. These seed the
threshold, as all their buckets are kept, and it is tightened between phases.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.search.metrics import LOST as LOST_OF_A_NORM
from mrl_fast.kernels.search.metrics import NUMBERS, SumTerms
from mrl_fast.kernels.search.queries import ScanQueries
from mrl_fast.kernels.search.scan_shape import (
    PROMOTED,
    Config,
    one_sum_a_product,
    promoted,
    scan_precision,
    with_low_part,
)
from mrl_fast.kernels.shared.device import programs, remember
from mrl_fast.kernels.shared.tiling import cdiv
from torch import Tensor

MAGIC = tl.constexpr(0x4B400000)  # an int32 sum that starts here reads as 1.5 · 2^23 + sum in fp32
NOTHING = tl.constexpr((0xFF800000 - (1 << 32) << 32) | 0xFFFFFFFF)  # a hit of −inf, in no bucket
LOST = tl.constexpr(LOST_OF_A_NORM)
MAGIC_DIM = 256  # the most columns of int8 whose sum MAGIC can read


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _added(q, x, acc, PRECISION: tl.constexpr, PROMOTED: tl.constexpr):
    return tl.dot(q, x, acc, PRECISION, max_num_imprecise_acc=PROMOTED, out_dtype=acc.dtype)


@triton.jit
def _best_of_buckets(v, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """[BLOCK_B, BLOCK_N] -> [BLOCK_B, GROUPS, 4]: the largest of each bucket's rows, which are
    those of rescan.bucket_row."""
    even, odd = tl.split(tl.reshape(v, (BLOCK_B, BLOCK_N // 8, 4, 2)))
    v = _larger(even, odd)
    eights: tl.constexpr = BLOCK_N // 8 // GROUPS
    v = tl.reshape(v, (BLOCK_B, eights, GROUPS, 4))
    return tl.reduce(v, 1, _larger)


# Sizes whose divisibility aligns no access: one binary serves them all.
SIZES = "B N C tiles tile_step first last each window steps".split()


@triton.jit(do_not_specialize=SIZES)
def _scan_kernel(
    q_ptr,  # [B, dim]
    low_ptr,  # [B, dim]: the queries less what q_ptr holds of them
    x_ptr,  # [N, dim]
    scale_ptr,  # [N] fp32: factor of a row's product
    term_ptr,  # [N] fp32: added to it
    outer_ptr,  # [OUTERS, N] fp32: added times the query's factors
    factor_ptr,  # [OUTERS, B] fp32; where NORMS is 0, [B], the queries' norms
    theta_ptr,  # [B] fp32
    among_ptr,  # [B] int32: 0 for queries that need no scan
    hits_ptr,  # [B, C] int64: the bits of a bucket's best score above the bucket's number
    count_ptr,  # [B] int32
    norm_ptr,  # [1] int32: the bits of the largest norm so far, which as integers have its order
    B,
    N,
    dim,
    C,
    tiles,
    tile_step,  # from one tile to the next, modulo their number
    first,  # positions in the order of tiles, as the next two
    last,
    each,  # tiles of a program, a multiple of `window`
    window,  # tiles whose buckets share a place, with DENSE
    steps,  # blocks of columns that a program reads, over all its tiles
    bound,  # relative error of a sum
    stride_qb,  # in elements, as the next two; last axes are contiguous
    stride_xn,
    stride_on,
    HAS_SCALE: tl.constexpr,
    HAS_TERM: tl.constexpr,
    OUTERS: tl.constexpr,  # at most 3
    HAS_AMONG: tl.constexpr,
    HAS_LOW: tl.constexpr,
    TWO_SUMS: tl.constexpr,  # one for each part of a query
    NORMS: tl.constexpr,  # the metric's number where the scan finds the rows' norms itself, else −1
    DENSE: tl.constexpr,  # 1: keeps every bucket, at its place; 2: the best of every window; else 0
    WHOLE: tl.constexpr,  # one block holds all columns
    MAGIC_SUMS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PROMOTED: tl.constexpr,  # columns of float8 after which sums go on in fp32; 0: never
):
    BUCKETS: tl.constexpr = 4 * GROUPS  # of a tile
    query_tiles = tl.cdiv(B, BLOCK_B)
    offs_b = tl.program_id(0) % query_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    queries = tl.minimum(offs_b, B - 1)
    if HAS_AMONG:
        mask_b &= tl.load(among_ptr + queries) != 0
        if tl.max(mask_b.to(tl.int32)) == 0:
            return
    begin = first + tl.program_id(0) // query_tiles * each
    theta = tl.load(theta_ptr + queries)
    factor = theta
    second, third = theta, theta
    if OUTERS or NORMS == 0:
        factor = tl.load(factor_ptr + queries)
    if OUTERS > 1:
        second = tl.load(factor_ptr + B + queries)
    if OUTERS > 2:
        third = tl.load(factor_ptr + 2 * B + queries)
    if NORMS == 0:
        factor += dim * LOST  # as in metrics.upper

    lanes = tl.arange(0, BLOCK_N)
    group = tl.arange(0, GROUPS)[None, :, None]
    four = tl.arange(0, 4)[None, None, :]
    bucket_lane = group * 4 + four  # [1, GROUPS, 4]
    offs_d = tl.arange(0, BLOCK_D)
    q_rows = q_ptr + queries.to(tl.int64)[:, None] * stride_qb
    low_rows = q_rows
    if HAS_LOW:
        low_rows = low_ptr + queries.to(tl.int64)[:, None] * stride_qb
    buffer = hits_ptr + tl.reshape(queries, (BLOCK_B, 1, 1)).to(tl.int64) * C
    counter = count_ptr + tl.reshape(queries, (BLOCK_B, 1, 1)) + tl.zeros_like(bucket_lane)
    live_b = tl.reshape(mask_b, (BLOCK_B, 1, 1))
    theta_b = tl.reshape(theta, (BLOCK_B, 1, 1))

    INTEGERS: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    start: tl.constexpr = MAGIC if MAGIC_SUMS else 0
    ACC: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    acc = tl.full((BLOCK_B, BLOCK_N), start, ACC)
    low_acc = tl.zeros((BLOCK_B, BLOCK_N), ACC)
    square = tl.zeros((BLOCK_N,), tl.float32)
    largest = tl.zeros((BLOCK_N,), tl.float32)
    tile = ((begin.to(tl.int64) * tile_step + tiles - 1) % tiles).to(tl.int32)
    window_best = tl.full((BLOCK_B, GROUPS, 4), -float("inf"), tl.float32)
    window_key = tl.full((BLOCK_B, GROUPS, 4), NOTHING, tl.int64)
    blocks = 1 if WHOLE else tl.cdiv(dim, BLOCK_D)
    position = begin
    block = 0
    if WHOLE:
        q_whole = tl.load(q_rows + offs_d[None, :], (offs_d < dim)[None, :], other=0.0)
        low_whole = tl.load(low_rows + offs_d[None, :], (offs_d < dim)[None, :], other=0.0)
    for _ in range(steps):
        begin_n = tile.to(tl.int64) * BLOCK_N
        row, left = lanes, BLOCK_N
        if DENSE:  # these scans take the last tile, which may be ragged, first
            left = tl.minimum(N - begin_n, BLOCK_N).to(tl.int32)
            row = tl.minimum(lanes, left - 1)
        columns = block * BLOCK_D + offs_d
        mask_d = columns < dim
        x = tl.load(
            x_ptr + begin_n * stride_xn + (row * stride_xn)[None, :] + columns[:, None],
            mask_d[:, None],
            other=0.0,
        )
        if WHOLE:
            q = q_whole
        else:
            q = tl.load(q_rows + columns[None, :], mask_d[None, :], other=0.0)
        if WHOLE:  # a fresh sum is not carried through the loop
            fresh = tl.full((BLOCK_B, BLOCK_N), start, ACC)
            v = _added(q, x, fresh, PRECISION, PROMOTED)
            if TWO_SUMS:
                v += _added(low_whole, x, tl.zeros_like(fresh), PRECISION, PROMOTED)
            elif HAS_LOW:
                v = _added(low_whole, x, v, PRECISION, PROMOTED)
        else:
            acc = _added(q, x, acc, PRECISION, PROMOTED)
            if HAS_LOW:
                low = tl.load(low_rows + columns[None, :], mask_d[None, :], other=0.0)
                if TWO_SUMS:
                    low_acc = _added(low, x, low_acc, PRECISION, PROMOTED)
                else:
                    acc = _added(low, x, acc, PRECISION, PROMOTED)
        if NORMS >= 0:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, axis=0)
        block += 1
        ends = block == blocks
        if WHOLE or ends:
            if not WHOLE:
                v = acc + low_acc if TWO_SUMS else acc
            if MAGIC_SUMS:
                v = v.to(tl.float32, bitcast=True) - 12582912.0
            v = v.to(tl.float32)
            if NORMS >= 0:
                # Squares that leave fp32's normal range bound nothing.
                safe = (square > 8.3e-25) | (square == 0.0)  # 2^-80
                norm = tl.sqrt(square * (1.0 + dim * 2.4e-7) + dim * 1.2e-38)
                if NORMS == 1:  # rows are normalised below
                    norm = tl.where(safe, 1.0, float("inf"))
                largest = tl.maximum(largest, norm)
            if NORMS == 0:
                v += (bound * factor)[:, None] * norm[None, :]
            if NORMS == 1:
                inverse = tl.rsqrt(tl.where(square == 0.0, 1.0, square))
                v *= tl.where(square == 0.0, 0.0, inverse)[None, :]
            if NORMS == 2:
                v -= ((0.5 - bound) * square)[None, :]
            if HAS_SCALE:
                v *= tl.load(scale_ptr + begin_n + row)[None, :]
            if HAS_TERM:
                v += tl.load(term_ptr + begin_n + row)[None, :]
            if OUTERS:
                v += factor[:, None] * tl.load(outer_ptr + begin_n + row)[None, :]
            if OUTERS > 1:
                outer = tl.load(outer_ptr + stride_on + begin_n + row)
                v += second[:, None] * outer[None, :]
            if OUTERS > 2:
                outer = tl.load(outer_ptr + 2 * stride_on + begin_n + row)
                v += third[:, None] * outer[None, :]
            if DENSE:
                v = tl.where((lanes < left)[None, :], v, -float("inf"))
            best = _best_of_buckets(v, BLOCK_B, BLOCK_N, GROUPS)
            bucket = tile * BUCKETS + bucket_lane
            key = (best.to(tl.int32, bitcast=True).to(tl.int64) << 32) | bucket.to(tl.int64)
            if DENSE == 1:
                slot = position * BUCKETS + bucket_lane
                some = tl.where(best == -float("inf"), NOTHING, key)
                tl.store(buffer + slot, some, live_b & (position < last))
            elif DENSE == 2:
                better = ~(best <= window_best)
                window_best = tl.where(better, best, window_best)
                window_key = tl.where(better, key, window_key)
                full = ((position + 1) % window == 0) | (position + 1 == last)
                if full & (position < last):
                    slot = position // window * BUCKETS + bucket_lane
                    tl.store(buffer + slot, window_key, live_b)
                    window_best = tl.full((BLOCK_B, GROUPS, 4), -float("inf"), tl.float32)
                    window_key = tl.full((BLOCK_B, GROUPS, 4), NOTHING, tl.int64)
            else:
                hit = ~(best < theta_b) & live_b & (position < last)
                slot = tl.atomic_add(counter, 1, hit, sem="relaxed")
                tl.store(buffer + slot, key, hit & (slot < C))
            if not WHOLE:
                acc = tl.full((BLOCK_B, BLOCK_N), start, ACC)
                if TWO_SUMS:
                    low_acc = tl.zeros((BLOCK_B, BLOCK_N), ACC)
            square = tl.zeros((BLOCK_N,), tl.float32)
        # This stands outside the condition above, which waits for a product, so that the next
        # block is loaded meanwhile.
        next_tile = tl.where(tile + tile_step >= tiles, tile + tile_step - tiles, tile + tile_step)
        # After a program's last tile the same tile comes again: rows beyond may not exist.
        tile = tl.where(ends & (position + 1 < last), next_tile, tile)
        position = tl.where(ends, position + 1, position)
        block = tl.where(ends, 0, block)
    if NORMS >= 0:
        tl.atomic_max(norm_ptr, tl.max(largest).to(tl.int32, bitcast=True), sem="relaxed")


class Scan:
    """A pass over the rows ``x [N, dim]``.

    Args:
        config: The shape of tiles; phases, buckets and hits are counted in tiles of this shape.
        q: The queries, ``[B, dim]``.
        terms: What the metric makes of a sum; None: from norms that the scan finds itself.
        norm: ``[1]``, the largest norm of a row; out, as the bits of an fp32, where ``terms`` is
            None.
        among: ``[B]`` int32, 0 where a query needs no scan.
    """

    def __init__(
        self,
        config: Config,
        q: ScanQueries,
        x: Tensor,
        metric: str,
        terms: SumTerms | None,
        norm: Tensor,
        among: Tensor | None = None,
    ):
        self.q, self.x, self.norm, self.among = q, x, norm, among
        self.config = config = config if q.low is None else with_low_part(config, x)
        self.tiles = cdiv(x.shape[0], config.BLOCK_N)
        norms = NUMBERS[metric] if terms is None else -1
        self.bound = q.margin.bound * (q.bound.factor if norms == 0 else 1.0)
        self.terms = terms = terms or SumTerms()
        self.factor = q.norms if terms.factor is None else terms.factor
        low, outer = q.low is not None, terms.outer
        outers = 0 if outer is None else 1 if outer.dim() == 1 else outer.shape[0]
        self.outer_stride = outer.stride(0) if outer is not None and outers > 1 else 0
        self.kind, self.flags = options(
            config, x.dtype, x.shape[1], norms, terms.scale is not None, terms.term is not None,
            outers, among is not None, low, low and one_sum_a_product(x),
            scan_precision(x), promoted(x),
        )  # fmt: skip

    def __call__(
        self, hits: Tensor, count: Tensor, theta: Tensor, first: int, last: int, *, window: int = 0
    ) -> None:
        """Scans the tiles at [first, last) of their order. Appends to ``hits [B, C]``, and counts,
        the buckets that are not below ``theta [B]``; with a window, stores the best bucket of every
        ``window`` tiles at its place instead."""
        if first >= last:
            return
        q, x, v, config = self.q.q, self.x, self.terms, self.config
        (B, dim), dense, step = q.shape, min(window, 2), max(1, window)
        query_tiles = cdiv(B, config.BLOCK_B)
        slots = programs(x, self.kind[dense])
        each = cdiv(last - first, splits_of(query_tiles, slots) * step) * step
        splits = cdiv(last - first, each)
        binary = _scan_kernel[(query_tiles * splits,)](
            q, self.q.low, x, v.scale, v.term, v.outer, self.factor, theta, self.among,
            hits, count, self.norm, B, x.shape[0], dim, hits.shape[1],
            self.tiles, tile_step(self.tiles), first, last, each, step,
            each * cdiv(dim, config.BLOCK_D), self.bound, q.stride(0), x.stride(0),
            self.outer_stride, DENSE=dense, **self.flags,
        )  # fmt: skip
        remember(self.kind[dense], x, binary)


@functools.lru_cache(maxsize=4096)
def options(
    config: Config, dtype: torch.dtype, dim: int, norms: int, scale: bool, term: bool, outers: int,
    among: bool, low: bool, two_sums: bool, precision: str, promoted: bool,
) -> tuple[list[str], dict[str, Any]]:  # fmt: skip
    """The kernel's names, one for each value of DENSE, and its other options."""
    flags = {
        "HAS_SCALE": scale,
        "HAS_TERM": term,
        "OUTERS": outers,
        "HAS_AMONG": among,
        "HAS_LOW": low,
        "TWO_SUMS": two_sums,
        "NORMS": norms,
        "WHOLE": dim <= config.BLOCK_D,
        "MAGIC_SUMS": dtype == torch.int8 and dim <= MAGIC_DIM,
        "GROUPS": config.groups,
        "PRECISION": precision,
        "PROMOTED": PROMOTED if promoted else 0,
        **config._asdict(),
    }
    return [f"scan {dtype} {dense} {flags}" for dense in range(3)], flags


@functools.lru_cache(maxsize=4096)
def splits_of(query_tiles: int, slots: int) -> int:
    """Parts to cut the rows into, so that programs come in few waves and the last wave leaves
    little of the device idle, which holds ``slots`` programs at a time."""

    def gain(splits: int) -> float:
        waves = cdiv(query_tiles * splits, slots)
        return query_tiles * splits / (waves * slots) - waves / 100

    return max(range(1, max(1, 8 * slots // query_tiles) + 1), key=gain)


@functools.lru_cache(maxsize=4096)
def tile_step(tiles: int) -> int:
    """A step that visits all tiles, modulo their number, and spreads the first ones over all rows:
    the golden section of that number, made coprime to it."""
    step = max(1, round(tiles * (5**0.5 - 1) / 2))
    while math.gcd(step, tiles) > 1:
        step += 1
    return step % tiles
