"""Safetensors files whose whole header is known beforehand: written in one pass, memory-mapped to
be read, and not trusted.

A reader knows which tensors a file must hold, so it compares the header and never parses it. The
header is padded so that data begin at a multiple of 64 bytes, for SIMD and for pages.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.search.disk import filesystem
from mrl_fast.shared.arrays import as_tensor

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.int8: "I8",
}
ALIGNMENT = 64
# Bytes that are hashed, and bytes that wait for the disk, between two looks for Ctrl-C.
HASHED_BYTES, UNSYNCED_BYTES = 1 << 24, 1 << 26

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


def write(path: Path, parts: Parts, pieces: Mapping[str, Iterable[Tensor]]) -> str:
    """Writes a new file and has it reach the disk; returns its sha256.

    Args:
        pieces: Each part's elements in order, cut anywhere.

    Raises:
        TypeError: Pieces with another dtype or number of elements than their part; a bug here,
            never the user's fault.
    """
    digest, unsynced = hashlib.sha256(), 0
    with filesystem.synced(path, "xb") as file:
        for data in _buffers(path, parts, pieces):
            file.write(data)
            digest.update(data)
            unsynced += len(data)
            if unsynced >= UNSYNCED_BYTES:
                filesystem.sync_file(file, path)
                unsynced = 0
    return digest.hexdigest()


def _buffers(
    path: Path, parts: Parts, pieces: Mapping[str, Iterable[Tensor]]
) -> Iterator[memoryview]:
    yield memoryview(header(parts))
    for name, (dtype, shape) in parts.items():
        count = 0
        for piece in pieces[name]:
            if piece.dtype != dtype:
                raise TypeError(f"{path}: {name}: expected {dtype}, got {piece.dtype}")
            count += piece.numel()
            data = piece.reshape(-1).view(torch.uint8).numpy().data
            for begin in range(0, len(data), HASHED_BYTES):
                yield data[begin : begin + HASHED_BYTES]
        if count != math.prod(shape):
            raise TypeError(f"{path}: {name}: expected {math.prod(shape)} elements, got {count}")


class TensorFile:
    """A file that is mapped to memory.

    Attributes:
        tensors: By name, over the file's pages; must not be written to.

    Args:
        parts: What the file must hold.
        sha256: What ``verify`` expects.
        scattered: The tensor of which single rows are read: a page that is not in memory comes
            without its neighbours.

    Raises:
        ValueError: Another size or header than expected, or no file.
    """

    def __init__(self, path: Path, parts: Parts, sha256: str, scattered: str | None = None):
        self.path, self._sha256 = path, sha256
        head = header(parts)
        expected = len(head) + sum(map(size_of, parts.values()))
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected:
                    raise ValueError(f"{path}: size: expected {expected} bytes, got {size}")
                # Private: some network file systems map nothing that is shared.
                self._mapped = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ)
        except OSError as error:
            raise ValueError(f"{path}: expected a file to read, got {error.strerror}") from error
        if self._mapped[: len(head)] != head:
            raise ValueError(f"{path}: header: expected that of {', '.join(parts)}, got another")
        self.tensors: dict[str, Tensor] = {}
        begin = len(head)
        for name, part in parts.items():
            size = size_of(part)
            data = np.frombuffer(self._mapped, dtype=np.uint8, count=size, offset=begin)
            if name == scattered:
                page = begin - begin % mmap.PAGESIZE
                with suppress(OSError):  # it is advice: some kernels and file systems take none
                    self._mapped.madvise(mmap.MADV_RANDOM, page, begin + size - page)
            self.tensors[name] = as_tensor(data, name).view(part[0]).view(part[1])
            begin += size

    def verify(self) -> None:
        """Reads the whole file.

        Raises:
            ValueError: Another checksum than expected.
        """
        digest = hashlib.sha256()
        with memoryview(self._mapped) as data:
            for begin in range(0, len(data), HASHED_BYTES):
                digest.update(data[begin : begin + HASHED_BYTES])
        if digest.hexdigest() != self._sha256:
            raise ValueError(
                f"{self.path}: sha256: expected {self._sha256}, got {digest.hexdigest()}"
            )
