"""The report: claims, then the paper's tables and figures, as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from mrl_fast.experiments.reproduce import plots
from mrl_fast.experiments.reproduce.claims import CANNOT, CLAIMS, Interval, judge
from mrl_fast.experiments.reproduce.measure import EPISODES, SHORTLIST, TIMED_QUERIES
from mrl_fast.experiments.reproduce.plots import SetCells

METHODS = (
    "MRL trains one encoder and a head for each prefix; MRL-E one tied head; FF is an ordinary net "
    "of that width, trained anew for each. From the widest FF's vectors: SVD, its own head on "
    "their first singular directions (not trained again); PCA, a new linear probe on their "
    "principal components (not in the paper, and the strongest rival); MRL-LP, new nested heads on "
    "their first columns; Rand-LP, on random columns. 1-NN is by cosine. Every encoder has two "
    "hidden layers of 512. ± is half a 95 % interval over the seeds (Student's t): over training, "
    "holdouts and the draws of the synthetic set, but not over other test rows of the real ones. "
    "**Bold** is better than MRL by an interval of paired differences that excludes 0."
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block;
        overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: 4px 10px; text-align: right; vertical-align: top }
th { border-bottom: 2px solid #888 }
th:first-child, td:first-child, .claims td, .claims th { text-align: left }
img { max-width: 100% }
.holds { background: #e3f4e8 }
.fails { background: #fbe5e1 }
.unshown { background: #f3f3f3 }
"""
PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>mrl-fast reproduce</title><style>{style}</style></head>
<body>
{body}</body>
</html>
"""


def write(out: Path, cells: SetCells, *, quick: bool) -> Path:
    """Replaces the report in ``out`` once all of it is made."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        folder = Path(partial)
        plots.draw(folder, cells)
        text = markdown(cells, quick=quick)
        (folder / "report.md").write_text(text, encoding="utf-8")
        (folder / "report.html").write_text(html(text, folder), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            os.replace(file, out / file.name)
    return out / "report.html"


def markdown(cells: SetCells, *, quick: bool) -> str:
    sizes = "; ".join(
        f"{name} {found[0]['rows']['train']:,} + {found[0]['rows']['test']:,} rows, "
        f"{found[0]['classes']} classes, {len(found)} seeds"
        for name, found in cells.items()
    )
    machines = sorted({cell["machine"] for found in cells.values() for cell in found})
    lines = [
        "# The paper's claims, reproduced at a size that fits",
        "",
        "Matryoshka Representation Learning (Kusupati et al., NeurIPS 2022), by `mrl-fast reproduce"
        f"{' --quick' if quick else ''}`. {sizes}.",
        "",
        "Measured on " + "; and ".join(machines) + ".",
        "",
        "## Claims",
        "",
        *claims_table(cells),
        "",
        "The paper's numbers are its own, on ImageNet-1K. Cannot be shown here at all:",
        "",
        *(f"- {what}: {why}." for what, why in CANNOT.items()),
        "",
        "## What is compared",
        "",
        METHODS,
        "",
        "## Linear accuracy (the paper's Table 1)",
        "",
        "![linear accuracy by dim](linear.png)",
        *method_tables(cells, "linear"),
        "## 1-NN accuracy (the paper's Table 2)",
        "",
        "![1-NN accuracy by dim](nearest.png)",
        *method_tables(cells, "nearest"),
        "## Retrieval: single-shot, adaptive, funnel",
        "",
        "![mAP@10 by multiply-adds](retrieval.png)",
        "",
        f"Test vectors as queries, training vectors as the database; shortlists of {SHORTLIST}; ms "
        f"of a call with at most {TIMED_QUERIES:,} queries, of the first seed.",
        *search_tables(cells),
        "mAP@10 of a single-shot search, other vectors beside MRL's:",
        *method_tables(cells, "map"),
        "## Adaptive classification",
        "",
        "![accuracy by expected dims](adaptive.png)",
        *adaptive_tables(cells),
        "## Few shots",
        "",
        "![accuracy by shots](few_shot.png)",
        "",
        f"Nearest class mean of n training vectors a class, {EPISODES} draws.",
        *few_shot_tables(cells),
        "## Superclasses, the oracle, dims in between",
        "",
        "![superclass, oracle and interpolated dims](structure.png)",
        *structure_tables(cells),
    ]
    return "\n".join(lines).rstrip() + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return ["", lines[0], "|---" * len(header) + "|", *lines[1:], ""]


def claims_table(cells: SetCells) -> list[str]:
    rows = []
    for claim in CLAIMS:
        verdicts = [judge(claim, found) for found in cells.values()]
        rows.append([claim.name, claim.paper, *(f"**{v.word}**: {v.why}" for v in verdicts)])
    return table(["claim", "paper", *cells], rows)


def percent(values: Sequence[float]) -> str:
    return f"{Interval.of([100 * v for v in values]):.1f}"


def method_tables(cells: SetCells, measure: str) -> list[str]:
    """A table for each set: a row for each dim, a column for each method."""
    lines = []
    for name, found in cells.items():
        methods = list(found[0][measure])
        methods.sort(key=lambda m: list(plots.LOOKS).index(m))
        rows = []
        for g, dim in enumerate(found[0]["dims"]):
            row = [str(dim)]
            for method in methods:
                text = percent([cell[measure][method][g] for cell in found])
                gains = [c[measure][method][g] - c[measure]["MRL"][g] for c in found]
                interval = Interval.of(gains)
                row.append(f"**{text}**" if interval.mean - interval.half > 0 else text)
            rows.append(row)
        lines += ["", f"**{name}**", *table(["dims", *methods], rows)]
    return lines


def search_tables(cells: SetCells) -> list[str]:
    lines = []
    for name, found in cells.items():
        first = found[0]["searches"]
        (full,) = (
            s for s in first if s["kind"] == "single" and s["stages"][0][0] == found[0]["dims"][-1]
        )
        rows = []
        for i, search in enumerate(first):
            stages = " → ".join(f"{dim}:{keep}" for dim, keep in search["stages"])
            rows.append(
                [
                    search["kind"],
                    stages,
                    percent([cell["searches"][i]["map"] for cell in found]),
                    percent([cell["searches"][i]["top1"] for cell in found]),
                    f"{search['macs']:,}",
                    f"{full['macs'] / search['macs']:.1f}×",
                    f"{search['ms']:.1f}",
                    f"{full['ms'] / search['ms']:.1f}×",
                ]
            )
        header = [
            "search",
            "dim:keep",
            "mAP@10",
            "first right",
            "multiply-adds",
            "fewer",
            "ms",
            "faster",
        ]
        lines += ["", f"**{name}**, {found[0]['rows']['train']:,} rows", *table(header, rows)]
    return lines


def adaptive_tables(cells: SetCells) -> list[str]:
    header = ["set", "thresholds", "accuracy", "full head", "expected dims", "all heads counted"]
    rows = []
    for name, found in cells.items():
        full = percent([cell["linear"]["MRL"][-1] for cell in found])
        for rule, label in (("paper", "the paper's"), ("cheapest", "calibrated for cost")):
            each = [cell["adaptive"][rule] for cell in found]
            dims, spent = (
                f"{Interval.of([e[key] for e in each]):.1f}" for key in ("dims", "evaluated_dims")
            )
            width = found[0]["dims"][-1]
            rows.append(
                [
                    name,
                    label,
                    percent([e["accuracy"] for e in each]),
                    f"{full} at {width}",
                    dims,
                    spent,
                ]
            )
    return table(header, rows)


def few_shot_tables(cells: SetCells) -> list[str]:
    lines = []
    for name, found in cells.items():
        shots = list(found[0]["few_shot"]["MRL"])
        rows = [
            [f"{method}, {dim}"]
            + [percent([cell["few_shot"][method][s][g] for cell in found]) for s in shots]
            for method in found[0]["few_shot"]
            for g, dim in enumerate(found[0]["dims"])
        ]
        lines += [
            "",
            f"**{name}**",
            *table(["vectors, dims", *(f"{s} shots" for s in shots)], rows),
        ]
    return lines


def structure_tables(cells: SetCells) -> list[str]:
    lines = []
    for name, found in cells.items():
        oracle = percent([cell["oracle"] for cell in found])
        rows = []
        dims = found[0]["dims"]
        for i, dim in enumerate(found[0]["interpolated"]["dims"]):
            trained = dim in dims
            row = [str(dim) if trained else f"{dim} (in between)"]
            row += [
                percent([c["interpolated"][m][i] for c in found]) for m in ("linear", "nearest")
            ]
            for kind in ("MRL", "FF"):
                if not trained or "superclass" not in found[0]:
                    row.append("")
                else:
                    g = dims.index(dim)
                    row.append(percent([cell["superclass"][kind][g] for cell in found]))
            rows.append(row)
        header = ["dims", "MRL, linear probe", "MRL, 1-NN", "MRL, superclass", "FF, superclass"]
        if "superclass" not in found[0]:
            header, rows = header[:3], [row[:3] for row in rows]
        lines += ["", f"**{name}**: oracle {oracle}", *table(header, rows)]
    return lines


def html(text: str, folder: Path) -> str:
    """The Markdown report as one page that holds its figures."""
    body = MarkdownIt().enable("table").render(text)

    def inline(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([\w]+\.png)"', inline, body)
    body = body.replace("<table>", '<table class="claims">', 1)
    for word, name in (
        ("holds", "holds"),
        ("does not hold", "fails"),
        ("cannot be shown here", "unshown"),
    ):
        body = body.replace(
            f"<td><strong>{word}</strong>", f'<td class="{name}"><strong>{word}</strong>'
        )
    return PAGE.format(style=STYLE, body=body)
