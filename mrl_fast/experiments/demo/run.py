"""The demo's run: a corpus, two encoders, their evaluation, an index, its searches, a report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mrl_fast.experiments.common import cache_folder, principal_components
from mrl_fast.experiments.corpus import PACKAGES, Corpus, Entry, read_corpus
from mrl_fast.experiments.demo import encoder, report, saved
from mrl_fast.experiments.demo.data import DIMS, Pairs, split
from mrl_fast.experiments.demo.encoder import TextEncoder
from mrl_fast.experiments.demo.evaluate import Quality, quality
from mrl_fast.experiments.demo.search import BATCH, GRAPH_ROWS, Queries, Searched, compare

Step = Callable[[str], object]  # takes a note on what is done
SHOWN = 8  # files or packages that are named, where more were left out


class Settings(NamedTuple):
    packages: Sequence[str] | None = None  # None: those that the project pins
    sentences: bool = False  # search all sentences and comments, not names' first sentences alone
    seed: int = 0
    quick: bool = False  # a tenth of the training, a quarter of the repetitions

    @property
    def steps(self) -> int:
        return encoder.STEPS // 10 if self.quick else encoder.STEPS

    @property
    def repetitions(self) -> dict[int, int]:
        """By the number of queries a call."""
        return {1: 5, BATCH: 3} if self.quick else {1: 41, BATCH: 7}


class Done(NamedTuple):
    corpus: Corpus
    pairs: Pairs
    nested: TextEncoder
    found: dict[str, Quality]  # by vectors
    entries: list[Entry]  # the rows that are searched
    searched: Searched


def run_demo(out: Path, settings: Settings) -> None:
    """Writes ``quality.png``, ``search.png``, ``report.md``, the encoder, the index and its entries
    to ``out``, a folder that is made if missing.

    Raises:
        ValueError: A folder that is none, packages that are not installed or say too little.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got {out}, which is a file")
    console = Console()
    columns = TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        done = work(settings, progress)
    tables = [
        report.quality_table(DIMS, done.found, len(done.corpus.names), done.pairs.reported),
        report.search_table(done.searched.rows, len(done.entries)),
    ]
    for table in tables:
        console.print()
        report.print_table(console, table)
    write(out, done, tables)
    console.print(f"\nWrote quality.png, search.png, report.md, the encoder and the index to {out}")
    for line in left_out(done.corpus):
        console.print(line, highlight=False, markup=False)
    console.print(f'Now ask: mrl-fast demo --out {out} --ask "read a csv file"', highlight=False)


def work(settings: Settings, progress: Progress) -> Done:
    def task(name: str, total: int) -> Step:
        task_id = progress.add_task(name, total=total, note="")
        return lambda note="": progress.update(task_id, advance=1, note=note)

    corpus = read(settings, progress)
    pairs = split(corpus.names, seed=settings.seed)
    nested = train(pairs, DIMS, settings, task("train nested", settings.steps))
    plain = train(pairs, DIMS[-1:], settings, task("train full width", settings.steps))
    found = evaluate(pairs, nested, plain, task("evaluate every prefix", 3 * len(DIMS)))
    entries = [*corpus.names, *corpus.others]
    documents, asked = nested.encode(e.sentence for e in entries), nested.encode(pairs.asked)
    queries = Queries(asked[: pairs.reported], asked[pairs.reported :])
    steps = 2 + (len(entries) <= GRAPH_ROWS) + sum(n + 1 for n in settings.repetitions.values())
    on_step = task("index and search", steps)
    searched = compare(documents, queries, DIMS[2:], settings.repetitions, on_step)
    return Done(corpus, pairs, nested, found, entries, searched)


def read(settings: Settings, progress: Progress) -> Corpus:
    task_id = progress.add_task("read packages", total=None, note="")
    corpus = read_corpus(
        settings.packages or PACKAGES,
        everything=settings.sentences,
        cache=cache_folder(),
        on_file=lambda done, files: progress.update(task_id, completed=done, total=files),
    )
    if settings.packages and corpus.missing:
        missing = ", ".join(corpus.missing)
        raise ValueError(f"--packages: expected installed packages, got {missing}")
    note = f"{len(corpus.names):,} names"
    note += f", {len(corpus.others):,} other sentences" if settings.sentences else ""
    progress.update(task_id, completed=corpus.files, total=corpus.files, note=note)
    return corpus


def train(pairs: Pairs, dims: Sequence[int], settings: Settings, on_step: Step) -> TextEncoder:
    def show(_: TextEncoder, per_dim: Tensor) -> None:
        losses = zip((dims[0], dims[-1]), (per_dim[0], per_dim[-1]), strict=True)
        on_step("loss " + ", ".join(f"{loss:.2f} at {d}" for d, loss in dict(losses).items()))

    return encoder.train(
        *pairs.trained(), dims, steps=settings.steps, seed=settings.seed, on_step=show
    )


def evaluate(
    pairs: Pairs, nested: TextEncoder, plain: TextEncoder, on_step: Step
) -> dict[str, Quality]:
    """The quality of each kind of vectors, for the reported names over all documented sentences."""
    names, relevant = pairs.asked[: pairs.reported], pairs.held_out[: pairs.reported]
    vectors: dict[str, tuple[Tensor, ...]] = {
        "nested": (nested.encode(pairs.sentences), nested.encode(names)),
        "truncated": (plain.encode(pairs.sentences), plain.encode(names)),
    }
    vectors["PCA"] = principal_components(*vectors["truncated"])
    return {
        name: quality(queries, documents, relevant, DIMS, lambda: on_step(""))
        for name, (documents, queries) in vectors.items()
    }


def write(out: Path, done: Done, tables: Sequence[report.Cells]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        folder = Path(partial)
        report.plot_quality(folder / "quality.png", DIMS, done.found)
        report.plot_search(folder / "search.png", done.searched, len(done.entries))
        (folder / "report.md").write_text(report.markdown(tables), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            os.replace(file, out / file.name)
    saved.save(out, done.nested, done.searched.kept, done.entries)


def left_out(corpus: Corpus) -> list[str]:
    """What the corpus lacks, in sentences."""
    lines = []
    if corpus.missing:
        lines.append(f"Not installed and left out: {some(corpus.missing)}")
    if corpus.unparsed:
        lines.append(
            f"{len(corpus.unparsed)} of {corpus.files:,} files do not parse and were left out: "
            f"{some(corpus.unparsed)}"
        )
    return lines


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
