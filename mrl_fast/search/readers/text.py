"""Integers in ``.txt`` files, one a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_integers(path: Path) -> np.ndarray:
    """``[n]`` int64."""
    ids = []
    with open(path, encoding="ascii", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                ids.append(np.int64(int(line)))
            except (ValueError, OverflowError):
                raise ValueError(
                    f"{path}: expected an int64 in line {number}, got {line.rstrip()[:40]!r}"
                ) from None
    return np.array(ids, np.int64)
