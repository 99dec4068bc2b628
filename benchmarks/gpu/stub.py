"""An H200 that is not there: what code would launch, and what would wait, seen without a GPU.

    python -m benchmarks.gpu.stub compile|count FILE MODULE [ARGUMENT ...]  # runs it; counts: FILE

``install()`` turns this process, for good, into one that has a device: tensors on it have shapes
and addresses but no memory, torch's ops on them compute shapes only, and Triton launches nothing.
With ``compile=True`` every binary is compiled for sm_90 on its way, by Triton's own ptxas, so that
the cache a GPU needs is made; otherwise nothing is compiled. What happens goes into a ``Record``.

Triton must not be in its interpreter: not TRITON_INTERPRET=1, hence not in a process of pytest.
What would come back from the device is zero, or empty where its size is not known.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.gpu import cache

CAPABILITY, PROCESSORS, SHARED_BYTES, REGISTERS = (9, 0), 132, 227 << 10, 65536
MEMORY_BYTES = 141 * 10**9
ADDRESS = 1 << 40  # aligned as the allocator's
DEVICE = torch.device("cuda", 0)
# Ops whose result the host waits for, wherever it goes.
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "_unique2", "unique"}
# Ops that launch nothing though their results are no views.
FREE = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias",
    "lift_fresh", "record_stream", "_unsafe_view", "set_",
}  # fmt: skip


@dataclass
class Record:
    """What happened on the device since ``recorded`` began."""

    launches: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)  # kernel, grid
    ops: list[str] = field(default_factory=list)  # torch's, that launch at least a kernel or a copy
    waits: list[str] = field(default_factory=list)  # for the device
    uploads: list[str] = field(default_factory=list)  # from pageable memory
    seconds: float = 0.0  # of the host's Python, without torch's ops

    @property
    def capturable(self) -> bool:
        return not self.waits and not self.uploads

    def kernels(self) -> dict[str, int]:
        return dict(Counter(name for name, _ in self.launches))


class Clock:
    """Seconds spent in torch's ops and in this stub."""

    def __init__(self):
        self.depth, self.seconds, self.calls = 0, 0.0, 0
        self.entry = 0.0  # seconds of a call before it arrives in the stub, and after it left

    def taken(self) -> float:
        return self.seconds + self.calls * self.entry

    def calibrate(self) -> None:
        x = torch.empty(64, device="cuda")
        shortest = 1.0
        for _ in range(20):
            begin, before = time.perf_counter(), self.seconds
            for _ in range(100):
                x.detach()
            shortest = min(shortest, time.perf_counter() - begin - (self.seconds - before))
        self.entry = shortest / 100


_records: list[Record] = []
_clock = Clock()


def _note(kind: str, what: Any) -> None:
    for record in _records:
        getattr(record, kind).append(what)


@contextmanager
def recorded() -> Iterator[Record]:
    record = Record()
    _records.append(record)
    begin, before = time.perf_counter(), _clock.taken()
    try:
        yield record
    finally:
        record.seconds = time.perf_counter() - begin - (_clock.taken() - before)
        _records.remove(record)


class DeviceTensor(Tensor):
    """A meta tensor that says it is on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore
    device = property(lambda self: DEVICE)  # pyright: ignore
    is_cuda = property(lambda self: True)  # pyright: ignore
    is_meta = property(lambda self: False)  # pyright: ignore

    def __repr__(self, **_) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        return ADDRESS + int(self.storage_offset()) * self.element_size()

    def new_tensor(self, data, *, dtype=None, device=None) -> Tensor:  # pyright: ignore
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or DEVICE)

    def record_stream(self, s) -> None:
        pass


def on_device(x: Any) -> bool:
    return isinstance(x, DeviceTensor)


def _there(x: Any) -> Any:
    """A result, as one on the device."""
    if isinstance(x, Tensor) and x.is_meta:
        return Tensor._make_subclass(DeviceTensor, x)
    return x


def _shape_of(x: Any) -> Any:
    """An argument, as its meta tensor. Scalars of the host stay, as they go with any device."""
    if on_device(x):
        return x.as_subclass(Tensor)
    if isinstance(x, Tensor) and x.dim():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return x


@functools.cache
def _is_composite(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _indexed(place: Any) -> Any:
    """A device with its number, which else torch would ask the device for."""
    return DEVICE if place == "cuda" or place == torch.device("cuda") else place


def _made_on_the_host(make: Any) -> Any:
    """torch.tensor and the like: a copy to the device is seen as one."""

    def made(*args, device=None, **kwargs):
        there = device is not None and torch.device(device).type == "cuda"
        x = make(*args, device=None if there else device, **kwargs)
        return x.to(DEVICE) if there else x

    return made


class Device(TorchDispatchMode):
    """Runs ops on the device by shapes alone, those on the host as they are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "mrl_fast" and (op := OPDEFS.get(func._schema.name)):
            with self:
                return op._init_fn(*args, **kwargs)
        begin = time.perf_counter()
        _clock.depth += 1
        try:
            return self.run(func, args, kwargs)
        finally:
            _clock.depth -= 1
            if not _clock.depth:  # ops may be made of others
                _clock.seconds += time.perf_counter() - begin
                _clock.calls += 1

    def run(self, func, args, kwargs):
        place = kwargs.get("device")
        place = None if place is None else torch.device(place).type
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(map(on_device, tensors)) and place not in ("cuda", "meta"):
            return func(*args, **kwargs)
        if _is_composite(func.name()):  # as below autograd, where it is handed on whole
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        masked = name.startswith("index") and any(
            x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None
        )
        to_host = place == "cpu" or (name == "copy_" and not on_device(args[0]))
        if name in WAITING or to_host or masked:
            _note("waits", name)
            _note("ops", name)
            return self.brought(name, args, kwargs, masked)
        if any(x.dim() and not (on_device(x) or x.is_meta) for x in tensors):
            _note("uploads", name)
        elif name == "_to_copy" and kwargs.get("dtype") in (None, args[0].dtype):
            return _there(args[0].as_subclass(Tensor))  # nothing to do: it is there
        if not (name in FREE or func.is_view):
            _note("ops", name)
        meta = {id(x): _shape_of(x) for x in tensors}
        args, kwargs = tree_map(lambda x: meta.get(id(x), x), (args, kwargs))
        kwargs |= {k: v for k, v in (("device", "meta"), ("generator", None)) if k in kwargs}
        if name == "mm" and func._overloadname == "dtype":  # only CUDA has this overload
            a, b, dtype = args
            return _there(torch.empty(a.shape[0], b.shape[1], dtype=dtype, device="meta"))
        given = {id(meta[id(x)]): x for x in tensors}
        return tree_map(lambda x: given.get(id(x), _there(x)), func(*args, **kwargs))

    def brought(self, name, args, kwargs, masked):
        """A result on the host: zeros of the right shape, no rows where their number is unknown."""
        x = args[0]
        if name in ("_local_scalar_dense", "item"):
            return torch.zeros((), dtype=x.dtype).item()
        if name == "equal":
            return True
        if name == "copy_":
            return x.zero_()
        if name == "_to_copy":
            return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        shape = (0, x.dim()) if name == "nonzero" else None
        if masked and name == "index":
            shape = (0, *x.shape[next(m for m in args[1] if m is not None).dim() :])
        if shape is not None:
            dtype = torch.int64 if name == "nonzero" else x.dtype
            return _there(torch.empty(shape, dtype=dtype, device="meta"))
        if masked:
            return x
        raise TypeError(f"the stub knows no size of what {name} gives")


class Driver:
    """What Triton asks of a driver."""

    def __init__(self):
        self.get_device_capability = lambda *_: CAPABILITY
        self.get_current_device = lambda: 0
        self.set_current_device = lambda _: None
        self.get_current_stream = lambda _: 0
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024), unload_module=lambda *_: None,
            get_device_properties=lambda _: {
                "max_shared_mem": SHARED_BYTES, "max_num_regs": REGISTERS,
                "multiprocessor_count": PROCESSORS, "warpSize": 32,
            },
        )  # fmt: skip

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_empty_cache_for_benchmark(self):
        raise RuntimeError("nothing can be timed without a device")


class Launcher:
    """Stands in for Triton's compiled launcher, which every Python compiles anew."""

    def __init__(self, src: Any, metadata: Any):
        self.name = metadata.name
        if src is not None:
            signature, meta = dict(src.signature), getattr(metadata, "tensordesc_meta", None)
            cache.note_launcher(dict(src.constants), signature, meta)

    def __call__(self, x, y, z, *_):
        if _records:
            _note("launches", (self.name, (x, y, z)))


class Uncompiled:
    """A kernel of which only the name is known."""

    function = packed_metadata = None

    def __init__(self, name: str):
        self.run = Launcher(None, SimpleNamespace(name=name))

    def launch_metadata(self, *_):
        return None


def install(*, compile: bool = False) -> None:
    """From here on this process has a device, on which nothing runs."""
    import triton
    from triton.runtime.jit import JITFunction

    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        raise RuntimeError("the stub needs Triton's compiler and a machine without a GPU")
    triton.runtime.driver.set_active(Driver())  # pyright: ignore
    if not compile:

        def make(self, key, signature, device, *_):
            kernel = self.device_caches[device][0][key] = Uncompiled(self.fn.__name__)
            cache.counts["compiled"] += 1  # or would be
            return kernel

        JITFunction._do_compile = make  # pyright: ignore
    _install_cuda()
    to = Tensor.to
    Tensor.to = lambda self, *args, **kwargs: to(self, *map(_indexed, args), **kwargs)  # pyright: ignore
    Tensor.cuda = lambda self, *_, **__: to(self, DEVICE)  # pyright: ignore
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _made_on_the_host(getattr(torch, name)))
    Device().__enter__()
    _clock.calibrate()
    from benchmarks.gpu import measure

    measure.generator = lambda seed: torch.Generator().manual_seed(seed)


def _install_cuda() -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200 (stub)", multi_processor_count=PROCESSORS, major=CAPABILITY[0],
        minor=CAPABILITY[1], total_memory=MEMORY_BYTES, L2_cache_size=50 << 20,
        shared_memory_per_multiprocessor=228 << 10, regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=2048, warp_size=32,
    )  # fmt: skip
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda *_: None)
    constants = {
        "is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None,
        "get_device_capability": CAPABILITY, "get_device_properties": properties,
        "get_device_name": properties.name, "current_stream": stream, "empty_cache": None,
        "is_current_stream_capturing": False, "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES),
        "memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None,
        "set_sync_debug_mode": None, "is_initialized": True, "_is_in_bad_fork": False,
    }  # fmt: skip
    for name, value in constants.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.synchronize = lambda *_: _note("waits", "synchronize")
    torch.cuda.stream = lambda _: nullcontext()  # pyright: ignore


def main() -> int:
    how, file, module, *arguments = sys.argv[1:]
    install(compile=how == "compile")
    cache.pin()
    sys.argv = [module, *arguments]
    code: Any = 0
    with recorded() as record:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    counts = {"launches": len(record.launches), "ops": len(record.ops), "code": code}
    counts["cpu_s"] = round(sum(os.times()[:4]), 1)  # the compilers' included
    Path(file).write_text(json.dumps(counts | cache.counts | {"kernels": record.kernels()}))
    return 0


if __name__ == "__main__":
    from benchmarks.gpu import stub  # the one that others import

    raise SystemExit(stub.main())
