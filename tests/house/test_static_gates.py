"""Every kind of Triton kernel compiles for every architecture, as it should; no GPU needed."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from benchmarks.gates import static
from benchmarks.gpu import kernels

ROOT = Path(__file__).parents[2]
FREE = {*static.BLOCKS, "TILE", "GROUPS", "WHOLE", "ALIGNMENT", "PRECISION", "MAGIC_SUMS"}
FREE |= {"PART", "RESCAN_BLOCKS", "RESCAN_ROWS"}
SOURCES = "\n".join(file.read_text() for file in (ROOT / "kernels").rglob("*.py"))
KERNELS = set(re.findall(r"^def (_\w+_kernel)\(", SOURCES, re.M))


def compiling(*command):
    """JSON that a program prints in whose process Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def gates(*options):
    return compiling("-m", "benchmarks.gates.static", *options)


ARCHITECTURES = {"sm_90": {90}, "all": {80, 90, 100}}
# Compiled for sm_90 alone where time is short.
FEW = "scan bf16 1024q 64d", "pairs buckets bf16 64d tile 128 ip", "logits fp32 ieee bias"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architectures(request):
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def rows(architectures):
    few = ["--only", *FEW] if architectures == {90} else []
    return gates("--short", "--json", "--arch", *map(str, architectures), *few)


@pytest.mark.parametrize("architectures", ["all"], indirect=True)
def test_every_kernel_on_every_architecture(rows, architectures):
    for name in KERNELS:
        assert {row["arch"] for row in rows if row["function"] == name} == architectures, name
    for family in ("logits", "predict", "statistics", "score gradients", "scan", "pairs", "rescan"):
        eight = ("int8", "fp8") if family in ("scan", "pairs", "rescan") else ()
        for dtype in ("fp32", "bf16", "fp16", *eight):
            these = [row for row in rows if row["kernel"].startswith(f"{family} {dtype}")]
            expected = {90, 100} if dtype == "fp8" else {80, 90, 100}
            assert {row["arch"] for row in these} == expected & architectures, (family, dtype)


def test_limits(rows, architectures):
    limited = {row["kernel"] for row in rows if row["arch"] == 90 and row["instructions"]}
    assert limited >= (static.INSTRUCTIONS.keys() if len(architectures) > 1 else {FEW[0]})
    broken = [what for row in rows for what in static.failures(row)]
    assert not broken, "\n".join(broken)


def test_half_precision_scans_take_five_instructions_a_score(rows):
    found = {row["kernel"]: row["instructions"] for row in rows if row["arch"] == 90}
    for name in {"scan bf16 1024q 64d", "scan fp16 1024q 64d"} & found.keys():
        assert 2 < found[name] <= 5
    assert "scan bf16 1024q 64d" in found


@pytest.mark.parametrize(
    ("kernel", "wrong", "what"),
    [
        ("scan bf16 1024q 64d", {"spill_bytes": 4}, "spills"),
        ("pairs buckets bf16 64d tile 128 ip", {"spill_bytes": 8}, "spills"),
        ("pairs buckets bf16 64d tile 128 ip", {"loop_spills": 1}, "in its loop"),
        ("scan bf16 1024q 64d", {"programs": 1}, "4 warps"),
        ("scan bf16 1024q 64d", {"shared_bytes": 230 << 10}, "more shared memory"),
        ("scan bf16 1024q 64d", {"shared_bytes": 24 << 10}, "no block during a product"),
        ("scan bf16 1024q 64d", {"matrix": 0}, "no matrix product"),
        ("scan bf16 1024q 64d", {"grouped_matrix": 0}, "small matrix products"),
        ("scan bf16 1024q 64d", {"narrow_copies": 1}, "16 bytes"),
        ("scan bf16 1024q 64d", {"instructions": 5.1}, "instructions"),
        ("logits fp32 ieee bias", {"matrix": 1}, "rounded matrix product"),
        ("pairs buckets bf16 64d tile 128 ip", {"fma": 1}, "fuses products"),
        ("pairs buckets bf16 64d tile 128 ip", {"loop_fma": 1}, "products and sums of a row"),
        ("pairs buckets bf16 64d tile 128 ip", {"wide_loads": 0}, "16 bytes"),
    ],
)
def test_limits_are_seen_to_be_broken(kernel, wrong, what, rows, architectures):
    fused = "fuses" in what or "of a row" in what  # on Blackwell too, where ptxas would
    these = [row for row in rows if row["kernel"] == kernel and (fused or row["arch"] == 90)]
    assert {row["arch"] for row in these} >= (architectures if fused else {90})
    for row in these:
        assert not static.failures(row)
        assert any(what in failure for failure in static.failures(row | wrong))


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are recorded in the interpreter")
def test_cases_have_every_feature_that_is_launched(monkeypatch):
    launched = set()

    def record(self, *args, **kwargs):
        parameters = inspect.signature(self.fn).parameters
        kwargs = {k: v for k, v in kwargs.items() if k in parameters}
        arguments = inspect.signature(self.fn).bind(*args, **kwargs).arguments
        names = [n for n, p in parameters.items() if "constexpr" in str(p.annotation)]
        launched.add(features(self.fn.__name__, {n: arguments[n] for n in names}))

    def features(kernel, constants):
        kept = {k: v if isinstance(v, int) else str(v) for k, v in constants.items()}
        return kernel, *sorted((k, v) for k, v in kept.items() if k not in FREE)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    kernels.main(["--size", "tiny"])  # where nothing is right, as nothing runs
    assert {kernel for kernel, *_ in launched} == KERNELS
    missing = launched - {features(*case) for case in gates("--list")}
    assert not missing, "\n".join(map(str, missing))


VARIANTS = """
import itertools, json
import torch
from mrl_fast.kernels.search.queries import scan_queries
from benchmarks.gates.cases import (
    Case, KnownRows, approx_topk, empty, fold, meta, recorded, rerank, specialised, topk
)

def search(queries, rows, k):
    q, x = (meta(n, 64, dtype=torch.bfloat16) for n in (queries, rows))
    topk(q, x, k, "ip", empty(q, k), KnownRows())
    approx_topk(q, x, k, 64, "ip", 0.9)
    scan_queries(q.float(), x, "ip")  # in two parts
    for candidates in (100, 112, 127):
        rerank(q, x, meta(queries, candidates, dtype=torch.int64), k, 64, "ip")

def loss(rows, classes):
    x, weight = (meta(n, 256, dtype=torch.bfloat16) for n in (rows, classes))
    fold(x, weight, bias=meta(classes), target=meta(rows, dtype=torch.int64))

with recorded(90) as launches:
    for sizes in itertools.product((130, 512, 1000), (33_333, 65_537, 1 << 20), (9, 10, 16)):
        search(*sizes)
    for sizes in itertools.product((1, 100, 512), (1000, 1001, 4096)):
        loss(*sizes)
binaries = {}
for kernel, arguments, options in launches:
    one = specialised(Case("", kernel, arguments, options, ""), 90)[:4]
    binaries.setdefault(kernel.__name__, set()).add(repr(one))
print(json.dumps({name: len(variants) for name, variants in binaries.items()}))
"""


def test_one_binary_serves_batches_and_collections_of_all_sizes():
    """Or a collection that grows would be waited for, at every other search, by the compiler."""
    expected = dict.fromkeys(KERNELS - {"_nested_logits_kernel", "_predict_kernel"}, 1)
    # Seeds, windows and the rest; buckets, and rescans. Buffers and blocks are powers of two.
    expected |= {"_scan_kernel": 3, "_buckets_kernel": 2, "_narrow_kernel": 3, "_decode_kernel": 2}
    assert compiling("-c", VARIANTS) == expected
