"""The tables of a GPU run:  python -m benchmarks.gpu.table RESULTS_DIR [--readme]

Writes RESULTS_DIR/table.md from its part*.json. With --readme the headline rows replace what is
between `<!-- gpu table -->` and `<!-- /gpu table -->` in README.md. Ratios that we lose are bold;
a rival that does not reach the recall or the error that is asked for is no best rival.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- gpu table -->", "<!-- /gpu table -->"
TITLES = {3: "Search kernels", 4: "An index on the device", 5: "Training"}
HEADER = (
    "row", "shape", "dtype", "ms (p20–p80)", "latency ms", "of the limit", "as a graph",
    "best rival", "rival ms", "×", "recall or error", "peak MiB (rival's)",
)  # fmt: skip
SHORT = ("row", "dtype", "ms", "of the limit", "best rival", "×", "recall or error")
VERSIONS = ("torch", "triton", "cuda", "driver", "python", "commit")


def load(folder: Path) -> dict[int, dict]:
    parts = {n: folder / f"part{n}.json" for n in range(1, 6)}
    return {n: json.loads(file.read_text()) for n, file in parts.items() if file.exists()}


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


def full(parts: dict[int, dict]) -> list[str]:
    lines = [*dict.fromkeys(f"{source(state)}  " for state in parts.values()), ""]
    for part in (1, 2):
        for run in parts.get(part, {}).get("runs", []):
            lines += [f"- `{run['command']}`: {run['last_line']} (exit {run['exit_code']})"]
    lines.append("")
    for part, title in TITLES.items():
        if part not in parts:
            continue
        rows, ceilings = parts[part]["rows"], parts[part]["ceilings"]
        measured = ", ".join(f"{name} {number(value)}" for name, value in ceilings.items())
        lines += [f"## {title}", "", f"Ceilings: {measured}.", ""]
        lines += table(HEADER, map(cells, rows)) + rivals(rows)
    return lines


def write(folder: Path) -> None:
    (folder / "table.md").write_text("\n".join(full(load(folder))) + "\n")


def write_readme(folder: Path, readme: Path) -> None:
    """Raises:
    ValueError: The markers are not there, once each and in order.
    """
    text, parts = readme.read_text(), load(folder)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme.name}: expected {BEGIN} and then {END}, once each")
    before, rest = text.split(BEGIN)
    rows = [row for n in TITLES for row in parts.get(n, {}).get("rows", []) if row.get("headline")]
    lines = [*dict.fromkeys(source(state) for state in parts.values()), ""]
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
