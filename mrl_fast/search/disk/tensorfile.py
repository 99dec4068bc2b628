"""Safetensors files whose every byte of header is known beforehand: written in one pass, read by
memory map, nothing in them trusted.

Who reads one knows which tensors it must hold, so its header is compared and never parsed. It is
padded so that data begins at a multiple of 64 bytes, for SIMD and for pages.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.shared.arrays import as_tensor

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
ALIGNMENT = 64
MANY_BYTES = 1 << 24  # hashed at a time

Parts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # by name, in the file's order


def size_of(part: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = part
    return math.prod(shape) * dtype.itemsize


def header(parts: Parts) -> bytes:
    fields: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, part in parts.items():
        end = begin + size_of(part)
        fields[name] = {
            "dtype": NAMES[part[0]],
            "shape": list(part[1]),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, parts: Parts, pieces: Iterable[Tensor]) -> str:
    """Writes a new file and has it reach the disk; returns its sha256.

    ``pieces``: The tensors' bytes in order, each contiguous.
    """
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for data in _buffers(parts, pieces):
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _buffers(parts: Parts, pieces: Iterable[Tensor]) -> Iterable[memoryview]:
    yield memoryview(header(parts))
    for piece in pieces:
        data = piece.reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(data), MANY_BYTES):  # hashed while it is in cache
            yield data[begin : begin + MANY_BYTES]


def read(
    path: Path, parts: Parts, sha256: str | None = None, scattered: str | None = None
) -> dict[str, Tensor]:
    """Tensors over the file's pages, not to be written to.

    Args:
        parts: What the file must hold.
        sha256: Read all of it and compare.
        scattered: The tensor of which single rows are read: a page that is not in memory comes
            without its neighbours.

    Raises:
        ValueError: Another size, header or checksum than expected, or no file.
    """
    head = header(parts)
    expected = len(head) + sum(map(size_of, parts.values()))
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                raise ValueError(f"{path}: size: expected {expected} bytes, got {size}")
            mapped = mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError as error:
        raise ValueError(f"{path}: expected a file to read, got {error.strerror}") from error
    if mapped[: len(head)] != head:
        raise ValueError(f"{path}: header: expected that of {', '.join(parts)}, got another")
    if sha256 is not None:
        digest = hashlib.sha256(mapped).hexdigest()
        if digest != sha256:
            raise ValueError(f"{path}: sha256: expected {sha256}, got {digest}")
    tensors, begin = {}, len(head)
    for name, part in parts.items():
        size = size_of(part)
        data = np.frombuffer(mapped, dtype=np.uint8, count=size, offset=begin)
        if name == scattered:
            page = begin - begin % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_RANDOM, page, begin + size - page)
        tensors[name] = as_tensor(data, name).view(part[0]).view(part[1])
        begin += size
    return tensors
