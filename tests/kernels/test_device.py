"""How many programs a launch has: those that the device holds at a time, or few waves of them."""

from types import SimpleNamespace

import pytest
import torch
from mrl_fast.kernels.search import plan, scan, scan_shape
from mrl_fast.kernels.search.metrics import Margin
from mrl_fast.kernels.shared import device

H200 = SimpleNamespace(
    major=9,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    shared_memory_per_multiprocessor=228 << 10,
)


@pytest.fixture
def x(monkeypatch):
    """As a tensor on a device of its own."""
    monkeypatch.setattr(device, "_properties", lambda index: H200)
    monkeypatch.setattr(device, "_resident", {})
    return SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "held"),
    [
        (168, 4, 0, 3),  # by registers: 65536 of them
        (169, 4, 0, 2),  # which come in eights
        (32, 4, 0, 16),  # by threads
        (32, 4, 100 << 10, 2),  # by shared memory, a KiB of which each program takes beside its own
        (255, 32, 0, 1),
    ],
)
def test_programs_are_as_many_as_fit(registers, warps, shared, held, x):
    metadata = SimpleNamespace(num_warps=warps, shared=shared)
    assert device.programs(x, "scan") == device.UNKNOWN * 132
    device.remember("scan", x, SimpleNamespace(n_regs=0, metadata=metadata))  # not loaded
    assert device.programs(x, "scan") == device.UNKNOWN * 132
    device.remember("scan", x, SimpleNamespace(n_regs=registers, metadata=metadata))
    assert device.programs(x, "scan") == held * 132
    assert device.programs(x, "another") == device.UNKNOWN * 132


@pytest.mark.parametrize("slots", [264, 396, 528])
@pytest.mark.parametrize("query_tiles", [1, 8, 64, 128, 200, 300, 1000])
def test_the_last_wave_leaves_little_idle(query_tiles, slots):
    splits = scan.splits_of(query_tiles, slots)
    waves = -(-query_tiles * splits // slots)
    assert query_tiles * splits >= 0.85 * waves * slots and waves <= 9
    if query_tiles < 50:
        assert waves <= 2


def test_few_queries_take_two_phases():
    x = SimpleNamespace(shape=(10_000_000, 64))
    config, margin = scan_shape.Config(16, 256, 64, 4, 3), Margin(1e-5, 0.0, d=1e-5)
    few, many = (plan.Plan.from_sizes(100, x, config, margin, queries) for queries in (1, 1024))
    assert len(few.ends) == 2 and len(many.ends) == 3
    assert few.buffer > many.buffer and few.ends[-1] == many.ends[-1] == 39063


def test_programs_on_the_host_are_few():
    x = torch.ones(1)
    assert device.programs(x, "scan") == device.UNKNOWN and device.architecture(x) == 0
