"""The losses' table, from a benchmark run:  python benchmarks/report.py results.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import rivals

SOURCE = ("commit", "date", "device", "threads", "torch", "python")


def rows(path: Path) -> list[str]:
    cases = {**rivals.CASES, **rivals.GPU_CASES}
    lines = [
        "| case | shape | mrl_fast ms | p20–p80 | best rival | × best | × loop | peak MiB | "
        "leanest rival MiB | error | loop's error | GFLOP/s | of one product |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    sources: set[str] = set()
    for bench in json.loads(path.read_text())["benchmarks"]:
        name, info = bench["param"], bench["extra_info"]
        if name not in cases:
            continue
        case = cases[name]
        kept = [k[: -len("_peak_mib")] for k in info if k.endswith("_peak_mib")]
        leanest = min((k for k in kept if k != "mrl_fast"), key=lambda k: info[f"{k}_peak_mib"])
        naive = "loop" if "loop_ratio" in info else "sentence_transformers"
        shape = f"{case.rows} × {case.classes}, dims {case.dims[0]}…{case.dims[-1]}"
        efficiency = info["gflops"] / info["multiply_gflops"]
        cells = (
            name, f"{shape} ({len(case.dims)})", info["mrl_fast_ms"],
            f"{info['p20_ms']}–{info['p80_ms']}", info["best_rival"],
            info[f"{info['best_rival']}_ratio"], info[f"{naive}_ratio"], info["mrl_fast_peak_mib"],
            f"{info[f'{leanest}_peak_mib']} ({leanest})", info["mrl_fast_error"],
            info[f"{naive}_error"], info["gflops"], f"{efficiency:.2f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        sources.add(" ".join(f"{key} {info[key]}," for key in SOURCE).rstrip(","))
    return [*lines, "", *sorted(sources)]


if __name__ == "__main__":
    print("\n".join(rows(Path(sys.argv[1]))))
