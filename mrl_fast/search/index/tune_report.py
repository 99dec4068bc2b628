"""What ``tune`` found, as a table and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

from mrl_fast.search.index.timing import SLOWER
from mrl_fast.shared.types import Stage, shown

Stages = list[Stage]
SLOW = f"of chains that take over {SLOWER:g} times the best's time at their cheapest"
PASSED = "between others of their chain, for want of time"
CHEAPER = "cheaper than a refused one of their chain"


class TuneRow(NamedTuple):
    """One stage list that was tried.

    Attributes:
        stages: None is exact search.
        recall: Mean over the sample.
        recall_bound: What the true mean is shown to reach.
        time_ms: Median of a call of ``batch`` queries, ms; of a list far from the fastest, of a few
            calls.
        macs, read_bytes: Of one query, as ``explain`` counts them; None of exact search, which is
            not counted beforehand.
        accepted: The bound reaches the target, as do those of all safer lists of its chain.
        pareto: No faster row has as good a recall.
    """

    stages: Stages | None
    recall: float
    recall_bound: float
    time_ms: float
    macs: int | None
    read_bytes: int | None
    accepted: bool
    pareto: bool


class Untried(NamedTuple):
    """So many lists were not tried, and why; none of them is ever chosen."""

    lists: int
    why: str

    @property
    def late(self) -> bool:
        """Whether it was for want of time."""
        return self.why not in (CHEAPER, SLOW)


@dataclass(frozen=True)
class TuneReport:
    """What ``tune`` chose, and from what; ``str`` is a table.

    Attributes:
        stages: Of the accepted lists that are as fast as the fastest the one that reads least; None
            where that is exact search.
        recall, recall_bound, time_ms: The chosen row's; ms a call of ``batch`` queries.
        k, target: As asked for; the target is the recall.
        batch: Queries a timed call.
        note: What was chosen and why.
        rows: The fastest first.
        untried: How many lists were left out, and why.
        seconds: That it took.
    """

    stages: Stages | None
    recall: float
    recall_bound: float
    time_ms: float
    k: int
    target: float
    batch: int
    note: str
    rows: tuple[TuneRow, ...]
    untried: tuple[Untried, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        head = (
            f"  {'dim:keep, dim:bits:keep':36} {'recall':6} {'at least':8} {'ms':>9} {'MMAC':>9} "
            f"{'MiB':>9}"
        )
        lines = [self.note, "", head]
        for row in self.rows:
            work = f"{'–':>9} {'–':>9}"
            if row.macs is not None and row.read_bytes is not None:
                work = f"{row.macs / 1e6:9.3f} {row.read_bytes / 2**20:9.3f}"
            mark = ">" if row.stages == self.stages else "*" if row.pareto else " "
            lines.append(
                f"{mark} {shown(row.stages):36} {row.recall:.4f} {row.recall_bound:8.4f} "
                f"{row.time_ms:9.3f} {work}" + ("" if row.accepted else "  refused")
            )
        lines.append(
            "> chosen: of the fastest that of least MiB, * Pareto-optimal; "
            "ms a call, MMAC and MiB a query"
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
