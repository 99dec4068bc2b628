"""What the compiler makes of every Triton kernel that ships, on every architecture; needs no GPU.

    python benchmarks/static_gates.py          # the table
    python benchmarks/static_gates.py --json

Registers and spilled bytes a thread, shared memory a program, and the matrix instructions in the
machine code: half precision must use the tensor cores, exact fp32 must not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: this compiles

import triton
import triton.language as tl
from mrl_fast.kernels import (
    fold_gradients,
    fold_statistics,
    keys,
    logits,
    pairs,
    predict,
    scan,
    tiling,
)
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program
MATRIX = {
    80: r"[HI]MMA",
    90: r"[HIQ]GMMA|[HI]MMA",
    100: r"UTC[HIQ]MMA|[HI]MMA",
}  # tensor core instructions
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WHOLE = ("dim", "width", "readable")  # multiples of 16, as strides are taken to be
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
FLOATS = ("own_boost", "other_boost", "limit", "bound", "e_a", "e_b", "e_c", "e_d", "e_e")
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "i8": 1, "fp8e4nv": 1}

KEYS = {
    "keys_ptr": "*i64", "hits_ptr": "*i64", "rows_ptr": "*i64", "ids_ptr": "*i64",
    "count_ptr": "*i32", "flag_ptr": "*i32", "skip_ptr": "*i32", "allowed_ptr": "*u8",
}  # fmt: skip
PREDICT = {"label_ptr": "*i32"}
FOLD_TYPES = {"target_ptr": "*i32", "own_ptr": "*i32", "mask_ptr": "*u8"}
FOLD = {
    "HAS_BIAS": False, "HAS_SCALE": False, "HAS_TARGET": True, "HAS_HIT": True, "HAS_MASK": False,
    "SOFT": "none", "OWN": "none", "LINK": "softmax", "COLUMNS": False,
}  # fmt: skip
SCALED = {"HAS_SCALE": True}
FOLDS = {
    "": {"HAS_BIAS": True},  # cross-entropy, as the next
    "smooth": {"HAS_BIAS": True, "SOFT": "row"},
    "scaled": SCALED,  # InfoNCE, as the next five
    "columns": SCALED | {"COLUMNS": True},
    "boost": SCALED | {"OWN": "boost", "COLUMNS": True},
    "exclude": SCALED | {"OWN": "exclude", "HAS_HIT": False},
    "mask": SCALED | {"HAS_MASK": True},
    "sigmoid": SCALED | {"HAS_BIAS": True, "LINK": "sigmoid"},
    "distill": SCALED | {"SOFT": "matrix", "HAS_TARGET": False, "HAS_HIT": False},
    "all": SCALED
    | {"HAS_BIAS": True, "HAS_MASK": True, "OWN": "boost", "COLUMNS": True, "SOFT": "matrix"},
}


class Case(NamedTuple):
    name: str
    kernel: Any
    types: dict[str, str]  # of runtime arguments
    constants: dict[str, Any]
    options: dict[str, int]
    precision: str | None  # "half", "tf32", "ieee"; None has no matrix product


def cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp16", "fp32"):
        for precision in ("half",) if WIDTH[dtype] == 2 else ("ieee", "tf32"):
            ir_precision = "ieee" if precision == "half" else precision
            blocks = tiling.CONFIGS[WIDTH[dtype]]._asdict()
            storing = tiling.STORING_CONFIGS[WIDTH[dtype]]._asdict()
            common = {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
            flags = {"HAS_BIAS": True, "ALIGNMENT": 8, "PRECISION": ir_precision}
            label = f"{dtype} {precision}" if WIDTH[dtype] == 4 else dtype
            out = {"out_ptr": f"*{dtype}"}
            yield case(
                f"logits {label}",
                logits._nested_logits_kernel,
                common | out,
                flags,
                storing,
                precision,
            )
            yield case(f"predict {label}", predict._predict_kernel, common | PREDICT, flags, blocks,
                       precision)  # fmt: skip
            for name, features in FOLDS.items():
                if dtype == "fp16" and name not in ("", "scaled", "all"):
                    continue  # as bf16, but for its bound
                fold = FOLD | features | {"ALIGNMENT": 8, "PRECISION": ir_precision}
                types, size = common | FOLD_TYPES, WIDTH[dtype]
                yield case(
                    f"statistics {label} {name}".strip(), fold_statistics._statistics_kernel, types,
                    fold, fold_statistics.configs(fold)[size]._asdict(), precision,
                )  # fmt: skip
                yield case(
                    f"score gradients {label} {name}".strip(),
                    fold_gradients._score_gradients_kernel, types | out, fold,
                    fold_gradients.configs(fold)[size]._asdict(), precision,
                )  # fmt: skip
            yield from search_cases(dtype, precision, label)
    for dtype in ("i8", "fp8e4nv"):
        yield from search_cases(dtype, "integer" if dtype == "i8" else "fp8", dtype)
    for size in (2048, 8192, 16384):
        blocks = {"C": size, "num_warps": keys.narrow_warps(size)}
        yield case(f"narrow {size}", keys._narrow_kernel, KEYS, {}, blocks, None)
    for size in (64, 512, 2048):
        blocks = {"BLOCK_C": size, "num_warps": 4 if size <= 1024 else 8}
        flags = {"HAS_IDS": True, "SORT": True}
        yield case(f"select {size}", keys._decode_kernel, KEYS, flags, blocks, None)


def search_cases(dtype: str, precision: str, label: str) -> Iterator[Case]:
    search = KEYS | {"q_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    ir_precision = {"tf32": "tf32", "ieee": "tf32x3"}.get(precision, "ieee")
    for queries in (1, 32, 64, 1024):
        for dim in (64, 256):
            x = Elements(WIDTH[dtype], dim)
            config = scan.scan_config(queries, x)
            for norms in (0, 1, 2, -1) if queries <= config.BLOCK_B else (-1,):
                for dense in (False, True):
                    flags = {
                        "HAS_SCALE": norms == -1, "HAS_TERM": norms == -1 and precision != "half",
                        "HAS_OUTER": False, "HAS_SKIP": False, "NORMS": norms, "DENSE": dense,
                        "WHOLE": dim <= config.BLOCK_D, "GROUPS": config.groups,
                        "MAGIC_SUMS": dtype == "i8" and dim <= scan.MAGIC_DIM,
                        "PRECISION": ir_precision,
                    }  # fmt: skip
                    name = f"scan {label} {queries}q {dim}d norms={norms}{' dense' * dense}"
                    kind = "tf32" if precision == "ieee" else precision
                    yield case(name, scan._scan_kernel, search, flags, config._asdict(), kind)
    if precision == "tf32":
        return
    for metric, code in pairs.METRICS.items():
        flags = {"METRIC": code, "HAS_ALLOWED": False, "ACC": tl.float32}
        blocks = pairs.pair_blocks(Elements(WIDTH[dtype], 1024)) | pairs.ROUNDED
        plain = {"HAS_SUMS": False, "BUCKETS": False, "TILE": 0, "GROUPS": 0}
        hits = {"HAS_SUMS": False, "BUCKETS": True, "TILE": 128, "GROUPS": 2}
        for name, more in (("", plain), (" of buckets", hits)):
            yield case(
                f"pairs {dtype} {metric}{name}",
                pairs._keys_kernel,
                search,
                flags | more,
                blocks,
                None,
            )
    for kept in (128, 2048):
        flags = {"METRIC": 0, "HAS_ALLOWED": False, "ACC": tl.float32, "KEPT": kept}
        blocks |= {"num_warps": 8 if kept > 512 else 4}
        yield case(f"rescan {dtype} {kept}", pairs._rescan_kernel, search, flags, blocks, None)


class Elements:
    """Stands for a tensor where only its width and that of an element are asked for."""

    def __init__(self, width: int, dim: int = 64):
        self.width, self.shape = width, (1 << 20, dim)

    def element_size(self) -> int:
        return self.width


def case(name, kernel, types, constants, blocks, precision) -> Case:
    options = {k: v for k, v in blocks.items() if k in OPTIONS}
    constants = constants | {k: v for k, v in blocks.items() if k not in OPTIONS}
    return Case(name, kernel, types, constants, options, precision)


def compile_case(item: tuple[Case, int]) -> dict[str, Any]:
    one, capability = item
    signature, attributes = {}, {}
    for i, name in enumerate(one.kernel.arg_names):
        if name in one.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = one.types.get(name, "*fp32" if name != "schedule_ptr" else "*i16")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        # As the launcher finds them for widths of whole cache lines.
        if name.endswith("_ptr") or name.startswith("stride_") or name in WHOLE:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(one.kernel, signature, one.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=one.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "-res-usage", cubin.name)
        sass = tool("nvdisasm", "-c", cubin.name)
        if os.environ.get("DUMP"):
            Path("/tmp/k/" + one.name.replace(" ", "_") + f".{capability}.sass").write_text(sass)
            Path("/tmp/k/" + one.name.replace(" ", "_") + f".{capability}.ttgir").write_text(
                compiled.asm["ttgir"]
            )
    return {
        "kernel": one.name,
        "arch": capability,
        "registers": counted("REG", usage),
        "spill_bytes": counted("STACK", usage) + counted("LOCAL", usage),
        "shared_bytes": compiled.metadata.shared,
        "stage_bytes": stage_bytes(one),
        "matrix_instructions": len(re.findall(MATRIX[capability], sass)),
        "fma_instructions": len(re.findall(r"\bFFMA2?\b", sass)),
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)),
        "precision": one.precision,
        "loop_instructions": loop_instructions(one, sass, capability),
    }


def loop_instructions(one: Case, sass: str, capability: int) -> float | None:
    """Lane instructions a score in a scan's loop over tiles, its every branch taken."""
    if one.kernel is not scan._scan_kernel:
        return None
    labels, lines = {}, []  # lines: of code
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            lines.append(line)
    products = [i for i, line in enumerate(lines) if re.search(MATRIX[capability], line)]
    loops = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA(?:\.U)?\b.*?(\.L_x_\d+)", line)
        if target and labels.get(target[1], i + 1) <= i and products:
            begin = labels[target[1]]
            inside = sum(begin <= p <= i for p in products)
            loops.append((-inside, i + 1 - begin))
    if not loops:
        return None
    c = one.constants
    return round(min(loops)[1] * one.options["num_warps"] * 32 / (c["BLOCK_B"] * c["BLOCK_N"]), 2)


def stage_bytes(one: Case) -> int:
    """What a block of columns of both operands takes in shared memory; 0 without a product."""
    if one.precision is None:
        return 0
    blocks = one.constants
    rows = blocks["BLOCK_B"] + blocks.get("BLOCK_V", blocks.get("BLOCK_N"))
    return rows * blocks["BLOCK_D"] * WIDTH[one.types["x_ptr"][1:]]


def counted(resource: str, usage: str) -> int:
    return int(re.findall(rf"\b{resource}:(\d+)", usage)[0])


def tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles every Triton kernel that ships.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    as_json, only = vars(parser.parse_args()).values()
    work = [
        (one, cc)
        for one in cases()
        for cc in SHARED_LIMIT
        if only in one.name and not ("fp8" in one.name and cc < 89)
    ]
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(compile_case, work))
    if as_json:
        print(json.dumps(rows))
        return
    print("| kernel | sm | registers | spill B | shared KiB | matrix | FFMA | copies | a score |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        cells = (
            r["kernel"], r["arch"], r["registers"], r["spill_bytes"], r["shared_bytes"] >> 10,
            r["matrix_instructions"], r["fma_instructions"], r["async_copies"],
            r["loop_instructions"] or "",
        )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
