"""Host time of one query's top-k over ten million rows, launches left out, in milliseconds.

    python -m tests.helpers.host_time

Tensors are the host's, whose memory is never touched, as a stand-in's Python would be measured too;
torch's own few operations are included. The least of many calls, as on an idle core: where a loop
of plain Python takes longer than there, the machine is busy.
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
    # What is asked of tensors on the host alone.
    mrl_fast.shared.dispatch.triton_is_interpreted = lambda: True
    mrl_fast.search.ops.check_finite = lambda *_: None
    q, x = (torch.empty(n, 64, dtype=torch.bfloat16, device="cpu") for n in (1, 10_000_000))
    call = least(lambda: prefix_topk(q, x, 100, impl="triton"))
    print(1e3 * call * min(1.0, LOOP_SECONDS / least(pace)))


if __name__ == "__main__":
    main()
