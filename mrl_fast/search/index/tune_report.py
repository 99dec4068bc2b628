"""What ``tune`` found, as a table and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

from mrl_fast.shared.types import Stage, shown

Stages = list[Stage]


class TuneRow(NamedTuple):
    """One stage list that was tried."""

    stages: Stages | None  # None is exact search
    recall: float  # mean over the sample
    recall_bound: float  # what the true mean is shown to reach
    time_ms: float  # median of a call; of a list that is far from the fastest, of a few
    macs: int  # of a query, as explain counts them
    read_bytes: int
    accepted: bool  # the bound reaches the target, as do those of all safer lists of its chain
    pareto: bool  # no faster row has as good a recall


class Untried(NamedTuple):
    """So many lists were not tried, and why; none of them is ever chosen."""

    lists: int
    why: str


@dataclass(frozen=True)
class TuneReport:
    """What ``tune`` chose, and from what; ``str`` is a table."""

    # Of the accepted lists that are as fast as the fastest the one that reads least; None where
    # that is exact search.
    stages: Stages | None
    recall: float  # this and the next two are the chosen row's
    recall_bound: float
    time_ms: float
    k: int
    target: float
    batch: int  # queries a timed call
    note: str  # what was chosen and why
    rows: tuple[TuneRow, ...]  # the fastest first
    untried: tuple[Untried, ...] = ()
    seconds: float = 0.0  # that it took

    def __str__(self) -> str:
        head = (
            f"  {'dim:keep, dim:bits:keep':36} {'recall':6} {'at least':8} {'ms':>9} {'MMAC':>9} "
            f"{'MiB':>9}"
        )
        lines = [self.note, "", head]
        for row in self.rows:
            mark = ">" if row.stages == self.stages else "*" if row.pareto else " "
            lines.append(
                f"{mark} {shown(row.stages):36} {row.recall:.4f} {row.recall_bound:8.4f} "
                f"{row.time_ms:9.3f} {row.macs / 1e6:9.3f} {row.read_bytes / 2**20:9.3f}"
                + ("" if row.accepted else "  refused")
            )
        lines.append(
            "> chosen: of the fastest the one of least MiB, * Pareto-optimal; "
            "MMAC and MiB are of one query"
        )
        lines += [
            f"not tried: {n} {'list' if n == 1 else 'lists'} {why}" for n, why in self.untried
        ]
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str]) -> None:
        """Writes recall against time as a picture; needs matplotlib (ModuleNotFoundError)."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import LogLocator
        except ModuleNotFoundError:
            message = "plot: needs matplotlib: pip install 'mrl-fast[demo]'"
            raise ModuleNotFoundError(message, name="matplotlib") from None
        figure = Figure(figsize=(7.5, 4.6), layout="tight")
        axis = figure.subplots()
        for label, style, colour, rows in [  # Okabe and Ito's colours
            ("Pareto front", "-", "#009E73", [row for row in self.rows if row.pareto]),
            ("accepted", "o", "#0072B2", [row for row in self.rows if row.accepted]),
            ("refused", "x", "#D55E00", [row for row in self.rows if not row.accepted]),
        ]:
            points = [row.time_ms for row in rows], [row.recall for row in rows]
            axis.plot(*points, style, color=colour, label=label)
        label = f"chosen: {shown(self.stages)}"
        axis.plot(self.time_ms, self.recall, "*", ms=15, mec="black", color="#F0E442", label=label)
        axis.axhline(self.target, color="black", lw=0.8, ls="--", label="target")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel(f"ms a call of {self.batch:,} {'query' if self.batch == 1 else 'queries'}")
        axis.set_ylabel(f"recall@{self.k} of exact full-width search")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
        figure.savefig(path, dpi=130)
