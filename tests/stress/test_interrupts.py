"""Ctrl-C in the middle of long calls: KeyboardInterrupt at once, and nothing half-written.

A child process announces a call, is sent SIGINT while it runs, and says how long it took.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.helpers.index_model import ROOT

SECONDS = 5  # until the exception; alone it takes a tenth of one

COMMON = """
import time
import torch
from mrl_fast import (MatryoshkaIndex, matryoshka_cross_entropy, matryoshka_info_nce, prefix_topk,
                      rerank)

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
x = torch.randn({rows}, 64, generator=generator)
queries = torch.randn({queries}, 64, generator=generator)

def interrupted(call):
    print("begins", flush=True)
    try:
        call()
    except KeyboardInterrupt:
        return time.time()
    raise SystemExit("the call ended before the interrupt")

def long_index(**options):
    index = MatryoshkaIndex((32, 64), metric="ip", **options)
    index.add(x)
    return index
"""

SEARCHES = {
    "search": "index.search(queries, 10, stages=[(32, 1000), (64, 10)])",
    "exact search": "index.search(queries, 10, exact=True)",
    "every row exact": "index.search(queries, 5000, exact=True)",
    "range search": "index.range_search(queries, 60.0)",
    "tune": "index.tune(queries, k=10, recall=0.99)",
}
LOSSES = {
    "cross-entropy": "matryoshka_cross_entropy(a, x, torch.arange(len(a)), (32, 64)).loss",
    "InfoNCE": "matryoshka_info_nce(a, x[:len(a)], (32, 64)).loss",
}
CASES = {
    **{
        name: (
            f"""
            index = long_index()
            before = index.search(queries[:9], 10, exact=True)
            at = interrupted(lambda: {call})
            after = index.search(queries[:9], 10, exact=True)
            assert len(index) == len(x) and all(map(torch.equal, before, after))
            """,
            200_000,
            60_000,
        )
        for name, call in SEARCHES.items()
    },
    "prefix_topk": ("at = interrupted(lambda: prefix_topk(queries, x, 10))", 200_000, 60_000),
    "rerank": (
        """
        candidates = torch.randint(len(x), (len(queries), 1000))
        at = interrupted(lambda: [rerank(queries, x, candidates, 10) for _ in range(100)])
        """,
        100_000,
        20_000,
    ),
    "add": (
        """
        index = MatryoshkaIndex((32, 64), metric="ip", prefix_dtype="int8")
        index.add(x[:1000])
        before = index.search(queries, 10, exact=True)
        at = interrupted(lambda: index.add(big))
        after = index.search(queries, 10, exact=True)
        assert len(index) == 1000 and all(map(torch.equal, before, after))
        index.add(x[:1000])
        assert len(index) == 2000
        """,
        2000,
        50,
    ),
    **{
        f"{name}, forward": (
            f"a = x[:40_000].clone(); at = interrupted(lambda: {loss})",
            100_000,
            1,
        )
        for name, loss in LOSSES.items()
    },
    **{
        f"{name}, backward": (
            f"""
            a = x[:12_000].clone().requires_grad_()
            loss = {loss}
            at = interrupted(loss.backward)
            """,
            30_000,
            1,
        )
        for name, loss in LOSSES.items()
    },
}


@pytest.mark.parametrize("case", CASES)
def test_interrupts(case):
    body, rows, queries = CASES[case]
    code = COMMON.format(rows=rows, queries=queries)
    if case == "add":
        code += "\nbig = torch.randn(1 << 20, 64).repeat(4, 1)\n"
    code += textwrap.dedent(body) + "\nprint(at)\n"
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    try:
        assert child.stdout is not None and child.stdout.readline() == "begins\n"
        time.sleep(0.3)
        sent = time.time()
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=100)
    finally:
        child.kill()
    assert child.returncode == 0
    taken = float(output) - sent
    print(f"{case}: {taken:.3f} s until the exception")
    assert taken < SECONDS
