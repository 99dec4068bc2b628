"""How the C++ kernels run: on which instruction set, and in whose threads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mrl_fast import _C

ISA = ""  # the instruction set; empty is the best this processor has. Tests set it.
# PyTorch's own thread team, where it is GNU OpenMP's; else the kernels start threads of their own.
OPENMP = any(map(_C.use_openmp, map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*"))))


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
