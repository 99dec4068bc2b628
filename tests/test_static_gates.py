"""Every Triton kernel that ships compiles for every architecture, as it should; no GPU needed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may take
SPILL_BYTES = 16  # tolerated: a pair-scores kernel keeps two words on the stack


@pytest.fixture(scope="module")
def rows():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "static_gates.py", "--json"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_on_every_architecture(rows):
    kernels = {row["kernel"] for row in rows}
    assert len(rows) == 3 * len(kernels)
    families = "logits", "predict", "statistics", "score gradients", "bucket max", "pair scores"
    for family in families:
        for dtype in ("fp32", "bf16", "fp16"):
            assert any(name.startswith(f"{family} {dtype}") for name in kernels), (family, dtype)


def test_resources(rows):
    for row in rows:
        assert row["spill_bytes"] <= SPILL_BYTES, row
        assert row["shared_bytes"] <= SHARED_LIMIT[row["arch"]], row


def test_the_next_blocks_load_during_a_product(rows):
    for row in rows:  # two blocks in flight; asynchronous copies alone may be of one, waited for
        assert row["shared_bytes"] >= 2 * row["stage_bytes"], row


def test_matrix_instructions(rows):
    for row in rows:
        if row["precision"] in ("half", "tf32"):
            assert row["matrix_instructions"] > 0 and row["async_copies"] > 0, row
        else:  # exact fp32 is made by multiply-adds
            assert row["matrix_instructions"] == 0 and row["fma_instructions"] > 0, row


def test_cuda_sources_compile(tmp_path):
    nvcc, sources = shutil.which("nvcc"), sorted((ROOT / "csrc").glob("cuda/*.cu"))
    for source in sources if nvcc else []:
        for arch in ("sm_80", "sm_90a", "sm_100"):
            output = tmp_path / f"{source.stem}.{arch}.o"
            command = [nvcc, "-arch", arch, "-std=c++17", "-I", ROOT / "csrc", "-c", source]
            done = subprocess.run([*command, "-o", output], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
