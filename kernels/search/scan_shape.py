"""The shape of a scan's tiles, by dtype, number of queries and architecture."""

from typing import NamedTuple

import torch
import triton
from mrl_fast.kernels.shared.tiling import aligned, interpreted, precision
from torch import Tensor

BUCKET = 16  # rows
PROMOTED = 32  # columns of float8 that Hopper's tensor cores add up at once


class Config(NamedTuple):
    BLOCK_B: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int

    @property
    def groups(self) -> int:
        """Buckets of a tile, in fours. With i = 0…7, bucket 4·g + j holds the rows
        8·(i·groups + g) + 2j + {0, 1}: the 16 scores that one thread has."""
        return self.BLOCK_N // (4 * BUCKET)


def scan_config(queries: int, x: Tensor) -> Config:
    """A block of columns is 128 bytes of a row. The fewest warps whose registers hold a tile's
    scores take the fewest instructions a score."""
    if interpreted():
        return Config(16, 64, 16, 1, 1)
    width = x.element_size()
    block_b = 16 if queries <= 16 else 64 if queries <= 64 or width == 4 else 128
    least, vectors = max(16, 32 // width), aligned(x)
    most = 128 // width if vectors else 32  # unaligned elements are loaded one by one
    columns = min(max(triton.next_power_of_2(x.shape[1]), least), most)
    if scan_precision(x) == "tf32x3" and x.shape[1] > columns and (block_b > 16 or not vectors):
        columns = 16  # registers also hold both operands' halves and the running sums
    few = block_b == 16 or (block_b == 64 and width == 2)
    block_n = 256 if block_b == 16 and width < 4 and vectors else 128
    if x.dtype == torch.float8_e4m3fn and block_b > 16:
        block_b = 128 if queries > 128 and hopper(x) else 64
        block_n = 64 if hopper(x) else 128  # a promoted score has two sums in registers
    return Config(block_b, block_n, columns, 4 if few or (hopper(x) and vectors) else 8, 3)


def with_low_part(config: Config, x: Tensor) -> Config:
    """For queries in two parts: a stage holds three blocks, and two programs share an SM."""
    wide = x.shape[1] > config.BLOCK_D
    return config._replace(num_stages=2) if wide and hopper(x) else config


def promoted(x: Tensor) -> bool:
    """Whether tensor cores sum in few bits, so that every PROMOTED products go to an fp32 sum."""
    return x.dtype == torch.float8_e4m3fn and hopper(x)


def hopper(x: Tensor) -> bool:
    """Whether matrix products read both operands from shared memory, which spares registers."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def scan_precision(x: Tensor) -> str:
    """On tensor cores always, for what is returned is scored again: three products of TF32 halves,
    or one where PyTorch may take that for a product."""
    return "tf32x3" if x.dtype == torch.float32 and precision(x) == "ieee" else precision(x)
