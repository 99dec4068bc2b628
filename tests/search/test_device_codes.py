"""An index on a device with codes of bits: exact search by eight bits of every column."""

import pytest
import torch
from mrl_fast.kernels.search import certified, plan

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.index import device_rows, device_search
from mrl_fast.shared.types import Tuned
from tests.helpers.kernels import METRICS

DIMS = (8, 24)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(plan, "BUFFER", (16, 16))
    monkeypatch.setattr(plan, "LEAST_RANK", 4)
    monkeypatch.setattr(certified, "SURVIVORS", 24)
    monkeypatch.setattr(device_rows, "CODED_BYTES", 7000)


def vectors(rows, seed=0, width=DIMS[-1]):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def check_equal(mine, theirs):
    assert torch.equal(mine.ids, theirs.ids)
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-5, atol=1e-5)


def filled(x, dims=DIMS, **options):
    """On the CPU without codes, and on the device: rows added in parts, removed, replaced."""
    indexes = []
    for more in ({}, {"codes": "bits", "device": "cuda"}):
        index = MatryoshkaIndex(dims, **options, **more)
        for part in x.split([3, 200, len(x) - 203]):
            index.add(part)
        index.remove(torch.arange(5, 40))
        index.update(torch.tensor([3, 100]), x[9:11])
        indexes.append(index)
    return indexes


@pytest.mark.parametrize(
    ("metric", "dims", "options"),
    [
        *((metric, DIMS, {}) for metric in METRICS),
        ("l2", (33,), {"dtype": "bfloat16"}),
        ("cosine", (4, 8, 32), {"dtype": "float16", "rotation": "pca"}),
        ("ip", (7, 33), {"dtype": "int8"}),
    ],
    ids=str,
)
def test_equals_the_index_on_the_cpu(metric, dims, options):
    x = vectors(600, width=dims[-1]) + 0.5
    x[300:304] = x[7]
    x[77] *= 30
    theirs, mine = filled(x, dims, metric=metric, **options)
    q = torch.cat([vectors(1, 1, dims[-1]), x[300:301]])
    found = mine.search(q, 5)
    check_equal(found, theirs.search(q, 5))
    assert (found.rows_touched < len(mine)).all()
    some = torch.arange(1, 600, 3)
    check_equal(mine.search(q, 5, allowed=some), theirs.search(q, 5, allowed=some))


def test_other_searches():
    x = vectors(230)
    theirs, mine = filled(x, metric="l2")
    q, threshold = vectors(2, 1), -30.0
    check_equal(mine.search(q, 200), theirs.search(q, 200))  # more than there are
    check_equal(mine.search(q, 5, dim=8), theirs.search(q, 5, dim=8))
    check_equal(
        mine.search(q, 5, stages=[(8, 60), (24, 5)]), theirs.search(q, 5, stages=[(8, 60), (24, 5)])
    )
    found, expected = mine.range_search(q, threshold), theirs.range_search(q, threshold)
    assert torch.equal(found.ids, expected.ids) and 10 < len(expected.ids) < 300
    few = MatryoshkaIndex(DIMS, codes="bits", device="cuda")
    assert few.search(q, 3).ids.tolist() == [[-1] * 3] * 2
    assert few.range_search(q, 0.0).lims.tolist() == [0, 0, 0]
    few.add(x[:1])
    assert few.search(q, 3).ids.tolist() == [[0, -1, -1]] * 2


@pytest.mark.parametrize("metric", METRICS)
def test_stages_by_codes(metric, monkeypatch):
    theirs, mine = filled(vectors(420), metric=metric)
    q, read = vectors(2, 1), []
    search = device_search.topk
    monkeypatch.setattr(
        device_search, "topk", lambda q, x, *rest: (read.append(x.dtype), search(q, x, *rest))
    )
    found = mine.search(q, 5, stages=[(24, 8, 60), (24, 5)])
    check_equal(found, theirs.search(q, 5, exact=True))
    assert found.stages == [(24, 8, 60), (24, 5)] and read == [torch.int8]
    mine.search(q, 5, stages=[(8, 60), (24, 5)])
    assert read[1] == torch.float32
    with pytest.raises(ValueError, match=r"stages\[0\] bits: expected one of \(8,\), got 1"):
        mine.search(q, 5, stages=[(24, 1, 50), (24, 5)])
    with pytest.raises(ValueError, match=r"stages\[0\] dim: expected 24 where 8 bits rank, got 8"):
        mine.search(q, 5, stages=[(8, 8, 50), (24, 5)])


def test_files(tmp_path):
    theirs, mine = filled(vectors(600))
    mine.save(tmp_path)
    q, stages = vectors(2, 1), ((24, 1, 600), (24, 5))
    for device in ("cpu", "cuda"):
        loaded = MatryoshkaIndex.load(tmp_path, device=device)
        assert loaded.codes == "bits"
        if device == "cpu":  # tuned where signs rank
            assert loaded.tuned is None
            loaded._tuned = Tuned(stages, 5, len(loaded))
            loaded.save(tmp_path)
            again = MatryoshkaIndex.load(tmp_path)
            assert again.tuned and again.tuned.stages == [*stages]
        else:
            assert loaded.tuned is None
        check_equal(loaded.search(q, 5), theirs.search(q, 5))
