"""Other libraries' interfaces: losses and layers over ours, vector stores over an index. Each
module needs its library; ``mrl_fast`` imports none of them."""

from __future__ import annotations


def default_dims(width: int) -> tuple[int, ...]:
    """A width and its halves down to 64: 768 is (96, 192, 384, 768)."""
    dims = [width]
    while dims[0] // 2 >= 64:
        dims.insert(0, dims[0] // 2)
    return tuple(dims)
