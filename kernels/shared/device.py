"""The device that kernels run on, which is that of the first tensor: its architecture, and how many
programs it holds at a time."""

import functools
from typing import Any

import torch
from torch import Tensor

REGISTERS = 65536  # of a multiprocessor
UNKNOWN = 3  # programs that a multiprocessor is taken to hold, before a kernel was compiled
_resident: dict[str, int] = {}


def on_its_device(function):
    """Makes the first tensor's device the current one, where Triton launches. The first argument is
    a tensor, or a NamedTuple whose first field is one."""

    @functools.wraps(function)
    def call(first, *args, **kwargs):
        x = first[0] if isinstance(first, tuple) else first
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return function(first, *args, **kwargs)
        with torch.cuda.device_of(x):
            return function(first, *args, **kwargs)

    return call


def captures(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which will read memory that it has no hold on."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def architecture(x: Tensor) -> int:
    """The first number of the compute capability; 0 where there is no device."""
    return _properties(x.device.index).major if x.is_cuda else 0


def multiprocessors(x: Tensor) -> int:
    return _properties(x.device.index).multi_processor_count if x.is_cuda else 1


def programs(x: Tensor, kernel: str) -> int:
    """How many programs of a kernel the device holds at a time: more would come in waves, the last
    of which leaves it partly idle."""
    return _resident.get(kernel, UNKNOWN) * multiprocessors(x)


def remember(kernel: str, x: Tensor, binary: Any) -> None:
    """Notes how many programs a multiprocessor holds, by the registers, threads and shared memory
    of the ``binary`` that a launch returned."""
    if not x.is_cuda or kernel in _resident or not getattr(binary, "n_regs", 0):
        return
    device, warps = _properties(x.device.index), binary.metadata.num_warps
    _resident[kernel] = max(1, min(
        REGISTERS // (-(-binary.n_regs // 8) * 8 * 32 * warps),
        device.max_threads_per_multi_processor // (32 * warps),
        device.shared_memory_per_multiprocessor // (binary.metadata.shared + 1024),
    ))  # fmt: skip
