"""Integers in ``.txt`` files, one a line; blank lines are passed over."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mrl_fast.search.readers.base import ADVICE


def read_integers(path: Path) -> np.ndarray:
    """``[n]`` int64."""
    ids = []
    with open(path, encoding="ascii", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                ids.append(np.int64(int(line)))
            except (ValueError, OverflowError):
                got = no_id(line)
                raise ValueError(f"{path}: expected an int64 in line {number}, got {got}") from None
    return np.array(ids, np.int64)


def no_id(text: str) -> str:
    """What errors say of a text that is no int64."""
    advice = ADVICE if text.strip().strip("-+0123456789.") else ""
    if len(re.findall(r"[-+]?\d+", text)) > 1 and re.fullmatch(r"[-+\d\s,;]+", text):
        advice = ", which are several: each takes a line of its own"
    return f"{text.rstrip()[:40]!r}{advice}"
