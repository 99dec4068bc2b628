"""The shape of a scan's tiles, by dtype, number of queries and architecture."""

import functools
from typing import NamedTuple

import torch
from mrl_fast.kernels.shared.device import architecture
from mrl_fast.kernels.shared.tiling import aligned, interpreted, next_power_of_2, precision
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
    return _scan_config(
        queries, x.dtype, x.shape[1], aligned(x), hopper(x), scan_precision(x) == "tf32x3"
    )


@functools.lru_cache(maxsize=4096)
def _scan_config(
    queries: int, dtype: torch.dtype, dim: int, vectors: bool, hopper: bool, three_products: bool
) -> Config:
    width = dtype.itemsize
    block_b = 16 if queries <= 16 else 64 if queries <= 64 or width == 4 else 128
    least = max(16, 32 // width)
    most = 128 // width if vectors else 32  # unaligned elements are loaded one by one
    columns = min(max(next_power_of_2(dim), least), most)
    if three_products and dim > columns and (block_b > 16 or not vectors):
        columns = 16  # registers also hold both operands' halves and the running sums
    few = block_b == 16 or (block_b == 64 and width == 2)
    block_n = 256 if block_b == 16 and width < 4 and vectors else 128
    if dtype == torch.float8_e4m3fn and block_b > 16:
        block_b = 128 if queries > 128 and hopper else 64
        block_n = 64 if hopper else 128  # a promoted score has two sums in registers
    return Config(block_b, block_n, columns, 4 if few or (hopper and vectors) else 8, 3)


def with_low_part(config: Config, x: Tensor) -> Config:
    """The shape for queries in two parts, which put three blocks into a stage: with two stages, two
    programs still fit a multiprocessor."""
    wide = x.shape[1] > config.BLOCK_D
    return config._replace(num_stages=2) if wide and hopper(x) else config


def promoted(x: Tensor) -> bool:
    """Whether tensor cores sum in few bits, so that every PROMOTED products go to an fp32 sum."""
    return x.dtype == torch.float8_e4m3fn and hopper(x)


def hopper(x: Tensor) -> bool:
    """Whether matrix products read both operands from shared memory, which spares registers."""
    return architecture(x) == 9


def one_sum_a_product(x: Tensor) -> bool:
    """Whether a second product may not be added to a first one's sum: on Blackwell two matrix
    products in a row have been seen to give wrong sums (Triton's issue 10821). Products of integers
    are not of that kind there, and two sums of them would not fit the registers."""
    return architecture(x) == 10 and x.dtype != torch.int8


def scan_precision(x: Tensor) -> str:
    """Always that of tensor cores, as rows are scored again before they are returned. fp32 products
    are three of TF32 halves; one where PyTorch's setting allows TF32 or a sum may hold but one."""
    if x.dtype == torch.float32 and precision(x) == "ieee":
        return "tf32" if one_sum_a_product(x) else "tf32x3"
    return precision(x)
