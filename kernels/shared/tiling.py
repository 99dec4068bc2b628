"""The stream of nested score tiles: S_g = Σ_{h <= g} X[:, slab h] · W[:, slab h]ᵀ.

One program owns a tile of rows × classes and walks one flat list of column blocks, made on the
host. A block that ends a slab is flagged with that slab's g; there the program folds S_g into its
loss. G and the dims stay runtime values, so one binary a dtype serves every nesting.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from mrl_fast.kernels.shared.device import captures
from torch import Tensor

WORKSPACE_BYTES = 256 << 20  # of scores or score gradients held at a time
MOST_ROWS = 65535 // 2 * 128  # a grid's second axis ends at 65535 tiles, of 64 rows at least


class Config(NamedTuple):
    BLOCK_B: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# Shapes of tiles, by the width of an element in bytes. Kernels that keep more of a tile than its
# scores and their exponentials in registers, for example to store it, take narrower ones; gradients
# with a matrix of masks take the narrowest.
CONFIGS = {2: Config(128, 128, 64, 8, 3), 4: Config(64, 64, 32, 4, 3)}
STORING_CONFIGS = {2: Config(128, 64, 64, 8, 3), 4: Config(64, 64, 32, 8, 3)}
MASKING_CONFIGS = {2: Config(64, 64, 64, 8, 3), 4: Config(64, 64, 32, 8, 3)}


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, where ``tl.dot`` is right in fp32 only. Triton
    decides it when a kernel is decorated."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def operand(x: Tensor) -> Tensor:
    """What a kernel reads in place of x: x itself where its last axis is contiguous, whatever the
    row stride, else a copy. Two more are copied: floating point in the interpreter, to fp32, and
    rows so far apart, hence few, that offsets in a tile would need more than 32 bits."""
    x = x.float() if interpreted() and x.is_floating_point() else x
    return x if x.stride(-1) == 1 and x.stride(0) < 1 << 22 else x.contiguous()


def columns(x: Tensor, dim: int) -> Tensor:
    """The first ``dim`` columns, as an operand."""
    return operand(x if x.shape[1] == dim else x[:, :dim])


def aligned(x: Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time."""
    return x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a workspace: the interpreter truncates fp32 to bf16 instead of rounding it."""
    return torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype


def config(x: Tensor, configs: dict[int, Config] = CONFIGS) -> Config:
    return Config(16, 16, 16, 1, 1) if interpreted() else configs[x.element_size()]


def precision(x: Tensor) -> str:
    """How fp32 products are made, by PyTorch's own setting; half precision has one way only.

    This reads the setting of CUDA's products, which both of PyTorch's interfaces set: the older
    one's getter raises once the newer one was used.
    """
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up; Triton's own is a kernel's function, slow to call from the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


def whole_tiles(classes: int) -> int:
    return cdiv(classes, 128) * 128  # a multiple of every BLOCK_V


def slabs(dims: Sequence[int]) -> list[slice]:
    """The columns that are new to each prefix."""
    return [slice(begin, end) for begin, end in zip((0, *dims), dims, strict=False)]


_captured: dict[int, Tensor] = {}  # schedules that CUDA graphs read, by address


def schedule_of(x: Tensor, dims: Sequence[int], block_d: int) -> Tensor:
    """The schedule of these dims: made once, and kept for ever where a CUDA graph reads it."""
    schedule = make_schedule(tuple(dims), block_d, x.device)
    if captures(x):
        _captured[schedule.data_ptr()] = schedule
    return schedule


@functools.lru_cache(maxsize=256)
def make_schedule(dims: tuple[int, ...], block_d: int, device: torch.device) -> Tensor:
    """``[steps, 4]`` int16: a block's number, its columns [lo, hi) counted from its first in units
    of ``alignment(dims)``, and g where it ends slab g (else −1). A block that straddles two slabs
    comes twice. The numbers have 16 bits because Triton pipelines loads of 32 and more: a load of
    an address would take the stages meant for the tiles. The copy to the device is waited for, as
    any stream may read it, and a CUDA graph can capture no copy from pageable memory."""
    entries, unit = [], alignment(dims)
    for g, slab in enumerate(slabs(dims)):
        for start in range(slab.start // block_d * block_d, slab.stop, block_d):
            lo, hi = max(slab.start, start), min(slab.stop, start + block_d)
            ends = (lo - start) // unit, (hi - start) // unit
            entries.append((start // block_d, *ends, g if hi == slab.stop else -1))
    return torch.tensor(entries, dtype=torch.int16, device="cpu").to(device)


def chunks(size: int, step: int) -> Iterator[slice]:
    for begin in range(0, size, step):
        yield slice(begin, min(begin + step, size))


def row_step(bytes_a_row: int) -> int:
    """How many rows to take at a time, so that their temporaries fit the workspace and a grid."""
    return min(MOST_ROWS, max(128, WORKSPACE_BYTES // max(1, bytes_a_row) // 128 * 128))


def equal_step(size: int, step: int) -> int:
    """The least step, in whole tiles, that makes no more chunks than this one."""
    return max(128, whole_tiles(cdiv(size, max(1, cdiv(size, step)))))


def chunk_steps(rows: int, classes: int, bytes_a_score: int) -> tuple[int, int]:
    """Rows and classes of a chunk of scores that fits the workspace, about as high as it is wide:
    the products over a chunk are as deep as its sides. Chunks are equally high, so that they can be
    wider and fewer, and equally wide, so that the last ones fill the device too."""
    area = WORKSPACE_BYTES // bytes_a_score
    row_step = max(128, math.isqrt(area), area // max(1, classes)) // 128 * 128
    row_step = equal_step(rows, min(row_step, MOST_ROWS))
    class_step = max(128, area // max(1, min(row_step, rows)) // 128 * 128)
    return row_step, equal_step(classes, class_step)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32, whatever the operands are."""
    if a.dtype == b.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    return a.float() @ b.float()


@triton.jit
def add_block(
    acc,  # [BLOCK_B, BLOCK_V] fp32
    x_ptr,  # [B, D]
    w_ptr,  # [V, D]
    schedule_ptr,  # [steps, 4] int16
    step,
    rows,  # [BLOCK_B] in [0, B)
    classes,  # [BLOCK_V] in [0, V)
    stride_xb,
    stride_wv,
    BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + x · wᵀ over one block of columns. Both operands are masked: what stands in a later
    slab, an infinity say, must not reach this one."""
    entry = schedule_ptr + step * 4
    lanes = tl.arange(0, BLOCK_D)
    lo = tl.load(entry + 1).to(tl.int32) * ALIGNMENT  # so Triton knows that it is a multiple
    hi = tl.load(entry + 2).to(tl.int32) * ALIGNMENT
    mask_d = (lanes >= lo) & (lanes < hi)
    offs_d = tl.load(entry).to(tl.int32) * BLOCK_D + lanes
    x = tl.load(x_ptr + rows[:, None] * stride_xb + offs_d[None, :], mask_d[None, :], other=0.0)
    w = tl.load(w_ptr + classes[None, :] * stride_wv + offs_d[:, None], mask_d[:, None], other=0.0)
    return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def tile_of(axis: tl.constexpr, size, BLOCK: tl.constexpr):
    """This program's offsets along an axis, which of them exist, and the same kept in range: rows
    past the end are read as the last one and dropped at the store, so that no load needs a mask."""
    lanes, begin = tl.arange(0, BLOCK), tl.program_id(axis) * BLOCK
    offs = begin.to(tl.int64) + lanes
    return offs, lanes < size - begin, tl.minimum(offs, size - 1)


@triton.jit
def score_offsets(stride, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr):
    """Where this program's tile of a ``[B, V]`` matrix begins, and its elements from there: 32-bit,
    for a tile of 64-bit offsets would take half the registers."""
    rows, classes = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_V)
    begin = tl.program_id(1).to(tl.int64) * BLOCK_B * stride + tl.program_id(0) * BLOCK_V
    return begin, rows[:, None] * stride + classes[None, :]


def alignment(dims: Sequence[int]) -> int:
    """A number that every slab's ends are a multiple of; 8 is enough for wide loads."""
    return 8 if all(d % 8 == 0 for d in dims) else 1
