"""How the tests run: on which processor, in which order, which of them.

Without a GPU, Triton kernels are interpreted: that is chosen before Triton is imported. With one,
tests that hand CPU tensors to ``impl="triton"`` have them carried there and back.
``MRL_FAST_ISA=portable`` runs our kernels on that instruction set; the variables of PyTorch and MKL
that hold theirs back are in the Makefile.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

from mrl_fast.shared import native
from tests.helpers import suites

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.gpu import interpreter

    interpreter.install()
native.ISA = os.environ.get("MRL_FAST_ISA", "")
native._C.set_seed_columns(0)  # tests' rows are few, and bounds have to be seen to hold
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and so would what tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parents[1]


def pytest_report_header():
    ours = native.ISA or native._C.available()[0]
    theirs = torch.backends.cpu.get_cpu_capability()
    return f"kernels: {ours}, ATen: {theirs}, threads: {torch.get_num_threads()}"


def pytest_ignore_collect(collection_path, config):
    """``-m quick`` does not even import a file that has no quick test."""
    name = collection_path.relative_to(ROOT).as_posix()
    if config.option.markexpr == "quick" and collection_path.is_file():
        return True if name not in suites.QUICK else None
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if not torch.cuda.is_available() and suites.is_slow(item.nodeid):
            item.add_marker("slow")
        elif suites.is_quick(item.nodeid):
            item.add_marker("quick")
    items.sort(key=lambda item: suites.place(item.nodeid))


@pytest.fixture
def triton_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Carried:
    """The kernels' module for CPU tensors, run on a device."""

    def __init__(self, module, device: str):
        self.module, self.device = module, device

    def __getattr__(self, name):
        function = getattr(self.module, name)

        def move(to):
            return lambda x: x.to(to) if isinstance(x, torch.Tensor) else x

        def call(*args, **kwargs):
            args, kwargs = tree_map(move(self.device), (args, kwargs))
            return tree_map(move("cpu"), function(*args, **kwargs))

        return call


@pytest.fixture(autouse=torch.cuda.is_available())
def kernels_for_cpu_tensors(monkeypatch):
    from mrl_fast.shared import dispatch
    from mrl_fast.training import ops
    from mrl_fast.training.losses import distill

    def module_of(impl, wing):
        module = original(impl, wing)
        return Carried(module, "cuda") if impl == "triton" else module

    original = dispatch.module_of
    monkeypatch.setattr(dispatch, "triton_is_interpreted", lambda: True)
    for user in (dispatch, ops, distill):
        monkeypatch.setattr(user, "module_of", module_of)
