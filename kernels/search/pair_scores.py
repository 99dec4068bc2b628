"""The canonical score of a pair, and the kernels that score pairs of a query and chosen rows.

Columns are taken in blocks of 64: a block's products are summed neighbour by neighbour, then block
after block is added to the sum so far. That order follows from the columns alone, so a score has
the same bits whatever batch, list or kernel it is made in, and a sum can be carried from a prefix
of whole blocks to a longer one. Products and sums are rounded one by one: fused where a compiler
sees fit, they would differ from kernel to kernel.
"""

import functools

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.search.keys import EMPTY, SORTED_AT_ONCE, make_key
from mrl_fast.kernels.search.metrics import NUMBERS
from mrl_fast.kernels.shared.tiling import aligned, cdiv, interpreted, next_power_of_2
from torch import Tensor

LINEAR = tl.constexpr(3)
WHOLE_BLOCK = 64  # columns whose sum can be carried
ROUNDED = dict(enable_fp_fusion=False)  # rounds every product and every sum
ROOMY = dict(maxnreg=168)  # registers a thread may have; ptxas by itself takes fewer and spills
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _product(x, y):
    """A product rounded by itself, whatever is added to it: for Blackwell, ptxas fuses pairs of
    fp32 products with sums even where it is asked not to."""
    if INTERPRETED or x.dtype == tl.float64:
        product = x * y
    else:
        product = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return product


@triton.jit
def _sum_pairs(x, ROWS: tl.constexpr, LOG_COLUMNS: tl.constexpr):  # [ROWS, 2^LOG_COLUMNS]
    """Sums of neighbours, then of neighbouring sums, two numbers at a time: tl.sum adds more than
    two in an order that depends on how the loads were vectorised."""
    for i in tl.static_range(LOG_COLUMNS):
        x = tl.sum(tl.reshape(x, (ROWS, 1 << (LOG_COLUMNS - 1 - i), 2)), axis=2)
    return tl.reshape(x, (ROWS,))


@triton.jit
def _add_blocks(total, x, ROWS: tl.constexpr, BLOCKS: tl.constexpr):  # [ROWS, BLOCKS · 64]
    """total plus the sum of each block of 64 columns, one after the other."""
    if BLOCKS == 1:
        return total + _sum_pairs(x, ROWS, 6)
    x = tl.reshape(x, (ROWS * BLOCKS, 64))
    sums = tl.reshape(_sum_pairs(x, ROWS * BLOCKS, 6), (ROWS, BLOCKS))
    for i in tl.static_range(BLOCKS):  # the mask picks one block's sum; adding zeros changes no bit
        total += tl.sum(tl.where(tl.arange(0, BLOCKS)[None, :] == i, sums, 0.0), axis=1)
    return total


@triton.jit
def pair_scores(
    q_ptr,  # [dim], the query
    x_ptr,  # [N, dim]
    scale_ptr,  # [N] fp32, as the next; linear only
    outer_ptr,
    factor,  # the query's
    rows,  # [ROWS] int64
    there,  # [ROWS], whether there is a row
    total,  # [ROWS] of ACC: the sum over the columns before `begin`, whole blocks
    begin,
    dim,
    stride_xn,
    METRIC: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):
    x_square = tl.zeros((ROWS,), ACC)
    q_square = tl.zeros((1,), ACC)
    x_rows = x_ptr + rows[:, None] * stride_xn
    for start in range(begin, dim, BLOCKS * 64):
        offs_d = start + tl.arange(0, BLOCKS * 64)
        mask_d = offs_d < dim
        q = tl.load(q_ptr + offs_d, mask_d, other=0.0).to(tl.float32).to(ACC)  # by fp32, for float8
        x = tl.load(x_rows + offs_d[None, :], there[:, None] & mask_d[None, :], other=0.0)
        x = x.to(tl.float32).to(ACC)
        if METRIC == 2:
            apart = q[None, :] - x
            total = _add_blocks(total, -_product(apart, apart), ROWS, BLOCKS)
        else:
            total = _add_blocks(total, _product(q[None, :], x), ROWS, BLOCKS)
        if METRIC == 1:
            x_square = _add_blocks(x_square, _product(x, x), ROWS, BLOCKS)
            q_square = _add_blocks(q_square, _product(q, q)[None, :], 1, BLOCKS)
    if METRIC == 1:
        norm = _root(x_square, ACC) * _root(q_square, ACC)
        total = _ratio(total, tl.where(norm == 0.0, 1.0, norm), ACC)  # NaN stays NaN
        total = tl.where(norm == 0.0, 0.0, total)
    if METRIC == LINEAR:
        total = _product(total, tl.load(scale_ptr + rows, there, other=0.0).to(ACC))
        if HAS_OUTER:
            outer = tl.load(outer_ptr + rows, there, other=0.0)
            total += _product(factor, outer)
    return total.to(tl.float32)


@triton.jit
def _root(x, ACC: tl.constexpr):
    return tl.sqrt_rn(x) if ACC == tl.float32 else tl.sqrt(x)


@triton.jit
def _ratio(x, y, ACC: tl.constexpr):
    return tl.div_rn(x, y) if ACC == tl.float32 else x / y


@triton.jit(do_not_specialize=["N", "C", "tiles", "stride_rb", "stride_sb"])
def _keys_kernel(
    q_ptr,  # [B, dim]
    x_ptr,  # [N, dim]
    scale_ptr,
    outer_ptr,
    factor_ptr,  # [B]
    rows_ptr,  # [B, C] int64, −1 is none
    allowed_ptr,  # [N] uint8
    sums_ptr,  # [B, C] fp32: sums over the columns before `begin`
    out_ptr,  # [B, C] int64
    N,
    C,
    tiles,  # of ROWS rows; the grid is B · tiles because a second axis ends at 65535
    begin,
    dim,
    stride_qb,  # in elements, as the next three; last axes are contiguous
    stride_xn,
    stride_rb,
    stride_sb,
    METRIC: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    lanes = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    there = lanes < C
    rows = tl.load(rows_ptr + b * stride_rb + lanes, there, other=-1)
    there &= (rows >= 0) & (rows < N)
    if HAS_ALLOWED:
        there &= tl.load(allowed_ptr + rows, there, other=0) != 0
    total = tl.zeros((ROWS,), ACC)
    if HAS_SUMS:
        total = tl.load(sums_ptr + b * stride_sb + lanes, there, other=0.0).to(ACC)
    factor = tl.load(factor_ptr + b) if HAS_OUTER else 0.0
    score = pair_scores(
        q_ptr + b * stride_qb, x_ptr, scale_ptr, outer_ptr, factor, rows, there, total, begin, dim,
        stride_xn, METRIC, HAS_OUTER, ROWS, BLOCKS, ACC,
    )  # fmt: skip
    key = tl.where(there, make_key(score, rows), EMPTY)
    tl.store(out_ptr + b * C + lanes, key, lanes < C)


class Pairs:
    """Queries and rows whose pairs are scored: ``[B, dim]`` and ``[N, dim]``, by a metric.

    Args:
        linear: sum · scale + factor · outer, ``[N]``, ``[B]`` and ``[N]`` fp32, instead of a
            metric's; without the second part where there is no outer.
        allowed: ``[N]`` uint8: rows where it is 0 have no score.
        double: Sum in fp64.
    """

    def __init__(
        self,
        q: Tensor,
        x: Tensor,
        metric: str,
        *,
        linear: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
        allowed: Tensor | None = None,
        double: bool = False,
    ):
        self.q, self.x, self.allowed = q, x, allowed
        self.scale, self.factor, self.outer = linear or (None, None, None)
        self.flags = {
            "METRIC": NUMBERS["linear" if linear else metric],
            "HAS_OUTER": self.outer is not None,
            "HAS_ALLOWED": allowed is not None,
            "ACC": tl.float64 if double else tl.float32,
        }
        plain = self.flags["METRIC"] != NUMBERS["cosine"] and not double and not in_bytes(x)
        self.room = {} if plain else ROOMY

    def keys(self, rows: Tensor, *, begin: int = 0, sums: Tensor | None = None) -> Tensor:
        """The keys ``[B, C]`` of each query with its own rows ``[B, C]``, −1 for none."""
        B, C = rows.shape
        out = torch.empty(B, C, dtype=torch.int64, device=rows.device)
        if not out.numel():
            return out
        blocks = pair_blocks(self.x, B * C)
        tiles = cdiv(C, blocks["ROWS"])
        _keys_kernel[(B * tiles,)](
            self.q, self.x, self.scale, self.outer, self.factor, rows, self.allowed, sums, out,
            len(self.x), C, tiles, begin, self.x.shape[1], self.q.stride(0), self.x.stride(0),
            rows.stride(0), 0 if sums is None else sums.stride(0), HAS_SUMS=sums is not None,
            **self.flags, **blocks, **self.room, **ROUNDED,
        )  # fmt: skip
        return out


RESCANNED = SORTED_AT_ONCE  # the largest k of a rescan
FEW_PAIRS = 1 << 13  # 128 programs of 64 rows, one a processor


def in_bytes(x: Tensor) -> bool:
    """Whether rows are loaded byte by byte."""
    return x.element_size() == 1 and not aligned(x)


def pair_blocks(x: Tensor, pairs: int) -> dict[str, int]:
    """A program reads 8 KiB of rows, 128 contiguous bytes of each at a time: wider blocks take more
    shuffles a column. Few pairs leave the device idle, so they take up to 256 columns at a time:
    more programs of fewer steps. Unaligned bytes take a load and an address each: 64 rows."""
    if interpreted():
        return dict(ROWS=256, BLOCKS=1, num_warps=1)
    return _pair_blocks(x.element_size(), x.shape[1], in_bytes(x), pairs <= FEW_PAIRS)


@functools.lru_cache(maxsize=4096)
def _pair_blocks(width: int, dim: int, in_bytes: bool, few: bool) -> dict[str, int]:
    width *= WHOLE_BLOCK
    blocks = min(4, 512 // width) if few else max(1, 128 // width)
    blocks = min(blocks, next_power_of_2(cdiv(dim, WHOLE_BLOCK)))
    rows = 8192 // (blocks * width)
    if in_bytes:
        rows, blocks = 64, 1
    return dict(ROWS=rows, BLOCKS=blocks, num_warps=4)
