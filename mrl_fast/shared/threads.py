"""How many threads a call may use."""

from __future__ import annotations

import torch

from mrl_fast.shared import native
from mrl_fast.shared.checks import check_int

MOST = 1024  # beyond what a process may start, the runtime ends it


def set_num_threads(threads: int | None) -> None:
    """Sets how many threads each of this library's calls may use on the CPU, in the whole process
    and from the next call on.

    A service whose own threads search side by side is fastest with 1: calls release the
    interpreter's lock. Results do not depend on it.

    Args:
        threads: From 1 to 1,024; None, as at first: what ``torch.get_num_threads()`` says in the
            thread that calls. (``torch.set_num_threads`` does not reach threads that have used
            PyTorch before.)

    Raises:
        ValueError, TypeError: No such number.
    """
    native.threads = None if threads is None else check_int(threads, "threads", 1, MOST)


def get_num_threads() -> int:
    """The threads that a call of this thread may use."""
    return native.threads or torch.get_num_threads()
