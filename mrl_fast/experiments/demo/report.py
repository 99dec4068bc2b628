"""The demo's two tables, on the screen and as Markdown, and its two plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mrl_fast.experiments.common import machine
from mrl_fast.experiments.demo.evaluate import Quality
from mrl_fast.experiments.demo.search import BATCH, FLAT, K, Row, Searched

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: E402

LABELS = {
    "nested": "nested training",
    "truncated": "full-width training, truncated",
    "PCA": "full-width training, PCA",
}
COLOURS = {"nested": "#0072B2", "truncated": "#D55E00", "PCA": "#009E73"}  # Okabe and Ito's
LEFT = ("search", "setting")  # columns of text
LEAST_RECALL = 0.8  # points below it are not drawn

Cells = tuple[str, list[str], list[list[str]]]  # title, header, rows


def quality_table(dims: Sequence[int], found: dict[str, Quality], names: int, asked: int) -> Cells:
    measures = list(found["nested"])
    header = ["dims"] + [f"{m} {vectors}" for m in measures for vectors in found]
    rows = [
        [str(dim)] + [f"{found[vectors][m][g]:.3f}" for m in measures for vectors in found]
        for g, dim in enumerate(dims)
    ]
    title = (
        f"{asked:,} names that no training saw, each asking for its sentence among {names:,}: "
        "nested training, and full-width training truncated or PCA'd"
    )
    return title, header, rows


def search_table(rows: Sequence[Row], count: int) -> Cells:
    header = ["search", "setting", "recall"]
    header += ["ms, 1", f"ms, {BATCH}", "×, 1", f"×, {BATCH}", "build s"]
    cells = [
        [
            row.name,
            row.setting,
            f"{row.recall:.4f}",
            f"{row.time_ms[1]:.3f}",
            f"{row.time_ms[BATCH]:.1f}",
            f"{row.speedup[1]:.2f}",
            f"{row.speedup[BATCH]:.2f}",
            f"{row.build_s:.2f}",
        ]
        for row in rows
    ]
    title = (
        f"Search of {count:,} sentences with 1 and {BATCH} names a call: recall@{K}, time, and "
        "speed-up over the best flat rival"
    )
    return title, header, cells


def print_table(console: Console, table: Cells) -> None:
    title, header, rows = table
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for name in header:
        shown.add_column(name, justify="left" if name in LEFT else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def markdown(tables: Sequence[Cells]) -> str:
    lines = ["# mrl-fast demo", "", machine(), ""]
    for title, header, rows in tables:
        lines += [f"## {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def plot_quality(path: Path, dims: Sequence[int], found: dict[str, Quality]) -> None:
    measures = list(found["nested"])
    figure, axes = plt.subplots(1, len(measures), figsize=(10, 4.2))
    for axis, measure in zip(axes, measures, strict=True):
        for (name, values), marker in zip(found.items(), "osD", strict=True):
            axis.plot(dims, values[measure], marker=marker, color=COLOURS[name], label=LABELS[name])
        axis.set_xscale("log", base=2)
        axis.set_xticks(dims, [str(d) for d in dims])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("dims used")
        axis.set_ylabel(measure)
        axis.set_title(f"names that find their sentence, {measure}")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    save(figure, path)


def plot_search(path: Path, searched: Searched, count: int) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    curves: dict[str, list[Row]] = {}
    for point in searched.points:
        curves.setdefault(point.name, []).append(point)
    for axis, batch in zip(axes, (1, BATCH), strict=True):
        for (name, group), colour in zip(curves.items(), COLOURS.values(), strict=False):
            good = [p for p in group if p.recall >= LEAST_RECALL]
            xs, ys = [p.time_ms[batch] / batch for p in good], [p.recall for p in good]
            axis.plot(xs, ys, "o-", ms=4, color=colour, label=name)
        single = [row for row in searched.rows if row.name not in curves]
        for row, marker in zip(single, "^<X*", strict=True):
            size, shade = (9, "#999999") if row.name in FLAT else (13, "#F0E442")
            style = {"ms": size, "mfc": shade, "mec": "black", "mew": 0.8, "ls": ""}
            axis.plot(row.time_ms[batch] / batch, row.recall, marker, label=row.name, **style)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("ms a query (less is better)")
        queries = "1 query" if batch == 1 else f"{batch} queries"
        axis.set_title(f"{count:,} sentences, {queries} a call")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"recall@{K} of exact full-width search")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8)
    save(figure, path, right=0.8)


def save(figure, path: Path, right: float = 1.0) -> None:
    figure.tight_layout(rect=(0, 0, right, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
