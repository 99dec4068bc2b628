"""How the Triton kernels of losses cut their work."""

import subprocess
import sys
import weakref

import pytest
import torch
import triton
from mrl_fast.kernels.shared import tiling


@pytest.mark.parametrize("rows", [1, 100, 8192, 1_000_000])
@pytest.mark.parametrize("classes", [1, 1000, 262_144, 10_000_000])
@pytest.mark.parametrize("bytes_a_score", [2, 14, 4 * 64])
def test_chunks_fit_the_workspace(rows, classes, bytes_a_score):
    classes = tiling.whole_tiles(classes)
    row_step, class_step = tiling.chunk_steps(rows, classes, bytes_a_score)
    held = min(rows, row_step) * min(classes, class_step) * bytes_a_score
    assert held <= tiling.WORKSPACE_BYTES
    if held < tiling.WORKSPACE_BYTES // 2:  # small only where the problem is
        assert rows <= row_step and classes <= class_step
    assert row_step % 128 == class_step % 128 == 0


def test_chunks_are_as_large_as_one_another():
    rows, classes = tiling.chunk_steps(32768, 32768, 10)
    sizes = [[c.stop - c.start for c in tiling.chunks(32768, step)] for step in (rows, classes)]
    assert len(sizes[0]) * len(sizes[1]) == 42  # 41 would be the least
    assert all(min(these) > 0.9 * max(these) for these in sizes)
    assert tiling.chunk_steps(1, 10_000_000, 10) == (128, 10_000_000)
    assert tiling.chunk_steps(0, 0, 10) == (128, 128)


@pytest.mark.parametrize("classes", [1, 1000])
def test_rows_of_a_chunk_fit_a_grid(classes):
    """Its second axis ends at 65535 tiles, of 64 rows at least."""
    blocks = [*tiling.CONFIGS.values(), *tiling.STORING_CONFIGS.values()]
    least = min(config.BLOCK_B for config in [*blocks, *tiling.MASKING_CONFIGS.values()])
    row_step, _ = tiling.chunk_steps(100_000_000, classes, 2)
    for rows in (row_step, tiling.row_step(24), tiling.MOST_ROWS):
        assert tiling.cdiv(rows, least) <= 65535
    assert tiling.row_step(24) > 4_000_000


def test_integers_round_up_as_tritons_own_do():
    for n in range(1, 300):
        assert tiling.next_power_of_2(n) == triton.next_power_of_2(n)
        assert tiling.cdiv(n, 16) == triton.cdiv(n, 16)
    assert tiling.next_power_of_2(0) == 1 and tiling.cdiv(0, 16) == 0


def test_a_schedule_is_made_once():
    """A CUDA graph can capture no copy from the host."""
    first = tiling.make_schedule((8, 20), 16, torch.device("cpu"))
    assert tiling.make_schedule((8, 20), 16, torch.device("cpu")) is first
    assert tiling.make_schedule((8, 24), 16, torch.device("cpu")) is not first


def test_a_schedule_that_a_graph_reads_is_kept(monkeypatch):
    monkeypatch.setattr(tiling, "captures", lambda x: True)
    schedule = weakref.ref(tiling.schedule_of(torch.ones(1, 24), [3, 24], 16))
    monkeypatch.undo()
    tiling.make_schedule.cache_clear()  # as when there were too many
    assert schedule() is not None
    unread = weakref.ref(tiling.schedule_of(torch.ones(1, 24), [3, 24], 16))
    tiling.make_schedule.cache_clear()
    assert unread() is None


SETTINGS = {
    "pass": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}


def test_precision_follows_both_interfaces_of_pytorch():
    """Each setting in a child of its own: PyTorch does not go back from the newer interface."""
    code = f"""
import os, torch
from mrl_fast.kernels.shared.tiling import precision
for setting in {list(SETTINGS)!r}:
    if not os.fork():
        exec(setting)
        print(precision(torch.ones(1)), precision(torch.ones(1).half()), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = [word for precision in SETTINGS.values() for word in (precision, "ieee")]
    assert done.stdout.split() == expected, done.stderr
