"""How the Triton loss engine cuts its work."""

import pytest
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
