"""What an index is made with: checked once, saved in its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.codes import CODES, ROWS, Code
from mrl_fast.shared.checks import METRICS, check_choice, check_dims
from mrl_fast.shared.dispatch import triton_is_interpreted

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
ROTATIONS = ("pca",)
WIDTH = 1 << 24  # at most


CODED_WIDTHS = 128, 1 << 13  # of indexes that have codes where nothing else is asked for


def default_codes(dims: Sequence[int], dtype: str, device: str) -> str | None:
    """What codes an index has where neither these nor a prefix_dtype are asked for: those that make
    its exact search fast, where they take little beside its vectors."""
    least, most = CODED_WIDTHS
    fitting = least <= max(dims) <= most and dtype == "float32" and device == "cpu"
    return "bits" if fitting else None


@dataclass(frozen=True)
class IndexConfig:
    """The options of a MatryoshkaIndex, which says what they mean.

    Raises:
        ValueError, TypeError: Dims that do not ascend, an unknown metric, dtype, rotation or
            device.
    """

    dims: tuple[int, ...]
    metric: str = "cosine"
    dtype: str = "float32"
    prefix_dtype: str = "float32"
    codes: str | None = None
    rotation: str | None = None
    device: str = "cpu"

    def __post_init__(self):
        object.__setattr__(self, "dims", check_dims(self.dims))
        if self.width > WIDTH:
            raise ValueError(f"dims: expected widths of at most {WIDTH}, got {self.width}")
        check_choice(self.metric, "metric", METRICS)
        check_choice(self.dtype, "dtype", tuple(DTYPES))
        prefixes = tuple(name for name, code in CODES.items() if not code.whole)
        check_choice(self.prefix_dtype, "prefix_dtype", prefixes)
        check_choice(self.codes, "codes", (None, *set(CODES).difference(prefixes)))
        if self.codes is not None and self.prefix_dtype != "float32":
            raise ValueError(
                f"prefix_dtype: expected 'float32' with codes={self.codes!r}, which are of every "
                f"column, got {self.prefix_dtype!r}"
            )
        if self.coded > self.code.widest:
            name, option = "dims[0]", f"prefix_dtype={self.prefix_dtype!r}"
            if self.code.whole:
                name, option = "dims", f"codes={self.codes!r}"
            raise ValueError(
                f"{name}: expected at most {self.code.widest} with {option}, got {self.coded}"
            )
        if self.rotation is not None:
            check_choice(self.rotation, "rotation", ROTATIONS)
        object.__setattr__(self, "device", inputs.device(self.device))
        if self.device != "cpu":
            from mrl_fast.search.index.device_metrics import DEVICE_METRICS

            check_choice(self.metric, "metric", DEVICE_METRICS, f" with device={self.device!r}")

    def __str__(self) -> str:
        """As the index's arguments; those after dtype where they are not the usual."""
        usual = {"prefix_dtype": "float32", "codes": None, "rotation": None, "device": "cpu"}
        names = ["metric", "dtype", *(n for n in usual if getattr(self, n) != usual[n])]
        shown = [f"{name}={getattr(self, name)!r}" for name in names]
        return ", ".join([f"dims={self.dims}", *shown])

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return self.dims[-1]

    @property
    def stored_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def code(self) -> Code:
        code = CODES[self.codes or self.prefix_dtype]
        return ROWS if code.exact and self.dtype == "int8" else code

    @property
    def ranking(self) -> tuple[int, ...]:
        """The numbers of bits of a column by which a first stage may rank: a device's codes have
        eight."""
        if self.code.exact:
            return ()
        return self.code.bits if self.device == "cpu" else (8,)

    @property
    def coded(self) -> int:
        """How many columns are coded."""
        if self.code is ROWS:
            return 0
        return self.width if self.code.whole else self.dims[0]

    @property
    def place(self) -> torch.device:
        """Where kernels run: Triton's interpreter runs on the CPU."""
        interpreted = self.device != "cpu" and triton_is_interpreted()
        return torch.device("cpu" if interpreted else self.device)

    @property
    def fields(self) -> dict[str, Any]:
        """What a manifest holds of it, as JSON: all but the device."""
        return {
            "dims": list(self.dims), "metric": self.metric, "dtype": self.dtype,
            "prefix_dtype": self.prefix_dtype, "codes": self.codes, "rotation": self.rotation,
        }  # fmt: skip

    @classmethod
    def from_fields(cls, fields: dict[str, Any], device: str) -> IndexConfig:
        names = ("dims", "metric", "dtype", "prefix_dtype", "codes", "rotation")
        return cls(*(fields[name] for name in names), device=device)
