"""Triton's interpreter, made fast. By itself it sorts by steps of compare and swap, and with a
reducing function of our own it takes one number at a time."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import ReduceOps, TensorHandle


def reduce_by_slices(self: ReduceOps, input: tuple) -> list:
    """As ``generic_reduce`` and in its order, with whole slices along the axis as operands."""
    original_axis = self.axis
    input, axis = self.unravel(input, self.axis)
    arrays = [np.moveaxis(arg.handle.data, axis, 0) for arg in input]

    def at(i: int) -> tuple:
        return tuple(self.to_tensor(a[i], arg.dtype) for a, arg in zip(arrays, input, strict=True))

    total = at(0)
    for i in range(1, len(arrays[0])):
        combined = self.combine_fn.fn(*total, *at(i))
        total = combined if isinstance(combined, tuple) else (combined,)
    result = []
    for one, arg in zip(total, input, strict=True):
        data = one.handle.data.reshape(arrays[0].shape[1:])
        if self.keep_dims:
            data = np.expand_dims(data, axis)
        elif original_axis is None:
            data = data.item()
        result.append(self.to_tensor(data, arg.dtype))
    return result


def sort(x: tl.tensor, dim: int | None = None, descending: bool = False) -> tl.tensor:
    data = np.sort(x.handle.data, axis=-1)
    data = data[..., ::-1].copy() if descending else data
    handle = TensorHandle(data, x.dtype.scalar)
    return tl.tensor(handle, x.type)  # pyright: ignore[reportArgumentType]


def install() -> None:
    ReduceOps.generic_reduce = reduce_by_slices
    tl.sort = sort
