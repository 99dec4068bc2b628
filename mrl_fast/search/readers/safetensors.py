"""Tensors in ``.safetensors`` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mrl_fast.search.readers.base import SeekableSource, Source
from mrl_fast.shared.memory import HOST

TENSORS = ("F16", "BF16", "F32", "F64")


class _Safetensors(SeekableSource):
    def __init__(self, path: Path, key: str | None):
        with _opened(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            kinds = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        found = [n for n, (shape, dtype) in kinds.items() if dtype in TENSORS and len(shape) == 2]
        if key is None and len(found) == 1:
            (key,) = found
        if key not in found:
            expected = f"a tensor [n, D] of {', '.join(TENSORS)}"
            if found:
                expected = f"one of {', '.join(map(repr, found))}"
            shown = "; ".join(f"{n!r} {shape} of {dtype}" for n, (shape, dtype) in kinds.items())
            got = f"{key!r} of {shown[:400] or 'no tensors'}"
            raise ValueError(f"{path}: key: expected {expected}, got {got}")
        self.key = key
        super().__init__(path, *kinds[key][0])

    def _read(self, begin: int, end: int) -> Any:
        # The file is opened for each read, so that pages read before leave memory.
        with _opened(self.path) as file, HOST:
            return file.get_slice(self.key)[begin:end]


def open_vectors(path: Path, key: str | None) -> Source:
    """A tensor ``[n, D]`` of floats; without a key, the only one."""
    return _Safetensors(path, key)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
