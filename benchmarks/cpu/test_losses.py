"""A step of every nested loss against its rivals: time, extra peak memory, error against fp64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.measure import ROOT

CASES = rivals.GPU_CASES if rivals.DEVICE == "cuda" else rivals.CASES
ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[rivals.DTYPE]  # of the largest gradient


def error_of(results: list[Tensor], exact: list[Tensor]) -> float:
    """The largest deviation, as a part of the largest value of the same tensor."""
    if len(results) != len(exact):  # one tensor a prefix
        results = [torch.stack(results)]
    return max(
        ((r.double() - e.double()).abs().max() / e.abs().max().clamp_min(1e-30)).item()
        for r, e in zip(results, exact, strict=True)
        if e.is_floating_point()
    )


def peak_mib(*arguments: str) -> float:
    """The extra peak memory of a step, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rivals", *arguments]
    # Without this, freed memory may stay with the process and hide the next peak.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("name", CASES)
def test_losses(compare, name):
    case = CASES[name]
    torch._dynamo.reset()
    steps = rivals.providers(case)
    # All are compared with fp64 on a tenth of the rows.
    small = case._replace(rows=max(case.rows // 10, 2))
    if case.kind in ("info_nce", "clip"):
        small = small._replace(classes=small.rows)
    dtype = rivals.DTYPE
    try:
        rivals.DTYPE = torch.float64
        wide = rivals.providers(small)
        exact = [t.detach().clone() for t in wide["loop"]()]
    finally:
        rivals.DTYPE = dtype
    notes: dict[str, object] = {}
    for provider, step in rivals.providers(small).items():
        error = error_of(step(), exact)
        assert error < ERROR, (provider, error)
        notes[f"{provider}_error"] = f"{error:.1e}"
    if "sentence_transformers" in steps:
        del steps["loop"]  # the same computation
    for provider in steps:
        notes[f"{provider}_peak_mib"] = peak_mib(name, provider)
    ours = steps.pop("mrl_fast")
    flops = rivals.flops(case)
    compare(ours, steps, repetitions=case.repetitions, flops=flops, notes=notes)
