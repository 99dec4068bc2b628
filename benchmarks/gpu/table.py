"""The tables of a GPU run:  python -m benchmarks.gpu.table RESULTS_DIR [--readme]

Writes RESULTS_DIR/table.md from its results.json. With --readme the headline rows replace what is
between `<!-- gpu table -->` and `<!-- /gpu table -->` in README.md. Ratios that we lose are bold;
a rival that does not reach the recall or the error that is asked for is no best rival.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- gpu table -->", "<!-- /gpu table -->"
HEADER = (
    "row", "shape", "dtype", "ms (p20–p80)", "latency ms", "of the limit", "as a graph",
    "best rival", "rival ms", "×", "recall or error", "peak MiB (rival's)",
)  # fmt: skip
SHORT = ("row", "dtype", "ms", "of the limit", "best rival", "×", "recall or error")
VERSIONS = ("torch", "triton", "cuda", "driver", "python", "commit")


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def groups(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows and their ceilings, by the command that measured them."""
    runs = {run["name"]: run["found"] for run in state["runs"] if run.get("found")}
    return {name: found for name, found in runs.items() if "rows" in found}


def source(state: dict) -> str:
    known = state["environment"]
    versions = [f"{name} {known[name]}" for name in VERSIONS if known.get(name)]
    return f"{known['device']}: {', '.join(versions)}, {known['date']}"


def number(value: float | None, form: str = ".3g") -> str:
    """Three digits, and no exponent for what a reader wants to compare."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else format(value, form)


def times(row: dict) -> str:
    ratio = row["ratio"]
    if ratio is None:
        return "–"
    return f"{number(ratio)}×" if ratio >= 1 else f"**{number(ratio)}×**"


def cells(row: dict) -> Sequence[str]:
    if row["status"] != "ok":
        why = row.get("why", "").replace("\n", " ").replace("|", "/")
        rest = [f"**{row['status']}**: {why}", *[""] * (len(HEADER) - 4)]
        return (row["name"], row.get("shape", ""), row.get("dtype", ""), *rest)
    ours, graph = row["providers"]["mrl_fast"], row["providers"].get("mrl_fast_graph")
    best = row["providers"].get(row["best_rival"], {})
    fraction = [f"{number(p['fraction'])}" if p else "" for p in (ours, graph)]
    peaks = f"{number(ours.get('peak_mib'))} ({number(best.get('peak_mib'))})"
    spread = f"{number(ours['p50_ms'])} ({number(ours['p20_ms'])}–{number(ours['p80_ms'])})"
    return (
        row["name"], row["shape"], row["dtype"], spread, number(ours.get("latency_ms")), *fraction,
        row["best_rival"] or "–", number(best.get("p50_ms")), times(row), quality(row), peaks,
    )  # fmt: skip


def quality(row: dict) -> str:
    value = row["providers"]["mrl_fast"][row["quality"]]
    return f"{value:.4f}" if row["quality"] == "recall" else f"{value:.1e}"


def short(row: dict) -> Sequence[str]:
    what = f"`{row['name']}` {row.get('shape', '')}"
    if row["status"] != "ok":
        return (what, row.get("dtype", ""), f"**{row['status']}**", *[""] * (len(SHORT) - 3))
    ours = row["providers"]["mrl_fast"]
    return (
        what, row["dtype"], number(ours["p50_ms"]), number(ours["fraction"]),
        row["best_rival"] or "–", times(row), quality(row),
    )  # fmt: skip


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    made = ["| " + " | ".join(line) + " |" for line in lines]
    return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *made, ""]


def rivals(rows: Sequence[dict]) -> list[str]:
    """Everyone's time, and why some did not take part."""
    lines = []
    for row in rows:
        for name, found in row.get("providers", {}).items():
            if not name.startswith("mrl_fast") and "p50_ms" in found:
                value = found[row["quality"]]
                good = "" if found["good"] else " (not enough)"
                ratio = f"{number(found['ratio'])}×"
                lines.append(
                    (row["name"], name, number(found["p50_ms"]), ratio, f"{value:.4g}{good}")
                )
        for name, why in row.get("absent", {}).items():
            lines.append((row["name"], name, "–", "–", why.split("\n")[0].replace("|", "/")[:120]))
    header = ("row", "provider", "ms", "× ours", "recall or error")
    return table(header, lines) if lines else []


def kernels(runs: Sequence[dict]) -> list[str]:
    """How many cases each command had, and which erred how."""
    lines = []
    for run in runs:
        cases = run.get("found")
        if isinstance(cases, list):
            good = [case["error"] / case["limit"] for case in cases if case["status"] == "ok"]
            worst = f"{max(good):.3g}" if good else "–"
            lines.append((run["name"], f"{len(good)} of {len(cases)}", worst))
            for case in cases:
                if case["status"] != "ok":
                    why = case.get("why") or f"error {case.get('error', 0):.3g}"
                    lines.append((f"**{case['name']}**", case["status"], why.split("\n")[0]))
    return table(("cases", "right", "largest error, of the limit"), lines) if lines else []


def profiles(runs: Sequence[dict]) -> list[str]:
    lines = []
    for run in runs:
        if run["name"] == "profile":
            for what, events in (run.get("found") or {}).items():
                rows = [
                    (
                        f"`{e['kernel'][:80].replace('|', '/')}`",
                        number(e["us"]),
                        f"{e['launches']:g}",
                    )
                    for e in events[:15]
                ]
                lines += [f"## Kernels of {what}", ""]
                lines += table(("kernel", "µs a call", "launches"), rows)
    return lines


def full(state: dict[str, Any]) -> list[str]:
    runs = state["runs"]
    lines = [source(state), ""]
    for run in runs:
        sign = "**failed**: " if run["failed"] else ""
        seconds, code = run["seconds"], run["exit_code"]
        lines.append(f"- {sign}{run['name']}: {run['last_line']} (exit {code}, {seconds} s)")
    lines += ["", *kernels(runs)]
    for name, found in groups(state).items():
        measured = ", ".join(f"{n} {number(value)}" for n, value in found["ceilings"].items())
        lines += [f"## {name.capitalize()}", "", f"Ceilings: {measured}.", ""]
        lines += table(HEADER, map(cells, found["rows"])) + rivals(found["rows"])
    return lines + profiles(runs)


def write(folder: Path) -> None:
    (folder / "table.md").write_text("\n".join(full(load(folder))) + "\n")


def write_readme(folder: Path, readme: Path) -> None:
    """Replaces the table in the README.

    Raises:
        ValueError: The markers are not there, once each and in order.
    """
    text, state = readme.read_text(), load(folder)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme.name}: expected {BEGIN} and then {END}, once each")
    before, rest = text.split(BEGIN)
    found = [group for name, group in groups(state).items() if "compiled" not in name]
    rows = [row for group in found for row in group["rows"] if row.get("headline")]
    lines = [source(state), ""]
    lines += table(SHORT, map(short, rows))
    readme.write_text("\n".join([f"{before}{BEGIN}", *lines, END]) + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of a GPU run.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's table too")
    given = parser.parse_args()
    write(given.folder)
    if given.readme:
        write_readme(given.folder, ROOT / "README.md")


if __name__ == "__main__":
    main()
