"""Search under another global state of torch: the same results, bit for bit.

A default dtype is the whole process's, so that one thread that loads a model changes it for all.
"""

import copy
import pickle
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from mrl_fast import MatryoshkaIndex, approx_topk, funnel_search, prefix_topk, rerank
from mrl_fast.search.index import timing
from tests.helpers import torch_states
from tests.helpers.index_model import one_thread  # noqa: F401
from tests.helpers.search import metrics_of
from tests.search.test_device_index import small_buffers  # noqa: F401

DIMS = 5, 9, 20
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(300, 20, generator=GENERATOR, dtype=torch.float32)
Q = torch.randn(4, 20, generator=GENERATOR, dtype=torch.float32)
SAMPLES = torch.randn(256, 20, generator=GENERATOR, dtype=torch.float32)
CANDIDATES = torch.randint(-1, 300, (4, 30), generator=GENERATOR, dtype=torch.int64)
STAGES = [(5, 40), (9, 20), (20, 6)]
OPTIONS = [
    {},
    {"metric": "ip", "prefix_dtype": "int8"},
    {"metric": "l2", "dtype": "bfloat16", "rotation": "pca"},
    {"dtype": "float16", "prefix_dtype": "int8", "rotation": "pca"},
    {"dtype": "int8"},
]


def built(**options):
    """Rows added, removed, replaced, moved together and added again."""
    index = MatryoshkaIndex(DIMS, **options)
    if index.config.rotation:
        index.fit(SAMPLES)
    index.add(X[:150])
    index.remove(range(3, 20))
    index.update([30, 2], X[150:152])
    index.compact()
    index.add(X[152:].numpy(), list(range(1000, 1148)))
    index.remove([1, 1003])
    return index


def answers(index):
    """What an index says, of every kind."""
    mask, least = index.ids % 3 == 0, -30.0 if index.metric == "l2" else 0.2
    found = [
        *index.search(Q, 6), *index.search(Q, 400, exact=True),
        *index.search(Q, 6, stages=STAGES), *index.search(Q.numpy(), 6, stages=STAGES[:1]),
        *index.search(Q, 6, allowed=[2, 7, 1001, 99]), *index.search(Q, 6, allowed=mask),
        *index.range_search(Q, least), *index.range_search(Q, least, allowed=mask),
        index.search(Q, 6).rows_touched, index.ids, index.contains([1, 2, 3]),
        index.reconstruct(index.ids),
    ]  # fmt: skip
    return found if index.rotation is None else [*found, index.rotation]


def ops(impl):
    found = []
    for metric in metrics_of(impl):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            q, x = Q.to(dtype), X.to(dtype)
            found += prefix_topk(q, x, 7, dim=9, metric=metric, impl=impl)
            found += rerank(q, x, CANDIDATES, 7, metric=metric, impl=impl)
            found += funnel_search(q, x, STAGES, metric=metric, impl=impl)
        found += approx_topk(Q, X, 7, metric=metric, impl=impl)
        found += prefix_topk(Q.double(), X.double(), 7, metric=metric)
    eights = [(20 * x).round().clamp(-127, 127).to(torch.int8) for x in (Q, X)]
    return [*found, *prefix_topk(*eights, 7, impl=impl), *prefix_topk(Q, X[:0], 3, impl=impl)]


def on_a_device():
    index = MatryoshkaIndex((5, 20), prefix_dtype="int8", device="cuda")
    index.add(X[:90])
    index.remove([4])
    found = index.search(Q[:1], 3), index.search(Q[:1], 3, stages=[(5, 20), (20, 3)])
    return [*found[0], *found[1], *index.range_search(Q[:1], 0.3)]


def tuned():
    index = MatryoshkaIndex(DIMS)
    index.add(X)
    report = index.tune(SAMPLES, 5, 0.8, progress=False)
    rows = sorted(
        (row.recall, row.recall_bound, row.macs, row.read_bytes)
        for row in report.rows
        if row.stages
    )
    return [torch.tensor(rows, dtype=torch.float64, device="cpu")]


def through_faiss():
    pytest.importorskip("faiss")
    index = built(metric="cosine")
    return answers(MatryoshkaIndex.from_faiss(index.to_faiss(), DIMS))


CALLS = {
    "ops by C++": lambda: ops("cpp"),
    "ops by PyTorch": lambda: ops("reference"),
    **{
        f"index {options}": lambda options=options: answers(built(**options)) for options in OPTIONS
    },
    "copied": lambda: answers(copy.copy(built())),
    "pickled": lambda: answers(pickle.loads(pickle.dumps(built(rotation="pca")))),
    "tuned": tuned,
    "FAISS": through_faiss,
}


STATES = torch_states.STATES | {"filled": torch_states.filled}


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    monkeypatch.setattr(timing, "clock", lambda: 0.0)


@pytest.fixture(scope="module")
def plain():
    """What each call returns, computed once."""
    results = {}

    def get(name, call):
        if name not in results:
            results[name] = call()
        return results[name]

    return get


def assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert type(a) is type(b)
        a, b = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in (a, b))
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("state", STATES)
def test_the_same_to_the_bit(state, name, plain):
    expected = plain(name, CALLS[name])
    with STATES[state]():
        found = CALLS[name]()
    assert_equal(found, expected)


def test_the_same_while_another_thread_flips_the_defaults(plain):
    expected = {name: plain(name, call) for name, call in CALLS.items()}
    found, end = [], time.monotonic() + 1
    with torch_states.flipping():
        while not found or time.monotonic() < end:
            found += [(name, call()) for name, call in CALLS.items()]
    for name, result in found:
        assert_equal(result, expected[name])


@pytest.mark.parametrize("state", STATES)
def test_the_same_on_a_device(state, plain):
    expected = plain("device", on_a_device)
    with STATES[state]():
        found = on_a_device()
    assert_equal(found, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_began_in_inference_mode_goes_on_outside(device):
    def steps(mode):
        with mode():
            index = MatryoshkaIndex(
                (5, 20), dtype="bfloat16", prefix_dtype="int8", rotation="pca", device=device
            )
            index.add(X[:70])
            index.remove([3])
            q = Q[:1] + 0  # a tensor of that mode
        index.add(X[70:90])
        index.update([5], X[90:91])
        index.remove([1])
        index.compact()
        index.add(X[91:120])
        with mode():
            index.add(X[:1])
        index.add(X[:1])
        found = [*index.search(q, 5), *index.search(q, 5, stages=[(5, 50), (20, 5)])]
        return [*found, index.ids, index.reconstruct(index.ids), index.rotation]

    assert_equal(steps(torch.inference_mode), steps(nullcontext))
