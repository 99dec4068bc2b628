"""The scan: every row's prefix product with every query, of which only what may matter is kept.

One program owns BLOCK_B queries and walks tiles of BLOCK_N rows, one flat loop over the tiles'
blocks of columns. Of each bucket of 16 rows that one thread holds, the best score is compared with
the query's threshold; a bucket that is not below goes to the query's buffer. Scores are never
written. Tiles are taken in an order in which any first few are spread over all rows: those first
ones seed the threshold (all their buckets are kept), and it is tightened between phases.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.shared.tiling import aligned, interpreted, precision, programs
from torch import Tensor

BUCKET = 16  # rows
MAGIC = tl.constexpr(0x4B400000)  # an int32 sum that starts here reads as 1.5 · 2^23 + sum in fp32
NOTHING = tl.constexpr((0xFF800000 - (1 << 32) << 32) | 0xFFFFFFFF)  # −inf, of no bucket's rows
PROMOTED = 32  # columns of float8 that Hopper's tensor cores add up at once
MAGIC_DIM = 256  # columns of int8 up to which it does


class Config(NamedTuple):
    BLOCK_B: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int

    @property
    def groups(self) -> int:
        """Buckets of a tile in fours: eight rows apart in one lie as many eights of rows."""
        return self.BLOCK_N // (4 * BUCKET)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _added(q, x, acc, PRECISION: tl.constexpr, PROMOTED: tl.constexpr):
    return tl.dot(q, x, acc, PRECISION, max_num_imprecise_acc=PROMOTED, out_dtype=acc.dtype)


@triton.jit
def _best_of_buckets(v, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """[BLOCK_B, BLOCK_N] -> [BLOCK_B, GROUPS, 4], of the rows that pairs.bucket_row names."""
    even, odd = tl.split(tl.reshape(v, (BLOCK_B, BLOCK_N // 8, 4, 2)))
    v = _larger(even, odd)
    eights: tl.constexpr = BLOCK_N // 8 // GROUPS
    v = tl.reshape(v, (BLOCK_B, eights, GROUPS, 4))
    return tl.reduce(v, 1, _larger)


# Sizes that no access is aligned by: one binary serves them all, whatever they are divisible by.
SIZES = "B N C tiles tile_step first last each window steps".split()


@triton.jit(do_not_specialize=SIZES)
def _scan_kernel(
    q_ptr,  # [B, dim]
    low_ptr,  # [B, dim], as q: what rounding the queries left of them
    x_ptr,  # [N, dim]
    scale_ptr,  # [N] fp32: what a row's products are multiplied by
    term_ptr,  # [N] fp32: what is added to them
    outer_ptr,  # [N] fp32: times the next, added too
    factor_ptr,  # [B] fp32; with norms of its own, the queries' norms
    theta_ptr,  # [B] fp32
    skip_ptr,  # [B] int32: queries that need no scan
    hits_ptr,  # [B, C] int64: a bucket's best score's bits, above its number
    count_ptr,  # [B] int32
    norm_ptr,  # [1] fp32, the largest norm so far
    B,
    N,
    dim,
    C,
    tiles,
    tile_step,  # from one tile to the next, modulo their number
    first,  # positions in the order of tiles, as the next two
    last,
    each,  # a program's, a multiple of `window`
    window,  # tiles that share a bucket's place, where all are kept
    steps,  # a program's: blocks of columns of all its tiles
    bound,  # relative error of a sum
    stride_qb,  # in elements, as the next; last axes are contiguous
    stride_xn,
    HAS_SCALE: tl.constexpr,
    HAS_TERM: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_LOW: tl.constexpr,
    NORMS: tl.constexpr,  # the metric whose terms are made of norms found in the scan; −1: none
    DENSE: tl.constexpr,  # 1: every bucket is kept, at its place; 2: the best of every window is
    WHOLE: tl.constexpr,  # one block holds all columns
    MAGIC_SUMS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PROMOTED: tl.constexpr,  # columns of float8 after which sums are added up in fp32; 0: elsewhere
):
    BUCKETS: tl.constexpr = 4 * GROUPS  # of a tile
    query_tiles = tl.cdiv(B, BLOCK_B)
    offs_b = tl.program_id(0) % query_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    queries = tl.minimum(offs_b, B - 1)
    if HAS_SKIP:
        mask_b &= tl.load(skip_ptr + queries) == 0
        if tl.max(mask_b.to(tl.int32)) == 0:
            return
    begin = first + tl.program_id(0) // query_tiles * each
    theta = tl.load(theta_ptr + queries)
    factor = theta
    if HAS_OUTER or NORMS == 0:
        factor = tl.load(factor_ptr + queries)

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
        if DENSE:  # which takes the last tile first: the others are whole
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
        if WHOLE:  # sums that start anew are not carried through the loop
            fresh = tl.full((BLOCK_B, BLOCK_N), start, ACC)
            v = _added(q, x, fresh, PRECISION, PROMOTED)
            if HAS_LOW:
                v = _added(low_whole, x, v, PRECISION, PROMOTED)
        else:
            acc = _added(q, x, acc, PRECISION, PROMOTED)
            if HAS_LOW:
                low = tl.load(low_rows + columns[None, :], mask_d[None, :], other=0.0)
                acc = _added(low, x, acc, PRECISION, PROMOTED)
        if NORMS >= 0:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, axis=0)
        block += 1
        ends = block == blocks
        if WHOLE or ends:
            if not WHOLE:
                v = acc
            if MAGIC_SUMS:
                v = v.to(tl.float32, bitcast=True) - 12582912.0
            v = v.to(tl.float32)
            if NORMS >= 0:
                # Squares that leave fp32's normal range bound nothing.
                safe = (square > 8.3e-25) | (square == 0.0)  # 2^-80
                norm = tl.sqrt(square * (1.0 + dim * 2.4e-7) + dim * 1.2e-38)
                if NORMS == 1:  # of what is multiplied by its inverse
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
            if HAS_OUTER:
                v += factor[:, None] * tl.load(outer_ptr + begin_n + row)[None, :]
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
            square = tl.zeros((BLOCK_N,), tl.float32)
        # Not under the condition, which waits for a product: the next block is loaded meanwhile.
        next_tile = tl.where(tile + tile_step >= tiles, tile + tile_step - tiles, tile + tile_step)
        # The last tile again where there is none beyond, whose rows may not exist.
        tile = tl.where(ends & (position + 1 < last), next_tile, tile)
        position = tl.where(ends, position + 1, position)
        block = tl.where(ends, 0, block)
    if NORMS >= 0:
        tl.atomic_max(norm_ptr, tl.max(largest), sem="relaxed")


class Margin(NamedTuple):
    """How far a scan's score may be from the canonical one: ``a + c·q² + d·q·x + e·x²`` with a
    query's norm and the largest norm of a row, which is 1 under cosine.

    Both round every product and sum, tensor cores by truncation, and the metric's own terms: in all
    fewer than 2(d + 16) roundings of numbers no larger than the norms' product."""

    bound: float  # relative error of a sum
    a: float
    c: float = 0.0
    d: float = 0.0
    e: float = 0.0

    def error(self, q: Tensor, x: Tensor) -> Tensor:
        """For queries' norms ``[B]`` and the largest of a row's ``[1]``."""
        return self.a + self.c * q * q + self.d * q * x + self.e * x * x

    @classmethod
    def of(cls, x: Tensor, metric: str) -> "Margin":
        """In a scan's units: products with the unnormalised query under cosine, and
        ⟨q, x⟩ − ‖x‖²/2 under l2."""
        dim = x.shape[1]
        width = x.element_size()
        tf32 = 2.0**-9 if scan_precision(x) == "tf32" else 2.0**-18
        # So many products of float8 at a time, and their sum, are cut off below 2^-13 of the
        # largest, and below some more than that of one whose factor is subnormal.
        added = PROMOTED if promoted(x) else max(64, dim)
        coarse = {1: (added + 10) * 2.0**-13, 2: 0.0, 4: tf32}[width]
        exact = x.dtype == torch.int8  # sums of integers, rounded at the end
        bound = 2 * (dim + 16) * 2.0**-24 + (0.0 if exact else coarse)
        tiny = dim * torch.finfo(torch.float32).tiny
        if metric == "l2":  # (q + x)²/2 <= q² + x²
            return cls(bound, tiny, c=bound, e=bound)
        return cls(bound, tiny, d=bound)


class Vectors(NamedTuple):
    """What a scan makes of a row's sum beside the sum: sum · scale + term + factor · outer."""

    scale: Tensor | None = None  # [N] fp32, as the next two
    term: Tensor | None = None
    outer: Tensor | None = None
    factor: Tensor | None = None  # [B] fp32


class Scan:
    """A pass over the rows ``x [N, dim]`` for the queries ``q [B, dim]``.

    Args:
        config: The shape of its tiles, of whose numbers phases, buckets and hits are.
        vectors: Of the rows; None: the metric's, from norms that the scan finds itself.
        q_norms: ``[B]`` fp32; read where ``vectors`` is None.
        norm: ``[1]`` fp32, out where ``vectors`` is None: the largest norm of a row.
        skip: ``[B]`` int32, not 0 where a query needs no scan.
        low: ``[B, dim]``, to be added to ``q``.
    """

    def __init__(
        self,
        config: Config,
        q: Tensor,
        x: Tensor,
        metric: str,
        vectors: Vectors | None,
        q_norms: Tensor,
        norm: Tensor,
        skip: Tensor | None = None,
        low: Tensor | None = None,
    ):
        self.q, self.x, self.norm, self.skip, self.low = q, x, norm, skip, low
        if low is not None and x.shape[1] > config.BLOCK_D and hopper(x):  # three blocks a stage:
            config = config._replace(num_stages=2)  # two programs share a processor's memory
        self.config = config
        self.tiles = triton.cdiv(len(x), config.BLOCK_N)
        self.bound = Margin.of(x, metric).bound
        self.factor = vectors.factor if vectors and vectors.factor is not None else q_norms
        self.vectors = vectors or Vectors()
        self.flags = {
            "HAS_SCALE": self.vectors.scale is not None,
            "HAS_TERM": self.vectors.term is not None,
            "HAS_OUTER": self.vectors.outer is not None,
            "HAS_SKIP": skip is not None,
            "HAS_LOW": low is not None,
            "NORMS": ("ip", "cosine", "l2").index(metric) if vectors is None else -1,
            "WHOLE": x.shape[1] <= config.BLOCK_D,
            "MAGIC_SUMS": x.dtype == torch.int8 and x.shape[1] <= MAGIC_DIM,
            "GROUPS": config.groups,
            "PRECISION": scan_precision(x),
            "PROMOTED": PROMOTED if promoted(x) else 0,
        }

    def __call__(
        self, hits: Tensor, count: Tensor, theta: Tensor, first: int, last: int, *, window: int = 0
    ) -> None:
        """Tiles at [first, last) of their order, to the buffers ``hits [B, C]``: what is not below
        ``theta [B]`` or, with a window, the best bucket of each so many tiles."""
        if first >= last:
            return
        config, v = self.config, self.vectors
        query_tiles, step = triton.cdiv(len(self.q), config.BLOCK_B), max(1, window)
        each = triton.cdiv(last - first, max(1, programs(self.q) // query_tiles))
        each = triton.cdiv(each, step) * step
        splits = triton.cdiv(last - first, each)
        blocks = triton.cdiv(self.x.shape[1], config.BLOCK_D)
        _scan_kernel[(query_tiles * splits,)](
            self.q, self.low, self.x, v.scale, v.term, v.outer, self.factor, theta, self.skip,
            hits, count, self.norm, len(self.q), len(self.x), self.x.shape[1], hits.shape[1],
            self.tiles, tile_step(self.tiles), first, last, each, step, each * blocks,
            self.bound, self.q.stride(0), self.x.stride(0), DENSE=min(window, 2), **self.flags,
            **config._asdict(),
        )  # fmt: skip


def scan_precision(x: Tensor) -> str:
    """On tensor cores always, for what is returned is scored again: three products of TF32 halves,
    or one where PyTorch may take that for a product."""
    return "tf32x3" if x.dtype == torch.float32 and precision(x) == "ieee" else precision(x)


def tile_step(tiles: int) -> int:
    """A step through all tiles, modulo their number, whose first positions lie apart: the golden
    section, made to have no common factor with it."""
    step = max(1, round(tiles * (5**0.5 - 1) / 2))
    while math.gcd(step, tiles) > 1:
        step += 1
    return step % tiles


def scan_config(queries: int, x: Tensor) -> Config:
    """Tiles of 128 bytes of a row, and the fewest warps whose registers hold what is made of a
    tile's scores: then one takes the fewest instructions."""
    if interpreted():
        return Config(16, 64, 16, 1, 1)
    width = x.element_size()
    block_b = 16 if queries <= 16 else 64 if queries <= 64 or width == 4 else 128
    least, vectors = max(16, 32 // width), aligned(x)
    most = 128 // width if vectors else 32  # loaded one by one, and each with its address
    columns = min(max(triton.next_power_of_2(x.shape[1]), least), most)
    if scan_precision(x) == "tf32x3" and x.shape[1] > columns and (block_b > 16 or not vectors):
        columns = 16  # for the halves of both operands, beside sums that go on
    few = block_b == 16 or (block_b == 64 and width == 2)
    block_n = 256 if block_b == 16 and width < 4 and vectors else 128
    if x.dtype == torch.float8_e4m3fn and block_b > 16:
        block_b = 128 if queries > 128 and hopper(x) else 64
        block_n = 64 if hopper(x) else 128  # promoted, a score has two sums in registers
    return Config(block_b, block_n, columns, 4 if few or (hopper(x) and vectors) else 8, 3)


def promoted(x: Tensor) -> bool:
    """Whether products are added up in few bits, and only PROMOTED of them before fp32."""
    return x.dtype == torch.float8_e4m3fn and hopper(x)


def hopper(x: Tensor) -> bool:
    """Its matrix products read both operands from shared memory and leave registers."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
