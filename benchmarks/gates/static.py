"""What the compiler makes of every Triton kernel that ships, on every architecture; needs no GPU.

    python -m benchmarks.gates.static                     # the table; fails where a limit is broken
    python -m benchmarks.gates.static --write benchmarks/results/gates.md
    python -m benchmarks.gates.static --only "scan bf16 1024q" --sass build/sass
    python -m benchmarks.gates.static --short --json      # what the tests look at

cases.py finds the kernels; the limits are in ``failures`` here. All are compiled in about
an hour of one core; with ``--cache`` what did not change is not compiled again.
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
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # of one kernel on one architecture

ARCHITECTURES = 80, 90, 100
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes of an SM
REGISTERS, THREADS = 65536, 2048  # of an SM
MATRIX = {80: r"[HI]MMA", 90: r"[HIQ]GMMA|[HI]MMA", 100: r"UTC[HIQ]MMA|[HI]MMA"}
GROUPED = {80: r"(?!)", 90: r"[HIQ]GMMA", 100: r"UTC[HIQ]MMA"}  # operands in shared memory
BLOCKS = ("BLOCK_B", "BLOCK_N", "BLOCK_V", "BLOCK_D", "ROWS", "BLOCKS", "KEPT", "C", "BLOCK_C")

# The most instructions of the main loop on sm_90: a target for half precision, else 5 % more than
# was measured.
INSTRUCTIONS = {
    "scan bf16 1024q 64d": 5.0,
    "scan fp16 1024q 64d": 5.0,
    **{
        kernel: 1.05 * measured
        for kernel, measured in {
            "scan int8 1024q 128d": 5.06,
            "scan int8 512q 128d scale 2 outers": 8.49,
            "scan int8 512q 128d scale 3 outers": 9.61,
            "scan fp8 1024q 128d": 6.67,
            "scan fp32 tf32 1024q 32d": 3.5,
            "scan fp32 tf32x3 1024q 32d": 9.89,
            "scan bf16 1024q 64d scale": 4.15,
            "scan bf16 1024q 64d term": 4.07,
            "scan bf16 64q 64d norms of ip": 8.14,
            "scan bf16 16q 64d norms of ip": 23.5,
            "pairs buckets bf16 64d tile 128 ip": 5.56,
            "pairs buckets fp16 64d tile 128 ip": 4.94,
            "pairs buckets fp32 64d tile 128 ip": 5.88,
            "pairs buckets int8 128d tile 128 ip": 5.12,
            "pairs buckets fp8 128d tile 64 ip": 5.55,
        }.items()
    },
}


def measured(one: Any, capability: int, keep: Path | None) -> Row:
    """Compiles a case of ``cases`` and reads its machine code."""
    from benchmarks.gates import cases

    binary = cases.compiled(one, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "-res-usage", cubin.name)
        sass = tool("nvdisasm", "-c", cubin.name)
    if keep:
        file = str(keep / f"{one.name} sm_{capability}".replace(" ", "_"))
        Path(file + ".sass").write_text(sass)
        Path(file + ".ttgir").write_text(binary.asm["ttgir"])
    registers, shared = counted("REG", usage), binary.metadata.shared
    warps = binary.metadata.num_warps
    row = {
        "kernel": one.name,
        "kind": one.kind,
        "function": one.kernel.__name__,
        "arch": capability,
        "constants": constants_of(one),
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
    row["loop_spills"] = occurrences("STL|LDL", "\n".join(loop))
    row["instructions"] = instructions(row, len(loop))
    return row


def constants_of(one: Any) -> dict[str, Any]:
    return {k: v if isinstance(v, (int, str)) else str(v) for k, v in one.constants.items()}


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
    """One lane's instructions in the main loop: for a score of a scan, else a column of a row."""
    c = row["constants"]
    if row["kernel"].startswith("scan"):  # of several blocks of columns, the last alone has it all
        units = c["BLOCK_B"] * c["BLOCK_N"] if c["WHOLE"] else 0
    else:
        units = 64 * c.get("ROWS", 0) * c.get("BLOCKS", 0)
    return round(length * row["warps"] * 32 / units, 2) if units and length else None


def stage_bytes(one: Any) -> int:
    """Bytes of shared memory for a block of columns of both operands; 0 without a product."""
    blocks = one.constants
    if "BLOCK_B" not in blocks:
        return 0
    rows = blocks["BLOCK_B"] + blocks.get("BLOCK_V", blocks.get("BLOCK_N"))
    if blocks.get("WHOLE"):
        rows = blocks["BLOCK_N"]  # the queries are loaded once
    return rows * blocks["BLOCK_D"] * one.arguments["x_ptr"].element_size()


def programs(capability: int, registers: int, warps: int, shared: int) -> int:
    """How many programs an SM can hold at a time."""
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
    """The limits that a kernel breaks."""
    c, kernel, arch = row["constants"], row["kernel"], row["arch"]
    family, *words = kernel.split()
    pairs, scan = family in ("pairs", "rescan"), family == "scan"
    aligned = "unaligned" not in words
    exact = "ieee" in words and "fp32" in words  # by multiply-adds, which no tensor core has
    product = "BLOCK_B" in c
    held = row["programs"] * row["warps"]
    # asynchronous copies have at least 4 bytes
    looped = product and (aligned or "fp32" in words)
    grouped = scan and arch >= 90 and c["BLOCK_B"] >= 64
    grouped &= not (arch == 100 and "int8" in words)  # Triton has no such product there
    rules = {
        f"spills {row['spill_bytes']} bytes": row["spill_bytes"] > 0,
        "spills in its loop": row["loop_spills"] > 0,
        "takes more shared memory than a program may": row["shared_bytes"] > SHARED[arch] - 1024,
        # two blocks in flight; asynchronous copies alone may be of one that is waited for
        "loads no block during a product": looped and row["shared_bytes"] < 2 * row["stage_bytes"],
        "has no matrix product": product and not exact and not row["matrix"],
        "copies nothing asynchronously": looped and not exact and not row["copies"],
        "has a rounded matrix product": (exact or not product) and row["matrix"] > 0,
        "makes no multiply-adds": exact and not row["fma"],
        "uses small matrix products": grouped and not row["grouped_matrix"],
        # what a seeding scan reads of its last rows' vectors may come one by one
        "copies fewer than 16 bytes at a time": (
            scan and aligned and not c["DENSE"] and row["narrow_copies"] > 0
        ),
        "loads fewer than 16 bytes at a time": pairs and aligned and not row["wide_loads"],
        # rounded one by one, sums do not depend on the kernel; square roots and quotients are
        # correctly rounded by multiply-adds of their own
        "fuses products and sums of a row": pairs and row["loop_fma"] > 0,
        "fuses products and sums": pairs and "cosine" not in words and row["fma"] > 0,
        f"leaves an SM {held} warps": scan and held < 8,
        f"takes {row['instructions']} instructions": arch == 90
        and (row["instructions"] or 0.0) > INSTRUCTIONS.get(kernel, 1e9),
    }
    return [f"{kernel} sm_{arch} {what}" for what, broken in rules.items() if broken]


HEAD = """# What the compiler makes of the kernels

`python -m benchmarks.gates.static --write benchmarks/results/gates.md` writes this; of {date},
Triton {version}, {count} kernels{extent}. No GPU was used, and nothing here is a time.
Numbers are of sm_80, sm_90 and sm_100, in this order (fp8 does not exist on sm_80); where there is
one, of all. A line is of all kernels of a kind that have the same blocks, from the least number to
the largest; `--json` lists each kernel. Sizes are multiples of 16, but for those named unaligned.

## In short

- {count} kernels, {binaries} binaries, {broken}.
- Spills: {spills}.
- Exception: rows of bf16, fp16, fp8 and int8 whose stride is no multiple of 16 (unaligned) are
  loaded while nothing is multiplied, for no asynchronous copy is of fewer than 4 bytes.
- Instructions a score or column (see loop, below) on sm_90, for which there is a limit:

{counted}

## What the columns are

- kernels: of the kind, and how many.
- blocks: of a program ({blocks}:
  those that a kernel has); its warps and stages.
- registers: of a thread. shared: KiB of a program.
- warps an SM: how many it holds at a time, by registers, threads and shared memory.
- matrix: matrix instructions; g: their operands are read from shared memory (wgmma, tcgen05).
- FMA: fused multiply-adds, fp32 and fp64. In pairs and rescans those of correctly rounded square
  roots and quotients only; none is in the loop over a row's columns.
- copies: asynchronous ones to shared memory; *: some are of fewer than 16 bytes.
- wide: loads of 16 bytes to registers.
- loop: lane instructions of the innermost loop with a matrix product, every branch counted (that of
  a hit too, which is seldom taken) · 32 · warps / (BLOCK_B · BLOCK_N): those a score. Empty where
  a row's columns are several blocks: the loop is of one, its comparisons of the last only. Of pairs
  and rescans: of the loop over a row's columns / (ROWS · 64 · BLOCKS), those a column. At the full
  bandwidth of its memory, an H100 has time for 35 of fp32, 18 of bf16, 9 of int8.

| kernels | blocks | registers | shared | warps an SM | matrix | FMA | copies | wide | loop |
|---|---|---|---|---|---|---|---|---|---|
"""


def table(rows: list[Row], extent: str) -> str:
    import triton

    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike.setdefault((row["kind"], blocks_of(row)), []).append(row)
    broken = [f for row in rows for f in failures(row)]
    spilling = [row for row in rows if row["spill_bytes"]]
    most = max((row["spill_bytes"] for row in spilling), default=0)
    limited = [row for row in rows if row["arch"] == 90 and row["kernel"] in INSTRUCTIONS]
    head = HEAD.format(
        date=date.today(),
        version=triton.__version__,
        count=len({row["kernel"] for row in rows}),
        binaries=len(rows),
        extent=extent,
        broken="\n  - ".join([f"{len(broken)} failures:" if broken else "no failures", *broken]),
        spills=f"{len(spilling)} binaries, {most} bytes at most" if spilling else "none",
        counted="\n".join(
            f"  - {r['kernel']}: {r['instructions']} of {INSTRUCTIONS[r['kernel']]:.2f}"
            for r in limited
        ),
        blocks=", ".join(BLOCKS),
    )
    return head + "".join(line(kind, these) for (kind, _), these in alike.items())


def blocks_of(row: Row) -> str:
    return "×".join(str(row["constants"][name]) for name in BLOCKS if name in row["constants"])


def line(kind: str, rows: list[Row]) -> str:
    """The table's line for all kernels of a kind with the same blocks."""

    def each(value: Callable[[Row], Any], mark: str = "", marked: str = "") -> str:
        cells = []
        for arch in sorted({row["arch"] for row in rows}):
            these = [row for row in rows if row["arch"] == arch]
            numbers = sorted({v for row in these if (v := value(row)) is not None})
            text = "–".join(str(n) for n in numbers[:1] + numbers[1:][-1:])
            cells.append(text + mark * any(row[marked] for row in these if mark))
        return cells[0] if len(set(cells)) == 1 else " / ".join(cells)

    cells = (
        f"{kind}: {len({row['kernel'] for row in rows})}",
        f"{blocks_of(rows[0])}, {each(lambda r: r['warps'])} warps, "
        f"{each(lambda r: r['stages'])} stages",
        each(lambda r: r["registers"]),
        each(lambda r: r["shared_bytes"] >> 10),
        each(lambda r: r["programs"] * r["warps"]),
        each(lambda r: r["matrix"], "g", "grouped_matrix"),
        each(lambda r: r["fma"]),
        each(lambda r: r["copies"], "*", "narrow_copies"),
        each(lambda r: r["wide_loads"]),
        each(lambda r: r["instructions"]),
    )
    return "| " + " | ".join(cells) + " |\n"


def in_short(kernel: str, arch: int) -> bool:
    """Whether a kernel is one of the scans that most depends on, and so part of the short form."""
    plain = re.fullmatch(r"scan .* 1024q (32|64|128)d", kernel)
    half = re.match(r"scan bf16 .*\b64d\b", kernel) and "dense" not in kernel
    codes = re.fullmatch(r"scan int8 512q 128d scale \d outers", kernel)
    return kernel == "scan bf16 1024q 64d" or arch == 90 and bool(plain or half or codes)


WORK: list[tuple[Any, int, Path | None]] = []  # before processes are forked: cases are not pickled


def work_on(i: int) -> Row:
    try:
        return measured(*WORK[i])
    except Exception as error:
        one, capability, _ = WORK[i]
        raise RuntimeError(f"{one.name} for sm_{capability} does not compile") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles every Triton kernel that ships.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="kernels whose name contains one of these"
    )
    parser.add_argument("--short", action="store_true", help="one of each kind, in a minute")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--list", action="store_true", help="JSON of what there is to compile")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="where disassembly is kept")
    parser.add_argument("--cache", metavar="DIR", help="where binaries are kept for the next run")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the table goes")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: this compiles
    from triton import knobs

    from benchmarks.gates import cases

    if options.list:
        listed = [(one.kernel.__name__, constants_of(one)) for one in cases.cases(90)]
        print(json.dumps(listed))
        return
    if options.sass:
        options.sass.mkdir(parents=True, exist_ok=True)
    for cc in options.arch:
        kinds = set()
        for one in cases.cases(cc):
            wanted = not options.short or one.kind not in kinds or in_short(one.name, cc)
            if (
                wanted
                and any(part in one.name for part in options.only)
                and not (cc < 89 and " fp8" in one.name)
            ):
                WORK.append((one, cc, options.sass))
            kinds.add(one.kind)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = options.cache or cache
        with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
            for row in pool.imap(work_on, range(len(WORK))):
                rows.append(row)
                if sys.stderr.isatty():
                    print(f"\r{len(rows)} of {len(WORK)}", end="", file=sys.stderr)
    broken = [what for row in rows for what in failures(row)]
    if options.json:
        print(json.dumps(rows))
    else:
        text = table(rows, " (one of each kind)" if options.short else "")
        options.write.write_text(text) if options.write else print(text)
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
