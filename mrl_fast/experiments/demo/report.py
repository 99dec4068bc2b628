"""The demo's two tables, on the screen and as Markdown, and its two plots."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from mrl_fast.experiments.demo.search import BATCH, K, Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: E402

ACCURACY_COLUMNS = ("MRL", "truncated", "PCA")
COLOURS = {"MRL": "#0072B2", "truncated": "#D55E00", "PCA": "#009E73"}  # Okabe and Ito's

Accuracies = dict[str, dict[str, list[float]]]  # measure → vectors → one a dim
Cells = tuple[str, list[str], list[list[str]]]  # title, header, rows


def accuracy_table(dims: Sequence[int], accuracies: Accuracies, data: str) -> Cells:
    header = ["dims"] + [f"{m}, {c}" for m in accuracies for c in ACCURACY_COLUMNS]
    rows = []
    for g, dim in enumerate(dims):
        cells = [f"{100 * accuracies[m][c][g]:.1f}" for m in accuracies for c in ACCURACY_COLUMNS]
        rows.append([str(dim), *cells])
    title = (
        f"Test accuracy in % on {data}: nested training (MRL), and an ordinary net's vectors, "
        "truncated or PCA'd"
    )
    return title, header, rows


def search_table(rows: Sequence[Row], data: str, count: int) -> Cells:
    header = ["search", "dim:keep", f"recall@{K}", "ms, 1", f"ms, {BATCH}", "×, 1", f"×, {BATCH}"]
    cells = [
        [
            row.name,
            row.stages,
            f"{row.recall:.4f}",
            f"{row.time_ms[1]:.3f}",
            f"{row.time_ms[BATCH]:.2f}",
            f"{row.speedup[1]:.2f}",
            f"{row.speedup[BATCH]:.2f}",
        ]
        for row in rows
    ]
    title = (
        f"Search of {count:,} {data} vectors with 1 and {BATCH} queries a call: time, and speed-up "
        "over FAISS flat at its better setting"
    )
    return title, header, cells


def print_table(console: Console, table: Cells) -> None:
    title, header, rows = table
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i == 0 or name == "dim:keep" else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def markdown(tables: Sequence[Cells]) -> str:
    lines = ["# mrl-fast demo", "", machine(), ""]
    for title, header, rows in tables:
        lines += [f"## {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().split("\n") if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    packages = ", ".join(f"{p} {version(p)}" for p in ("mrl-fast", "torch", "faiss-cpu", "numpy"))
    today = datetime.date.today().isoformat()
    return f"{model}, {torch.get_num_threads()} threads; {packages}; {today}"


def plot_accuracy(path: Path, dims: Sequence[int], accuracies: Accuracies, data: str) -> None:
    figure, axes = plt.subplots(1, len(accuracies), figsize=(10, 4.2), sharey=True)
    for axis, (measure, columns) in zip(axes, accuracies.items(), strict=True):
        for name, marker in zip(ACCURACY_COLUMNS, "osD", strict=True):
            values = [100 * v for v in columns[name]]
            label = "nested (MRL)" if name == "MRL" else f"full-width net, {name}"
            axis.plot(dims, values, marker=marker, color=COLOURS[name], label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(dims, [str(d) for d in dims])
        axis.set_xlabel("dims used")
        axis.set_title(f"{measure}, {data}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(loc="lower right")
    save(figure, path)


def plot_recall(path: Path, rows: Sequence[Row], points: Sequence[Row], data: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, batch in zip(axes, (1, BATCH), strict=True):
        by_dim: dict[str, list[Row]] = {}
        for point in points:
            by_dim.setdefault(point.stages.split(":")[0], []).append(point)
        shades = plt.get_cmap("viridis")
        for i, (dim, group) in enumerate(by_dim.items()):
            xs = [p.time_ms[batch] / batch for p in group]
            colour = shades(0.1 + 0.8 * i / max(1, len(by_dim) - 1))
            label = f"adaptive, {dim} dims first"
            axis.plot(xs, [p.recall for p in group], "o-", ms=4, color=colour, label=label)
        for row, marker in zip(rows, "^vX*PD", strict=True):
            x = row.time_ms[batch] / batch
            axis.plot(x, row.recall, marker, ms=10, mec="black", mew=0.8, ls="", label=row.name)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("ms a query")
        axis.set_title(f"{data}, {batch} {'query' if batch == 1 else 'queries'} a call")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"recall@{K} of exact full-width search")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8)
    save(figure, path, right=0.83)


def save(figure, path: Path, right: float = 1.0) -> None:
    figure.tight_layout(rect=(0, 0, right, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
