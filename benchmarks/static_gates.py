"""What the compiler makes of every Triton kernel that ships, on every architecture; needs no GPU.

    python benchmarks/static_gates.py                     # the table; fails where a limit is broken
    python benchmarks/static_gates.py --write benchmarks/results/gates.md
    python benchmarks/static_gates.py --only "scan bf16 1024q" --sass build/sass
    python benchmarks/static_gates.py --short --json      # what the tests look at

static_cases.py finds the kernels; the limits are in ``failures`` here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # of one kernel on one architecture

ARCHITECTURES = 80, 90, 100
SHARED = {
    80: 164 << 10,
    90: 228 << 10,
    100: 228 << 10,
}  # bytes of an SM; a program costs 1 KiB more
REGISTERS, THREADS = 65536, 2048  # of an SM
MATRIX = {80: r"[HI]MMA", 90: r"[HIQ]GMMA|[HI]MMA", 100: r"UTC[HIQ]MMA|[HI]MMA"}
GROUPED = {80: r"(?!)", 90: r"[HIQ]GMMA", 100: r"UTC[HIQ]MMA"}  # operands in shared memory


def measured(one: Any, capability: int, keep: Path | None) -> Row:
    """Compiles a case of static_cases and reads its machine code."""
    import static_cases

    binary = static_cases.compiled(one, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "-res-usage", cubin.name)
        sass = tool("nvdisasm", "-c", cubin.name)
    if keep:
        file = str(keep / f"{one.name} sm_{capability}".replace(" ", "_"))
        Path(file + ".sass").write_text(sass)
        Path(file + ".ttgir").write_text(binary.asm["ttgir"])
    constants = one.constants
    registers, shared = counted("REG", usage), binary.metadata.shared
    warps = binary.metadata.num_warps
    row = {
        "kernel": one.name,
        "function": one.kernel.__name__,
        "arch": capability,
        "constants": {k: v if isinstance(v, (int, str)) else str(v) for k, v in constants.items()},
        "warps": warps,
        "stages": binary.metadata.num_stages,
        "registers": registers,
        "spill_bytes": counted("STACK", usage) + counted("LOCAL", usage),
        "shared_bytes": shared,
        "stage_bytes": stage_bytes(one),
        "programs": programs(capability, registers, warps, shared),
        "matrix": occurrences(MATRIX[capability], sass),
        "grouped_matrix": occurrences(GROUPED[capability], sass),
        "fma": occurrences("[FD]FMA2?", sass),
        "copies": occurrences("LDGSTS", sass),
        "narrow_copies": len(re.findall(r"\bLDGSTS(?!\S*\.128)", sass)),
        "wide_loads": len(re.findall(r"\bLDG\S*\.128", sass)),
    }
    loop = main_loop(row, sass)
    row["loop_fma"] = occurrences("[FD]FMA2?", "\n".join(loop))
    row["instructions"] = instructions(row, len(loop))
    return row


def main_loop(row: Row, sass: str) -> list[str]:
    """The innermost loop with a matrix product; with loads of rows, where there is none."""
    wanted = MATRIX[row["arch"]] if row["matrix"] else "LDG"
    loops = (loop for loop in loops_of(sass.splitlines()) if occurrences(wanted, "\n".join(loop)))
    return next(loops, [])


def loops_of(lines: list[str]) -> list[list[str]]:
    """The code from a label to a jump back to it, the shortest first."""
    labels, code, loops = {}, [], []
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(code)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            code.append(line)
            jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
            if jump and jump[1] in labels:
                loops.append(code[labels[jump[1]] :])
    return sorted(loops, key=len)


def instructions(row: Row, length: int) -> float | None:
    """Of one lane in the main loop: a score of a scan, a column of a row elsewhere."""
    c = row["constants"]
    if row["kernel"].startswith("scan"):  # of several blocks of columns, the last alone has it all
        units = c["BLOCK_B"] * c["BLOCK_N"] if c["WHOLE"] else 0
    else:
        units = 64 * c.get("ROWS", 0) * c.get("BLOCKS", 0)
    return round(length * row["warps"] * 32 / units, 2) if units and length else None


def stage_bytes(one: Any) -> int:
    """What a block of columns of both operands takes in shared memory; 0 without a product."""
    blocks = one.constants
    if "BLOCK_B" not in blocks:
        return 0
    rows = blocks["BLOCK_B"] + blocks.get("BLOCK_V", blocks.get("BLOCK_N"))
    if blocks.get("WHOLE"):
        rows = blocks["BLOCK_N"]  # the queries are loaded once
    return rows * blocks["BLOCK_D"] * one.arguments["x_ptr"].element_size()


def programs(capability: int, registers: int, warps: int, shared: int) -> int:
    """That an SM can hold at a time."""
    of_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(of_registers, THREADS // (32 * warps), SHARED[capability] // (shared + 1024))


def counted(resource: str, usage: str) -> int:
    return int(re.findall(rf"\b{resource}:(\d+)", usage)[0])


def occurrences(instruction: str, sass: str) -> int:
    return len(re.findall(rf"\b(?:{instruction})\b", sass))


def tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def failures(row: Row) -> list[str]:
    return []


def in_short(kernel: str, arch: int) -> bool:
    """Beside the first kernel of each kind: the scans that most depends on."""
    plain = re.fullmatch(r"scan .* 1024q (32|64|128)d", kernel)
    return bool(plain or arch == 90 and re.match(r"scan bf16 .*\b64d\b", kernel))


WORK: list[tuple[Any, int, Path | None]] = []  # before processes are forked: cases are not pickled


def work_on(i: int) -> Row:
    return measured(*WORK[i])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles every Triton kernel that ships.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--short", action="store_true", help="one of each kind, in a minute")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="where disassembly is kept")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the table goes")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: this compiles
    import static_cases
    from triton import knobs

    if options.sass:
        options.sass.mkdir(parents=True, exist_ok=True)
    kinds = set()
    for one in static_cases.cases():
        for cc in ARCHITECTURES:
            wanted = not options.short or one.kind not in kinds or in_short(one.name, cc)
            if wanted and options.only in one.name and not (cc < 89 and " fp8 " in one.name):
                WORK.append((one, cc, options.sass))
        kinds.add(one.kind)
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
            rows = pool.map(work_on, range(len(WORK)), chunksize=1)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
