"""The number of threads of a call is the process's, whatever thread asks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mrl_fast
from mrl_fast.shared import native


@pytest.fixture(autouse=True)
def _as_before():
    yield
    mrl_fast.set_num_threads(None)


def test_reaches_every_thread():
    def threads():
        torch.ones(3).sum()  # the thread has used PyTorch before
        return native.run()[1], mrl_fast.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        default = pool.submit(threads).result()
        for count in (5, 1):
            mrl_fast.set_num_threads(count)
            assert pool.submit(threads).result() == (count, count) == threads()
        mrl_fast.set_num_threads(None)
        assert pool.submit(threads).result() == default
    assert threads() == (torch.get_num_threads(),) * 2


def test_results_do_not_depend_on_it():
    x = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for count in (1, 2, 5):
        mrl_fast.set_num_threads(count)
        found.append(mrl_fast.prefix_topk(x[:20], x, 7))
    for other in found[1:]:
        assert torch.equal(other.ids, found[0].ids)
        assert torch.equal(other.scores, found[0].scores)


@pytest.mark.parametrize("bad, error", [(0, ValueError), (1025, ValueError), (1.5, TypeError)])
def test_bad_numbers(bad, error):
    with pytest.raises(error, match="threads: expected an integer"):
        mrl_fast.set_num_threads(bad)
    assert mrl_fast.get_num_threads() == torch.get_num_threads()
