"""Index folders that released versions wrote, kept as they were: every later version loads them.

Vector i is ``vectors(i, i + 1, D)``. Rows 0..69 had the ids 3i and were saved; rows 0, 63, 66 were
removed, rows 70..74 added, stages tuned, and the folder was saved again. Its first file therefore
holds 70 rows of which the manifest uses a whole tile, 64.
"""

import shutil
from pathlib import Path

import pytest
import torch

from mrl_fast import MatryoshkaIndex
from tests.helpers.search import brute_force

RELEASED = Path(__file__).parents[1] / "data"
ROWS = [row for row in range(75) if row not in (0, 63, 66)]
IDS = [3 * row if row < 70 else 208 + row - 70 for row in ROWS]
OPTIONS = {  # metric, dtype, prefix_dtype, codes
    "v1/float32": ("cosine", "float32", "float32", None),
    "v1/int8": ("l2", "float16", "int8", None),  # and rotated
    "v2/graph": ("cosine", "float32", "float32", None),  # built before rows were removed and added
    "v2/bits": ("cosine", "float32", "float32", "bits"),
    "v3/bits": ("cosine", "float32", "float32", "bits"),
    "v4/bits": ("l2", "float16", "float32", "bits"),  # of 24 columns, rotated
}


def vectors(begin: int, end: int, width: int) -> torch.Tensor:
    """Multiples of 1/4, so that every dtype holds them as they are; column 12 is an outlier."""
    rows, columns = torch.arange(begin, end)[:, None], torch.arange(width)
    x = ((7 * rows + 3 * rows * columns + columns) % 11 - 5).float() / 4
    x[:, 12:13] *= 16
    return x


@pytest.mark.parametrize("name", OPTIONS)
def test_a_released_folder_loads_for_ever(name, tmp_path):
    shutil.copytree(RELEASED / f"index_{name}", tmp_path / "index")
    index = MatryoshkaIndex.load(tmp_path / "index", verify=True)
    assert (index.metric, index.dtype, index.prefix_dtype, index.codes) == OPTIONS[name]
    first = (2, 20) if index.codes is None else (2, 1, 20)
    width = index.width
    assert index.dims == (2, 4, width) and width == (24 if name == "v4/bits" else 8)
    assert index.tuned == ([first, (width, 5)], 5, 72, None, True)
    assert (index._rows.layout.signs is not None) == (name == "v4/bits")
    x = vectors(0, 75, width)[ROWS]
    assert index.ids.tolist() == IDS and index.removed == 3
    rounding = 0.0 if index.rotation is None else 1e-2  # float16, there and back
    torch.testing.assert_close(index.reconstruct(index.ids), x, atol=rounding, rtol=0)
    q = torch.linspace(-1, 1, 2 * width).reshape(2, width)
    scores, ids = index.search(q, 5, exact=True)
    exact = brute_force(q, x, index.metric).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(scores, exact.values[:, :5].float(), atol=5 * rounding, rtol=1e-6)
    if index.rotation is None:
        assert ids.tolist() == torch.tensor(IDS)[exact.indices[:, :5]].tolist()
    assert index.search(q, 5).scores.shape == (2, 5)  # by the tuned stages
    if name == "v2/graph":
        walked = index.search(q, 5, stages=[("graph", 100, 72), (8, 5)])
        assert torch.equal(walked.ids, ids)

    # It can be changed and saved again, where it lies.
    index.remove(torch.tensor([3]))
    index.add(vectors(80, 81, width))
    index.save(tmp_path / "index")
    again = MatryoshkaIndex.load(tmp_path / "index", verify=True)
    assert again.ids.tolist() == [*IDS[1:], 213]
    added = again.reconstruct(again.ids[-1:])
    torch.testing.assert_close(added, vectors(80, 81, width), atol=rounding, rtol=0)
