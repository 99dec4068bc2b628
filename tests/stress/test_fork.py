"""A process that has searched, added and trained forks: its children do the same, and theirs.

Each case is a process of its own, so that nothing else has started threads in it.
"""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.helpers.index_model import ROOT

SECONDS = 100  # a child that takes longer waits for threads that it does not have

COMMON = f"""
import multiprocessing, os, threading, time
import torch
from mrl_fast import MatryoshkaIndex, matryoshka_info_nce, prefix_topk

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
vectors = torch.randn(8_000, 64, generator=generator)
queries = torch.randn(24, 64, generator=generator)

def work(index):
    '''Everything that a team of two threads works on, ours and PyTorch's.'''
    index.add(vectors[:4000] + len(index))
    found = [*index.search(queries, 10), *index.search(queries, 10, exact=True)]
    found += [*index.range_search(queries, 30.0)]
    found += [*prefix_topk(queries, vectors, 5)]
    x = vectors[:700].clone().requires_grad_()
    loss = matryoshka_info_nce(x, vectors[700:1400], (16, 64)).loss
    loss.backward()
    return [*found, loss.detach(), x.grad, vectors.isfinite().all(), vectors.sort(dim=0).values]

def build():
    index = MatryoshkaIndex((16, 64), metric="ip")
    index.add(vectors)
    return index

def same(a, b):
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b))

def fork(child):
    '''Runs child() in a fork, which has to return true in time.'''
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if child() else 3)
        finally:
            os._exit(4)
    end = time.monotonic() + {SECONDS}
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"the child ended with {{status}}"
            return True
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")

def succeeds():
    return same(work(build()), right)

index = build()
right = work(build())
"""

CASES = {
    "while another thread changes the index": """
        held, release = threading.Event(), threading.Event()
        def hold():
            with index._rows.changing():
                held.set()
                release.wait()
        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        held.wait()
        fork(lambda: index.add(vectors[:10]) is None and len(index) == 8_010)
        release.set()
        thread.join()
        """,
    "child": """
        work(index)
        fork(succeeds)
        assert succeeds()
        """,
    "child of a child": """
        work(index)
        fork(lambda: succeeds() and fork(succeeds))
        """,
    "shared index": """
        before = index.search(queries, 10)
        def child():
            now = index.search(queries, 10)
            index.add(vectors[:3000])
            return same(now, before) and len(index) == 11_000
        fork(child)
        assert len(index) == 8_000
        """,
    "pool": """
        work(index)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            tasks = [pool.apply_async(succeeds) for _ in range(2)]
            assert all(task.get(timeout=100) for task in tasks)
        """,
    "another thread searches": """
        stop = threading.Event()
        def search():
            while not stop.is_set():
                index.search(queries, 10, exact=True)
        others = [threading.Thread(target=search) for _ in range(1)]
        for other in others:
            other.start()
        try:
            for _ in range(2):
                fork(succeeds)
        finally:
            stop.set()
        for other in others:
            other.join()
        """,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("case", CASES)
def test_children_work(case):
    code = COMMON + "\n" + textwrap.dedent(CASES[case])
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=4 * SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
