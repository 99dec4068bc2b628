"""Host time of one query's top-k over ten million rows, launches left out, in milliseconds.

    python -m tests.helpers.host_time

Tensors are on the host, where their memory is never touched: a stand-in for a GPU would add Python
of its own. torch's own few operations are included. The time is the least of many calls; where a
loop of plain Python takes longer than on an idle core, the time is scaled down by as much.
"""

import time

import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks.gpu import stub

triton.runtime.driver.set_active(stub.Driver())

import mrl_fast.search.ops  # noqa: E402
import mrl_fast.shared.dispatch  # noqa: E402
from mrl_fast import prefix_topk  # noqa: E402

LOOP_SECONDS = 8e-5  # of ``pace`` on an idle core
REPETITIONS = 2000


def pace() -> None:
    numbers = {}
    for i in range(1000):
        numbers[i % 7] = str(i)


def least(call) -> float:
    seconds = []
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def named(self, key, signature, device, *_):
    kernel = self.device_caches[device][0][key] = stub.Uncompiled(self.fn.__name__)
    return kernel


def main() -> None:
    JITFunction._do_compile = named  # pyright: ignore
    # These two are asked of tensors on the host, but not of those on a GPU.
    mrl_fast.shared.dispatch.triton_is_interpreted = lambda: True
    mrl_fast.search.ops.check_finite = lambda *_: None
    q, x = (torch.empty(n, 64, dtype=torch.bfloat16, device="cpu") for n in (1, 10_000_000))
    call = least(lambda: prefix_topk(q, x, 100, impl="triton"))
    print(1e3 * call * min(1.0, LOOP_SECONDS / least(pace)))


if __name__ == "__main__":
    main()
