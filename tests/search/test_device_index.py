"""MatryoshkaIndex on a device: the answers of the index on the CPU, and no wait for the device."""

import threading
import warnings
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from mrl_fast.kernels.search import certified, funnel, plan, topk
from torch.utils._python_dispatch import TorchDispatchMode

from mrl_fast import MatryoshkaIndex, SearchResult, prefix_topk, rerank
from mrl_fast.search.index import device_search
from tests.helpers.kernels import METRICS

DIMS = (8, 24)
STAGES = [(8, 60), (24, 5)]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def vectors(rows, seed=0):
    return torch.randn(rows, DIMS[-1], generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(plan, "BUFFER", (16, 64))
    monkeypatch.setattr(plan, "LEAST_RANK", 4)
    monkeypatch.setattr(certified, "SURVIVORS", 24)


def both(**options):
    """On the CPU and on the device: rows added, removed, replaced."""
    x, indexes = vectors(420), []
    for device in ("cpu", "cuda"):
        index = MatryoshkaIndex(DIMS, device=device, **options)
        for part in x.split([3, 200, 217]):
            index.add(part)
        index.remove(torch.arange(5, 40))
        index.update(torch.tensor([3, 100]), x[9:11])
        indexes.append(index)
    return indexes


def check_equal(mine, theirs):
    assert torch.equal(mine.ids, theirs.ids)
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-5, atol=1e-5)


def in_a_gap(scores):
    """A threshold far from every score, where processors round on either side; and how many scores
    are above it, 20 to 40."""
    ordered = scores.flatten().sort(descending=True).values[20:41]
    gaps = -ordered.diff()
    widest = int(gaps.argmax())
    assert gaps[widest] > 1e-3 * ordered[widest].abs()
    return float(ordered[widest : widest + 2].mean()), 21 + widest


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "options",
    [
        {"prefix_dtype": "int8"},
        {"dtype": "bfloat16", "rotation": "pca"},
        {"dtype": "float16", "prefix_dtype": "int8"},
        {"dtype": "int8"},
    ],
    ids=str,
)
def test_equals_the_index_on_the_cpu(metric, options):
    theirs, mine = both(metric=metric, **options)
    q = vectors(2, seed=1)
    some = torch.arange(0, 420, 3)
    check_equal(mine.search(q, 5, stages=STAGES), theirs.search(q, 5, stages=STAGES))
    check_equal(mine.search(q, 5), theirs.search(q, 5))
    assert (mine.search(q, 5).rows_touched >= 5).all()
    check_equal(
        mine.search(q, 5, stages=STAGES, allowed=some),
        theirs.search(q, 5, stages=STAGES, allowed=some),
    )
    alive = torch.arange(len(mine)) % 2 == 0
    check_equal(mine.search(q, 5, allowed=alive), theirs.search(q, 5, allowed=alive))
    threshold, count = in_a_gap(theirs.search(q, len(theirs)).scores)
    found, expected = mine.range_search(q, threshold), theirs.range_search(q, threshold)
    assert torch.equal(found.lims, expected.lims) and torch.equal(found.ids, expected.ids)
    assert found.lims[-1] == count


@pytest.mark.parametrize("metric", METRICS)
def test_by_a_prefix(metric):
    x, indexes = vectors(130), []
    x[::3, 8:] *= 30  # norms of whole vectors say nothing of a prefix
    for device in ("cpu", "cuda"):
        index = MatryoshkaIndex((8, 16, 24), device=device, metric=metric, prefix_dtype="int8")
        index.add(x)
        index.remove(range(5, 20))
        indexes.append(index)
    theirs, mine = indexes
    q, some = vectors(2, seed=1), torch.arange(0, 130, 3)
    check_equal(mine.search(q, 5, dim=8), theirs.search(q, 5, dim=8))
    expected = theirs.search(q, 5, dim=16, allowed=some)
    check_equal(mine.search(q[:, :16], 5, allowed=some), expected)
    check_equal(mine.search(q, 5, dim=16, allowed=some), expected)
    stages = [(8, 60), (16, 5)]
    check_equal(mine.search(q[:, :16], 5, stages=stages), theirs.search(q, 5, stages=stages))
    threshold, count = in_a_gap(theirs.search(q, len(theirs), dim=16).scores)
    found = mine.range_search(q[:, :16], threshold)
    assert torch.equal(found.ids, theirs.range_search(q, threshold, dim=16).ids)
    assert found.lims[-1] == count


def test_stages_that_scan_a_longer_prefix():
    theirs, mine = both(prefix_dtype="int8")
    q = vectors(2, seed=1)
    check_equal(mine.search(q, 5, stages=[(24, 5)]), theirs.search(q, 5, stages=[(24, 5)]))
    check_equal(mine.search(q, 500), theirs.search(q, 500))  # more than there are


def test_files_are_the_same(tmp_path):
    theirs, mine = both(prefix_dtype="int8")
    q = vectors(2, seed=1)
    mine.save(tmp_path / "mine")
    theirs.save(tmp_path / "theirs")
    for folder in ("mine", "theirs"):
        for device in ("cpu", "cuda"):
            loaded = MatryoshkaIndex.load(tmp_path / folder, device=device, verify=True)
            assert loaded.device == device
            check_equal(loaded.search(q, 5, stages=STAGES), theirs.search(q, 5, stages=STAGES))
    loaded.add(vectors(70, seed=2))
    loaded.compact()
    theirs.add(vectors(70, seed=2))
    check_equal(loaded.search(q, 5), theirs.search(q, 5))
    assert torch.equal(loaded.reconstruct(loaded.ids), theirs.reconstruct(theirs.ids))


def test_empty():
    index = MatryoshkaIndex(DIMS, device="cuda")
    for result in (index.search(vectors(2), 3), index.search(vectors(2), 3, stages=STAGES)):
        assert (result.ids == -1).all() and (result.scores == -torch.inf).all()
    assert index.range_search(vectors(2), 0.0).lims.tolist() == [0, 0, 0]
    index.add(vectors(1))
    assert index.search(vectors(0), 3).ids.shape == (0, 3)
    index.remove(torch.tensor([0]))
    assert index.search(vectors(2), 3).ids.tolist() == [[-1] * 3] * 2


def test_what_comes_out_is_of_the_kind_that_went_in():
    index = MatryoshkaIndex(DIMS, device="cuda")
    index.add(vectors(50).numpy())
    result = index.search(vectors(2).numpy(), 3, stages=STAGES)
    assert result.stages == [(8, 60), (24, 3)]
    assert isinstance(result.ids, np.ndarray) and isinstance(result.scores, np.ndarray)
    out = SearchResult(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int64))
    given = index.search(vectors(2).numpy(), 3, stages=STAGES, out=out)
    assert given.ids is out.ids and (out.ids == result.ids).all()
    exact = index.search(
        vectors(2), 3, out=SearchResult(torch.zeros(2, 3), torch.zeros(2, 3).long())
    )
    assert exact.rows_touched.tolist() == [50, 50]
    with pytest.raises(ValueError, match=r"out.ids: expected \[2, 3\] torch.int64, got \[2, 4\]"):
        index.search(vectors(2), 3, out=(torch.zeros(2, 3), torch.zeros(2, 4).long()))
    with pytest.raises(ValueError, match="out.ids: expected one on cpu, got meta"):
        index.search(vectors(2), 3, out=(torch.zeros(2, 3), exact.ids.to("meta")))


def test_bad_input():
    index = MatryoshkaIndex(DIMS, device="cuda")
    assert index.device == "cuda" and "device='cuda'" in repr(index)
    bad = vectors(2)
    bad[1, 3] = torch.nan
    with pytest.raises(ValueError, match="queries: expected finite values, got .* row 1"):
        index.search(bad, 3)
    with pytest.raises(ValueError, match="vectors: expected finite values"):
        index.add(bad)
    for device in ("gpu", "cuda:x", 0, None):
        with pytest.raises(ValueError, match="device: expected 'cpu', 'cuda' or 'cuda:<number>'"):
            MatryoshkaIndex(DIMS, device=device)


@pytest.mark.parametrize("call", ["_store", "_with_room", "rows"])
def test_a_failed_add_leaves_what_there_was(call, monkeypatch):
    index = MatryoshkaIndex(DIMS, device="cuda", prefix_dtype="int8")
    x = vectors(3300)
    index.add(x[:1000])
    before = index.search(x[:1], 3)
    arrays = type(index._rows.store.mirror)
    work = getattr(arrays, call)

    def fail(self, *args):
        work(self, *args)
        raise MemoryError

    monkeypatch.setattr(arrays, call, fail)
    with pytest.raises(MemoryError):
        index.add(x[1000:3000] * 100)
    monkeypatch.undo()
    assert len(index) == 1000
    check_equal(index.search(x[:1], 3), before)
    index.add(x[3000:])
    assert index.search(x[3250:3251], 1).ids.tolist() == [[1250]]


def test_a_query_that_is_zero_where_the_codes_are():
    x, q = vectors(200), vectors(2, seed=1)
    q[:, : DIMS[0]] = 0
    for metric in METRICS:
        found = []
        for device in ("cpu", "cuda"):
            index = MatryoshkaIndex(DIMS, metric=metric, prefix_dtype="int8", device=device)
            index.add(x)
            found.append(index.search(q, 4, stages=[(DIMS[0], 30), (DIMS[1], 4)]))
        check_equal(*found)


def test_searches_while_others_write():
    index = MatryoshkaIndex(DIMS, metric="ip", device="cuda")
    x = vectors(600)
    index.add(x[:100])
    wrong, done = [], threading.Event()

    def search():
        while not done.is_set():
            scores, ids = index.search(x[:1], 4, stages=[(24, 4)])
            expected = x[ids[0]] @ x[0]
            if not torch.allclose(scores[0], expected, rtol=1e-4, atol=1e-4):
                wrong.append((scores, ids))

    thread = threading.Thread(target=search)
    thread.start()
    for part in x[100:].split(50):
        index.add(part)
    index.remove(torch.arange(0, 600, 7))
    done.set()
    thread.join()
    assert not wrong and len(index) == 600 - 86


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or copies to one from plain memory."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        masks = [m for m in (args[1] if name.startswith("index") else ()) if m is not None]
        by_mask = any(m.dtype == torch.bool for m in masks if isinstance(m, torch.Tensor))
        assert name not in self.WAITS and not by_mask, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting():
    try:
        set_sync_debug_mode("error")
        with NoWaiting():
            yield
    finally:
        set_sync_debug_mode("default")


def set_sync_debug_mode(mode):
    """Each of PyTorch's own calls warns that it is a prototype, after the mode is set."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode(mode)


def test_what_is_refused_here_is_allowed_afterwards(monkeypatch):
    modes = []

    def set_mode(mode):
        modes.append(mode)
        warnings.warn("a prototype", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with no_waiting():
        assert modes == ["error"]
    assert modes == ["error", "default"]


@pytest.mark.parametrize(
    "form", [{}, {"prefix_dtype": "int8"}, {"codes": "bits"}], ids=["prefix", "int8", "codes"]
)
def test_a_search_does_not_wait(form, monkeypatch):
    monkeypatch.setattr(plan, "BUFFER", (16, 16))  # so that exact searches need bounds
    if not torch.cuda.is_available():  # then queries are on the host, where it looks at them
        monkeypatch.setattr("mrl_fast.search.index.device_search.check_finite", lambda *_: None)
    index = both(metric="cosine", **form)[1]
    q = vectors(2, seed=1).to(index.place)
    stages = [(24, 8, 60), (24, 5)] if "codes" in form else STAGES
    index.search(q, 5, stages=stages)  # compiles
    index.search(q, 5)
    with no_waiting():
        index.search(q, 5, stages=stages)
        index.search(q, 5)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(1).item()


@pytest.mark.parametrize("metric", METRICS)
def test_ops_do_not_wait(metric, triton_device):
    x = vectors(400).to(triton_device)
    ties = torch.cat([x[:1].repeat(320, 1), x])
    for q, rows in ((x[:17], x), (x[:1], ties)):  # norms before the scan, in it; and a rescan
        run = topk.prefix_topk
        if rows.is_cuda:
            run(q, rows, 5, 20, metric)  # compiles
        with no_waiting():
            _, ids = run(q, rows, 5, 20, metric)
            funnel.rerank(q, rows, ids, 3, 24, metric)
            funnel.funnel_search(q, rows, [(8, 8), (24, 4)], metric)


def test_what_a_graph_reads_stays(monkeypatch):
    """A replay reads the arrays of its time, whatever became of the index's rows since."""
    index = MatryoshkaIndex(DIMS, device="cuda", prefix_dtype="int8")
    index.add(vectors(100))
    read = [weakref.ref(index._rows.store.mirror.arrays[name]) for name in ("vectors", "codes")]
    monkeypatch.setattr(device_search, "captures", lambda x: True)
    index.search(vectors(1), 3, stages=STAGES)
    monkeypatch.undo()
    stores = [array().untyped_storage().data_ptr() for array in read]
    index.add(vectors(3000))  # more than there is room for
    now = index._rows.store.mirror
    kept = {x.untyped_storage().data_ptr() for x in now.captured.values()}
    assert {*stores} <= kept and now.arrays["vectors"].data_ptr() not in stores
    index.compact()
    assert {*stores} <= {x.untyped_storage().data_ptr() for x in now.captured.values()}


@on_gpu
@pytest.mark.parametrize("form", [{"prefix_dtype": "int8"}, {"codes": "bits"}], ids=str)
def test_a_captured_search(form):
    index = MatryoshkaIndex(DIMS, device="cuda", **form)
    index.add(vectors(100_000))
    q = vectors(4, seed=1).cuda()
    for options in ({"stages": STAGES}, {"exact": True}):
        out = SearchResult(
            torch.zeros(4, 5, device="cuda"), torch.zeros(4, 5, device="cuda").long()
        )
        index.search(q, 5, out=out, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            index.search(q, 5, out=out, **options)
        q.copy_(vectors(4, seed=2))
        graph.replay()
        expected = index.search(q, 5, **options)
        assert torch.equal(out.ids, expected.ids) and torch.equal(out.scores, expected.scores)
        index.add(vectors(100_000, seed=3))  # the arrays grow; the graph reads the old ones
        graph.replay()
        assert torch.equal(out.ids, expected.ids) and torch.equal(out.scores, expected.scores)


@on_gpu
def test_streams():
    index = MatryoshkaIndex(DIMS, device="cuda")
    index.add(vectors(200_000))
    q = vectors(64, seed=1).cuda()
    expected = index.search(q, 5)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            results.append(index.search(q, 5))
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result.ids, expected.ids) and torch.equal(result.scores, expected.scores)


@on_gpu
def test_ops_on_a_device_equal_the_cpu():
    x, q = vectors(100_000), vectors(300, seed=1)
    rows = torch.randint(0, len(x), (300, 50), generator=torch.Generator().manual_seed(2))
    for metric in METRICS:
        for found, expected in (
            (
                prefix_topk(q.cuda(), x.cuda(), 10, metric=metric),
                prefix_topk(q, x, 10, metric=metric),
            ),
            (
                rerank(q.cuda(), x.cuda(), rows.cuda(), 10, metric=metric),
                rerank(q, x, rows, 10, metric=metric),
            ),
        ):
            check_equal(SearchResult(*(t.cpu() for t in found)), expected)
