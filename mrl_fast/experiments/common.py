"""What the experiments share: where they keep what takes long to make, and on what they ran."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor


def cache_folder() -> Path:
    """``$MRL_FAST_CACHE``, else ``mrl_fast`` in the user's folder of caches."""
    if given := os.environ.get("MRL_FAST_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mrl_fast"


def principal_components(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Vectors centred and rotated so that the variance of ``train`` falls from column to column."""
    mean = train.mean(dim=0)
    _, axes = torch.linalg.eigh(torch.cov(train.T))
    return tuple((x - mean) @ axes.flip(1) for x in (train, *others))


def machine() -> str:
    """The processor, the threads and the packages of a report, and the day."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().split("\n") if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    packages = ", ".join(f"{p} {version(p)}" for p in ("mrl-fast", "torch", "faiss-cpu", "numpy"))
    today = datetime.date.today().isoformat()
    return f"{model}, {torch.get_num_threads()} threads; {packages}; {today}"
