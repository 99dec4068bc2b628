"""The report's figures: a panel a set, a line a method, bands of 95 % intervals over the seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from mrl_fast.experiments.reproduce.claims import Cell, Interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import NullFormatter  # noqa: E402

# Okabe and Ito's colours; a method looks the same in every figure.
LOOKS = {
    "MRL": ("#0072B2", "o", "-"),
    "MRL-E": ("#56B4E9", "s", "-"),
    "FF": ("#000000", "D", "--"),
    "SVD": ("#D55E00", "^", "-"),
    "PCA": ("#E69F00", "v", "-"),
    "MRL-LP": ("#009E73", "P", ":"),
    "truncated FF": ("#009E73", "P", ":"),
    "Rand-LP": ("#CC79A7", "X", ":"),
    "random columns": ("#CC79A7", "X", ":"),
}
SetCells = Mapping[str, Sequence[Cell]]  # by the name of the set


def draw(folder: Path, cells: SetCells) -> None:
    """Writes every figure as a PNG file."""
    figures: dict[str, tuple[str, str, Callable[[Axes, Sequence[Cell]], None]]] = {
        "linear": ("dims", "linear accuracy, %", by_dim("linear")),
        "nearest": ("dims", "1-NN accuracy, %", by_dim("nearest")),
        "retrieval": ("multiply-adds a query", "mAP@10, %", retrieval_panel),
        "adaptive": ("dims expected", "accuracy, %", adaptive_panel),
        "few_shot": ("shots a class", "nearest class mean, %", few_shot_panel),
        "structure": ("dims", "accuracy, %", structure_panel),
    }
    for name, (x_label, y_label, panel) in figures.items():
        figure, axes = plt.subplots(
            1, len(cells), figsize=(4.6 * len(cells), 4.2), squeeze=False, layout="constrained"
        )
        for axis, (task, found) in zip(axes[0], cells.items(), strict=True):
            panel(axis, found)
            axis.set_title(f"{task}, {found[0]['classes']} classes, {len(found)} seeds")
            axis.set_xlabel(x_label)
            axis.grid(alpha=0.3)
            low, high = axis.get_ylim()
            axis.set_ylim(max(low, 0), min(high, 101))
        axes[0][0].set_ylabel(y_label)
        handles: dict[str, Any] = {}  # by label: not every set has every line
        for axis in axes[0]:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        place, columns = "outside lower center", 2 * len(cells) + 1
        figure.legend(handles.values(), handles, loc=place, ncol=columns, fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)


def line(axis: Axes, xs: Sequence[float], rows: Sequence[Sequence[float]], name: str) -> None:
    """Draws the mean and the band of ``rows``: shares, one row a seed."""
    intervals = [Interval.of([100 * v for v in values]) for values in zip(*rows, strict=True)]
    colour, marker, style = LOOKS[name]
    means = [i.mean for i in intervals]
    axis.plot(xs, means, style, marker=marker, ms=5, color=colour, label=name)
    low, high = ([i.mean + sign * i.half for i in intervals] for sign in (-1, 1))
    axis.fill_between(xs, low, high, color=colour, alpha=0.2, lw=0)


def dims_axis(axis: Axes, dims: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(dims, [str(d) for d in dims])
    axis.minorticks_off()


def by_dim(measure: str) -> Callable[[Axes, Sequence[Cell]], None]:
    def panel(axis: Axes, cells: Sequence[Cell]) -> None:
        for name in cells[0][measure]:
            line(axis, cells[0]["dims"], [cell[measure][name] for cell in cells], name)
        dims_axis(axis, cells[0]["dims"])

    return panel


def retrieval_panel(axis: Axes, cells: Sequence[Cell]) -> None:
    kinds = {
        "single": ("#0072B2", "o-", "single-shot, one dim"),
        "adaptive": ("#D55E00", "^--", "adaptive: d → full width"),
        "funnel": ("#009E73", "v:", "funnel: every dim from d on"),
    }
    for kind, (colour, style, label) in kinds.items():
        places = [i for i, s in enumerate(cells[0]["searches"]) if s["kind"] == kind]
        xs = [cells[0]["searches"][i]["macs"] for i in places]
        found = [Interval.of([100 * c["searches"][i]["map"] for c in cells]) for i in places]
        means, halves = [i.mean for i in found], [i.half for i in found]
        axis.errorbar(xs, means, halves, fmt=style, ms=5, color=colour, label=label, capsize=2)
        if kind != "funnel":
            for i, x, y in zip(places, xs, means, strict=True):
                first = str(cells[0]["searches"][i]["stages"][0][0])
                offset = (0, 6) if kind == "adaptive" else (3, -11)
                axis.annotate(first, (x, y), xytext=offset, textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())


def adaptive_panel(axis: Axes, cells: Sequence[Cell]) -> None:
    dims = cells[0]["dims"]
    line(axis, dims, [cell["linear"]["FF"] for cell in cells], "FF")
    line(axis, dims, [cell["linear"]["MRL"] for cell in cells], "MRL")
    curves = [cell["adaptive"]["curve"] for cell in cells]
    mean = [
        [sum(point[key] for point in points) / len(cells) for points in zip(*curves, strict=True)]
        for key in ("dims", "accuracy")
    ]
    axis.plot(mean[0], [100 * a for a in mean[1]], "-", color="#D55E00", label="one threshold")
    for rule, marker, label in (
        ("paper", "*", "the paper's thresholds"),
        ("cheapest", "X", "calibrated for cost"),
    ):
        found = [cell["adaptive"][rule] for cell in cells]
        x, y = (Interval.of([f[key] for f in found]).mean for key in ("dims", "accuracy"))
        axis.plot(
            x, 100 * y, marker, ms=12, color="#E69F00", mec="black", mew=0.8, ls="", label=label
        )
    dims_axis(axis, dims)
    axis.set_ylim(100 * min(cell["linear"]["MRL"][0] for cell in cells) - 1, None)


def few_shot_panel(axis: Axes, cells: Sequence[Cell]) -> None:
    shots = list(cells[0]["few_shot"]["MRL"])
    xs = [int(s) for s in shots]
    dims = cells[0]["dims"]
    for name in ("MRL", "SVD", "truncated FF"):
        for g, style in ((1, ":"), (len(dims) - 1, "-")):
            rows = [[cell["few_shot"][name][s][g] for s in shots] for cell in cells]
            means = [Interval.of([100 * v for v in values]) for values in zip(*rows, strict=True)]
            colour, marker, _ = LOOKS[name]
            axis.errorbar(
                xs,
                [i.mean for i in means],
                [i.half for i in means],
                fmt=style,
                marker=marker,
                ms=5,
                color=colour,
                capsize=2,
                label=f"{name}, {dims[g]} dims",
            )
    axis.set_xticks(xs)


def structure_panel(axis: Axes, cells: Sequence[Cell]) -> None:
    dims = cells[0]["dims"]
    line(axis, dims, [cell["linear"]["MRL"] for cell in cells], "MRL")
    if "superclass" in cells[0]:
        rows = [cell["superclass"]["MRL"] for cell in cells]
        means = [100 * sum(v) / len(v) for v in zip(*rows, strict=True)]
        axis.plot(dims, means, "d--", color="#E69F00", label="MRL, superclass")
    oracle = 100 * sum(cell["oracle"] for cell in cells) / len(cells)
    axis.axhline(oracle, color="#CC79A7", ls=":", label="oracle: any prefix right")
    between = cells[0]["interpolated"]["dims"]
    for measure, colour, label in (
        ("linear", "#009E73", "probe, also untrained dims"),
        ("nearest", "#D55E00", "1-NN, also untrained dims"),
    ):
        rows = [cell["interpolated"][measure] for cell in cells]
        means = [100 * sum(v) / len(v) for v in zip(*rows, strict=True)]
        axis.plot(between, means, "-", color=colour, lw=1)
        for d, y in zip(between, means, strict=True):
            face = colour if d in dims else "white"
            axis.plot(d, y, "o", ms=5, color=colour, mfc=face)
        axis.plot([], [], "o-", ms=5, lw=1, color=colour, mfc="white", label=label)
    dims_axis(axis, dims)
