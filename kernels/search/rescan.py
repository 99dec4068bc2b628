"""Scores the rows of a scan's buckets again; and, for queries whose hits were too many to keep,
every row. The device itself finds those queries.

Where pairs are few, one launch does both: its last programs look for queries to rescan, and end at
once where there are none. The last program to finish its share of a query's rows merges all shares.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.search.keys import EMPTY, make_key
from mrl_fast.kernels.search.pair_scores import ROUNDED, Pairs, in_bytes, pair_blocks, pair_scores
from mrl_fast.kernels.search.plan import Buffers
from mrl_fast.kernels.search.scan_shape import BUCKET, Config
from mrl_fast.kernels.shared.device import multiprocessors
from mrl_fast.kernels.shared.tiling import cdiv, next_power_of_2
from torch import Tensor

RESCAN_BYTES = 64 << 20
RESCANS = 3  # programs a multiprocessor: no more than it holds, as most of them end at once
TOGETHER = 1 << 17  # pairs; up to so many, one launch for both takes less time than two
# Registers a thread may have in a launch of both kinds; and where bytes are loaded one by one.
ROOMIER, ROOMIEST = dict(maxnreg=192), dict(maxnreg=224)
LOOKED_AT = tl.constexpr(128)  # queries at a time


@triton.jit
def bucket_row(bucket, i, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """The i-th row of a bucket: see scan_shape.Config.groups. A thread of a matrix product holds
    two neighbouring rows of every eight, so the best row of a bucket is found in one thread."""
    OF_TILE: tl.constexpr = 4 * GROUPS
    within = bucket % OF_TILE
    eight = i // 2 * GROUPS + within // 4
    return bucket // OF_TILE * TILE + eight * 8 + within % 4 * 2 + i % 2


@triton.jit
def _best_of_both(best, new):
    """The best half of ``best``, which is in descending order, and ``new``, as many in any order:
    with one descending and the other ascending, it is the larger of each pair."""
    return tl.sort(tl.maximum(best, tl.sort(new)), descending=True)


@triton.jit
def _rescan(
    b,
    split,
    splits,
    rows_each,
    q_ptr,  # [dim], the query
    x_ptr,
    scale_ptr,
    outer_ptr,
    factor,
    allowed_ptr,
    parts_ptr,
    done_ptr,
    keys_ptr,  # [width], the query's: the best go first
    N,
    dim,
    stride_xn,
    METRIC: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the KEPT best of a split's rows. Their place also holds the next KEPT keys, made tile
    by tile, until these are sorted."""
    parts_ptr += b * splits * KEPT
    part_ptr = parts_ptr + split * KEPT
    first = split.to(tl.int64) * rows_each
    best = tl.full((KEPT,), EMPTY, tl.int64)
    worst = tl.min(best)
    for start in range(0, rows_each, KEPT):
        for tile in range(0, KEPT, ROWS):
            lanes = tile + tl.arange(0, ROWS)
            rows = first + start + lanes
            there = rows < N
            if HAS_ALLOWED:
                there &= tl.load(allowed_ptr + rows, there, other=0) != 0
            score = pair_scores(
                q_ptr, x_ptr, scale_ptr, outer_ptr, factor, rows, there, tl.zeros((ROWS,), ACC),
                0, dim, stride_xn, METRIC, HAS_OUTER, ROWS, BLOCKS, ACC,
            )  # fmt: skip
            tl.store(part_ptr + lanes, tl.where(there, make_key(score, rows), EMPTY))
        tl.debug_barrier()
        new = tl.load(part_ptr + tl.arange(0, KEPT))
        if tl.max(new) > worst:
            best = _best_of_both(best, new)
            worst = tl.min(best)
        tl.debug_barrier()  # before it is written again
    lanes = tl.arange(0, KEPT)
    tl.store(part_ptr + lanes, best)
    tl.debug_barrier()  # all threads have stored; what is released below includes it
    if tl.atomic_add(done_ptr + b, 1, sem="acq_rel") == splits - 1:
        best = tl.load(parts_ptr + lanes, cache_modifier=".cg")
        for other in range(1, splits):
            new = tl.load(parts_ptr + other * KEPT + lanes, cache_modifier=".cg")
            if tl.max(new) > tl.min(best):
                best = _best_of_both(best, new)
        tl.store(keys_ptr + lanes, best)


NOT_SPECIALIZED = "B N C tiles pair_programs splits groups rows_each stride_hb".split()


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _buckets_kernel(
    q_ptr,  # [B, dim]
    x_ptr,  # [N, dim]
    scale_ptr,
    outer_ptr,
    factor_ptr,  # [B]
    hits_ptr,  # [B, >= C] int64, of a scan
    count_ptr,  # [B] int32, how many there are
    flag_ptr,  # [B] int32, not 0: to be rescanned; set where there are more than C hits
    allowed_ptr,  # [N] uint8
    parts_ptr,  # [B, splits, KEPT] int64: the best of each split of a rescan
    done_ptr,  # [B] int32, 0 at first: splits that are done
    keys_ptr,  # [B, C · rows of a bucket] int64, out
    B,
    N,
    C,
    tiles,  # of ROWS rows
    pair_programs,  # the first ones, B · tiles or none; the others rescan
    splits,  # of the rows
    groups,  # of the queries
    rows_each,  # of a split, a multiple of KEPT
    dim,
    stride_qb,  # in elements, as the next two; last axes are contiguous
    stride_xn,
    stride_hb,
    METRIC: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    KEPT: tl.constexpr,  # at least k; 0: there are no rescans
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RESCAN_ROWS: tl.constexpr,
    RESCAN_BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):
    PER: tl.constexpr = TILE // (4 * GROUPS)  # rows of a bucket
    if tl.program_id(0) < pair_programs:
        b = (tl.program_id(0) // tiles).to(tl.int64)
        lanes = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
        count = tl.load(count_ptr + b)
        scored = (count <= C) & (tl.load(flag_ptr + b) == 0)
        if count > C:
            tl.store(flag_ptr + b, 1)
        there = (lanes // PER < count) & scored
        hit = tl.load(hits_ptr + b * stride_hb + lanes // PER, there, other=0)
        rows = bucket_row(hit & 0xFFFFFFFF, lanes % PER, TILE, GROUPS)
        there &= rows < N
        if HAS_ALLOWED:
            there &= tl.load(allowed_ptr + rows, there, other=0) != 0
        factor = tl.load(factor_ptr + b) if HAS_OUTER else 0.0
        score = pair_scores(
            q_ptr + b * stride_qb, x_ptr, scale_ptr, outer_ptr, factor, rows, there,
            tl.zeros((ROWS,), ACC), 0, dim, stride_xn, METRIC, HAS_OUTER, ROWS, BLOCKS, ACC,
        )  # fmt: skip
        key = tl.where(there, make_key(score, rows), EMPTY)
        # A rescan writes a query's first KEPT keys itself, maybe before this.
        mine = (lanes < C * PER) & (scored | (lanes >= KEPT))
        tl.store(keys_ptr + b * C * PER + lanes, key, mine)
    elif KEPT:
        program = tl.program_id(0) - pair_programs
        split, group = program % splits, program // splits
        for start in range(group, B, groups * LOOKED_AT):
            queries = start + tl.arange(0, LOOKED_AT) * groups
            flagged = tl.load(flag_ptr + queries, queries < B, other=0) != 0
            flagged |= tl.load(count_ptr + queries, queries < B, other=0) > C
            if tl.max(flagged.to(tl.int32)) != 0:
                for query in range(start, tl.minimum(B, start + groups * LOOKED_AT), groups):
                    many = tl.load(count_ptr + query) > C
                    if many | (tl.load(flag_ptr + query) != 0):
                        b = tl.zeros((), tl.int64) + query
                        factor = tl.load(factor_ptr + b) if HAS_OUTER else 0.0
                        _rescan(
                            b, split, splits, rows_each, q_ptr + b * stride_qb, x_ptr, scale_ptr,
                            outer_ptr, factor, allowed_ptr, parts_ptr, done_ptr,
                            keys_ptr + b * C * PER, N, dim, stride_xn, METRIC, HAS_OUTER,
                            HAS_ALLOWED, KEPT, RESCAN_ROWS, RESCAN_BLOCKS, ACC,
                        )  # fmt: skip


class Rescans(NamedTuple):
    """The programs that rescan: ``splits`` of the rows times ``groups`` of the queries."""

    splits: int = 1
    groups: int = 0
    rows_each: int = 0
    KEPT: int = 0
    RESCAN_ROWS: int = 0
    RESCAN_BLOCKS: int = 0


def score_buckets(pairs: Pairs, to: Buffers, most: int, config: Config, k: int = 0) -> Tensor:
    """Keys of every row of each query's buckets, of which there may be ``most``:
    ``[B, most · BUCKET]``. Where there are more, or hits were dropped, the query is flagged, and
    its keys are the best of all rows, at least k of them; none where k is 0."""
    B, width = to.hits.shape[0], most * BUCKET
    keys = torch.empty(B, width, dtype=torch.int64, device=to.hits.device)
    if not k or B * width > TOGETHER:
        _launch(pairs, to, keys, config, Rescans())
    if k:
        (N, _), most = pairs.x.shape, RESCANS * multiprocessors(pairs.x)
        blocks = pair_blocks(pairs.x, B * N)
        rescans = _rescans(B, N, k, most, blocks["ROWS"], blocks["BLOCKS"])
        _launch(pairs, to, keys, config, rescans, pairs_too=B * width <= TOGETHER)
    return keys


@functools.lru_cache(maxsize=4096)
def _rescans(B: int, N: int, k: int, most: int, rows: int, blocks: int) -> Rescans:
    """As many splits as keep the device busy with one query, fewer where the bytes of all queries
    would be too many, and then as many groups of queries as keep it busy."""
    kept = max(32, next_power_of_2(k))
    splits = max(1, min(most, cdiv(N, kept), RESCAN_BYTES // (8 * kept * B)))
    rows_each = cdiv(cdiv(N, splits), kept) * kept
    return Rescans(splits, min(B, cdiv(most, splits)), rows_each, kept, min(rows, kept), blocks)


def _launch(
    pairs: Pairs, to: Buffers, keys: Tensor, config: Config, rescans: Rescans, *,
    pairs_too: bool = True,
) -> None:  # fmt: skip
    splits, groups, rows_each, kept, *rescan_blocks = rescans
    (B, width), (N, dim), x, q = keys.shape, pairs.x.shape, pairs.x, pairs.q
    blocks, parts, room = pair_blocks(x, B * width), None, ROOMIEST if in_bytes(x) else ROOMIER
    tiles = cdiv(width, blocks["ROWS"])
    programs = B * tiles if pairs_too else 0
    if kept:
        parts = torch.empty(B * splits * kept, dtype=torch.int64, device=keys.device)
    _buckets_kernel[(programs + splits * groups,)](
        q, x, pairs.scale, pairs.outer, pairs.factor, to.hits, to.count, to.flag, pairs.allowed,
        parts, to.done, keys, B, N, width // BUCKET, tiles, programs, splits, groups,
        rows_each, dim, q.stride(0), x.stride(0), to.hits.stride(0),
        **pairs.flags, KEPT=kept, TILE=config.BLOCK_N, GROUPS=config.groups,
        ROWS=blocks["ROWS"], BLOCKS=blocks["BLOCKS"],
        RESCAN_ROWS=rescan_blocks[0], RESCAN_BLOCKS=rescan_blocks[1],
        num_warps=8 if kept > 512 else 4, **(room if kept else pairs.room), **ROUNDED,
    )  # fmt: skip
