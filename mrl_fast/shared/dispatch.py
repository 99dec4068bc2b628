"""The one place that decides which implementation runs.

Each wing of the library, ``training`` and ``search``, has three modules with the same functions:
``reference`` (plain PyTorch, the specification), ``cpp`` (C++ SIMD) and ``triton`` (kernels).
``impl=None`` picks by device; a name that is given is used or refused, never replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

MODULES = {  # of a wing
    "reference": "mrl_fast.{wing}.reference",
    "cpp": "mrl_fast.{wing}.cpp",
    "triton": "mrl_fast.kernels.{wing}",
}


def choose(impl: str | None, *tensors: torch.Tensor) -> str:
    """The name of the implementation that runs an op on these tensors.

    Args:
        impl: ``"triton"``, ``"cpp"`` or ``"reference"``; None picks by device and dtype, and the
            reference, which is made of PyTorch's own ops, while a model is exported.
        tensors: The op's tensors; all on one device.

    Raises:
        ValueError: ``impl`` is unknown, or cannot run on these tensors here.
    """
    device = tensors[0].device
    wide = any(t.dtype == torch.float64 for t in tensors)
    if impl is None:
        fast = {"cpu": "cpp", "cuda": "triton"}.get(device.type, "reference")
        impl = "reference" if wide or exporting() else fast
    if impl not in MODULES:
        known = ", ".join(repr(name) for name in MODULES)
        raise ValueError(f"impl: expected None or one of {known}, got {impl!r}")
    if impl != "reference" and wide:
        raise ValueError(f"impl: {impl!r} has no float64 form; expected impl='reference'")
    if impl == "cpp" and device.type != "cpu":
        raise ValueError(f"impl: 'cpp' runs on CPU tensors, got tensors on {device}")
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("impl: 'triton' needs the triton package, which is not installed")
        if device.type != "cuda" and not triton_is_interpreted():
            raise ValueError(
                f"impl: 'triton' runs on CUDA tensors, got tensors on {device} "
                "(on a CPU, set TRITON_INTERPRET=1 before the first import of triton)"
            )
    return impl


def exporting() -> bool:
    """Whether a model is being exported, by ``torch.export``, ``torch.onnx`` or
    ``torch.jit.trace``. Sizes are then symbols: a check of one would fix it in the export."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return torch.compiler.is_exporting() or tracing


def module_of(impl: str, wing: str) -> ModuleType:
    """The module of ``"training"`` or ``"search"`` that an accepted ``impl`` names."""
    return importlib.import_module(MODULES[impl].format(wing=wing))


def triton_is_interpreted() -> bool:
    """True where Triton kernels run in its interpreter, which needs no GPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
