"""Without a GPU, Triton kernels are interpreted: to be chosen before Triton is imported. With one,
tests that hand CPU tensors to ``impl="triton"`` have them carried there and back."""

import os

import pytest
import torch
from torch.utils._pytree import tree_map

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


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
