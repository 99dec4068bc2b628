"""The tables of a benchmark run:  python -m benchmarks.report results.json

Losses, searches (beside the best full scan, then every rival), filters, the store, growth; what we
lose is bold. A rival whose recall is below 0.99 is listed, but never counts as the best.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import rivals
from benchmarks.search_data import RECALL
from benchmarks.search_rivals import FLAT

SOURCE = ("commit", "date", "device", "threads", "torch", "python")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *lines, ""]


def losses(benches: Sequence[dict]) -> list[str]:
    cases = {**rivals.CASES, **rivals.GPU_CASES}
    lines = []
    for bench in benches:
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
        lines.append(cells)
    header = (
        "case", "shape", "mrl_fast ms", "p20–p80", "best rival", "× best", "× loop", "peak MiB",
        "leanest rival MiB", "error", "loop's error", "GFLOP/s", "of one product",
    )  # fmt: skip
    return table(header, lines) if lines else []


def rivals_of(info: dict) -> list[str]:
    return [key[: -len("_ratio")] for key in info if key.endswith("_ratio")]


def times(ratio: float) -> str:
    return f"{ratio}×" if ratio >= 1 else f"**{ratio}×**"


def best_of(info: dict, names: Iterable[str]) -> str:
    """The fastest rival that gives the answer, and the median of its time over ours."""
    good = [name for name in names if info.get(f"{name}_recall", 1) >= RECALL]
    if not good:
        return "–"
    best = min(good, key=lambda name: info[f"{name}_ms"])
    return f"{best} {info[f'{best}_ms']} ms, {times(info[f'{best}_ratio'])}"


def searches(infos: Sequence[dict]) -> list[str]:
    summary, details = [], []
    for info in infos:
        names = rivals_of(info)
        row = (info["case"], info["data"], info["batch"])
        copied, multiplied = (
            f"{info[ours]} ({info[ours] / info[probe]:.2f})" if ours in info else "–"
            for ours, probe in (("read_gbps", "copy_gbps"), ("gflops", "multiply_gflops"))
        )
        touched = f"{info['rows_touched_share']:.2%}" if "rows_touched_share" in info else "–"
        summary.append(
            (
                *row, info["mrl_fast_ms"], f"{info['p20_ms']}–{info['p80_ms']}",
                f"{info['recall']:.4f}", best_of(info, [n for n in names if n in FLAT]),
                best_of(info, [n for n in names if n not in (*FLAT, "own_scan")]), touched, copied,
                multiplied,
            )
        )  # fmt: skip
        for name in names:
            recall, setting = info.get(f"{name}_recall", 1.0), info.get(f"{name}_setting", "")
            cells = (name, setting, info[f"{name}_ms"], times(info[f"{name}_ratio"]))
            details.append((*row, *cells, f"{recall:.4f}"))
    if not summary:
        return []
    what = ("search", "data", "queries")
    header = (
        *what, "mrl_fast ms", "p20–p80", "recall", "best full scan", "best other way",
        "rows touched", "GB/s (of copy)", "GFLOP/s (of one product)",
    )  # fmt: skip
    return table(header, summary) + table((*what, "rival", "setting", "ms", "×", "recall"), details)


def growth(infos: Sequence[dict]) -> list[str]:
    lines = []
    for info in infos:
        exponents = {f"{name}_ms": value for name, value in info["exponents"].items()}
        rows = []
        for entry in info["table"]:
            cells = [
                f"{entry[key]:.3g} ({entry[key.replace('_ms', '_ns_per_row')]:.3g}; "
                f"{entry[key.replace('_ms', '_ns_per_number')]:.3g})"
                for key in exponents
            ]
            share = f"{entry['rows_touched_share']:.2%}"
            rows.append((entry["rows"], entry["width"], *cells, f"{entry['recall']:.4f}", share))
        rows.append(("time ~ size^", "", *(f"{v:.2f}" for v in exponents.values()), "", ""))
        names = [key[: -len("_ms")].replace("_", ", ") for key in exponents]
        lines += [f"{info['growth']}: ms (ns a row; ns a number)", ""]
        lines += table(("rows", "columns", *names, "recall", "rows touched"), rows)
    return lines


def filters(infos: Sequence[dict]) -> list[str]:
    rows = []
    for info in infos:
        cells = [
            f"{info[f'{name}_ms']} ms, {times(info[f'{name}_ratio'])}"
            if f"{name}_ms" in info
            else "–"
            for name in ("unfiltered", "post_filter", "faiss")
        ]
        what = (info["filter"], info["data"], info["batch"], f"{info['share']:.1%}")
        spread = f"{info['p20_ms']}–{info['p80_ms']}"
        rows.append((*what, info["mrl_fast_ms"], spread, *cells, f"{info['recall']:.4f}"))
    header = (
        "search", "data", "queries", "allowed", "mrl_fast ms", "p20–p80", "unfiltered",
        "post-filtered", "FAISS flat, selector", "recall",
    )  # fmt: skip
    return table(header, rows) if rows else []


def stores(infos: Sequence[dict]) -> list[str]:
    lines = []
    for kind in ("add", "change", "save"):
        mine = [info for info in infos if info["store"] == kind]
        names = [name for name in mine[0] if name not in ("store", *SOURCE)] if mine else []
        if mine:
            lines += table((kind, *names), (("", *(i[name] for name in names)) for i in mine))
    return lines


def report(path: Path) -> list[str]:
    benches = json.loads(path.read_text())["benchmarks"]
    infos = [bench["extra_info"] for bench in benches]
    lines = losses(benches)
    lines += searches([i for i in infos if "recall" in i and "filter" not in i])
    lines += filters([info for info in infos if "filter" in info])
    lines += stores([info for info in infos if "store" in info])
    lines += growth([info for info in infos if "growth" in info])
    sources = {
        " ".join(f"{key} {info[key]}," for key in SOURCE).rstrip(",")
        for info in infos
        if "commit" in info
    }
    return [*lines, *sorted(sources)]


if __name__ == "__main__":
    print("\n".join(report(Path(sys.argv[1]))))
