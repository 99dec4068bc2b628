"""Every call in threads, while another thread changes torch's defaults and memory is filled with
bytes as it is allocated and freed: the same bits, and no byte beyond an allocation."""

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import torch_states
from tests.helpers.index_model import TIMES

SECONDS, THREADS = 1.5 * TIMES, 3
ROOT = Path(__file__).parents[2]


def calls():
    from tests.search.test_global_state import CALLS
    from tests.training.test_torch_state import LOSSES, results

    searches = {name: call for name, call in CALLS.items() if name not in ("tuned", "FAISS")}
    return searches | {f"loss {name}": results(name, "cpp") for name in LOSSES}


def differing(name, call, expected):
    """What differs from the bits expected, as a message."""
    for a, b in zip(call(), expected, strict=True):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield f"{name}: {a.dtype} {a} where {b.dtype} {b} is right"


def main():
    torch.set_num_threads(1)
    all_calls = calls()
    expected = {name: call() for name, call in all_calls.items()}
    end, wrong, count = time.monotonic() + SECONDS, [], itertools.count()

    def work(first):
        names = list(all_calls)[first:] + list(all_calls)[:first]
        for name in itertools.cycle(names):
            if time.monotonic() > end or wrong:
                return
            try:
                wrong.extend(differing(name, all_calls[name], expected[name]))
            except Exception as error:
                wrong.append(f"{name}: {error!r}")
            next(count)

    threads = [threading.Thread(target=work, args=(5 * i,)) for i in range(THREADS)]
    with torch_states.flipping():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(f"{next(count)} calls")
    sys.exit("\n".join(wrong[:5]) or 0)


@pytest.mark.parametrize("byte", [1, 165])  # of what is freed; allocated: the others of its bits
def test_while_a_thread_flips_the_defaults(byte):
    variables = {**os.environ, "MALLOC_PERTURB_": str(byte), "MALLOC_CHECK_": "3"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.stress.test_global_state"],
        cwd=ROOT, env=variables, text=True, capture_output=True, timeout=120 + 4 * SECONDS,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert int(ended.stdout.split()[0]) >= THREADS


if __name__ == "__main__":
    main()
