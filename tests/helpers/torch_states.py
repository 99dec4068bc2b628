"""Global states of torch that a program may be in when it calls ours."""

import threading
import time
from contextlib import contextmanager

import torch


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def filled():
    """New memory is filled with NaN, and with the largest integers."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def flipping():
    """Another thread changes the defaults all the while."""
    ended = threading.Event()

    def flip():
        while not ended.is_set():
            for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.float16):
                torch.set_default_dtype(dtype)
                with torch.device("meta"):
                    time.sleep(1e-5)

    thread = threading.Thread(target=flip)
    with default_dtype(torch.float32):
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
}
