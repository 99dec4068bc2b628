"""Questions in words, answered from what a demo saved."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from mrl_fast.experiments.corpus import Entry
from mrl_fast.experiments.demo.encoder import split_words
from mrl_fast.experiments.demo.saved import Library

K = 5


class Answer(NamedTuple):
    scores: list[float]
    entries: list[Entry]
    unknown: list[str]  # words of the question that no documentation uses


def ask(library: Library, question: str) -> Answer:
    """The five entries nearest to a question.

    Raises:
        ValueError: It is empty, or has no word that the encoder knows.
    """
    words = split_words(question)
    if not words:
        raise ValueError(f"--ask: expected a question in words, got {question!r}")
    unknown = [word for word in words if word not in library.encoder.numbers]
    if len(unknown) == len(words):
        raise ValueError(
            f"--ask: expected a word that the documentation uses, got {' '.join(unknown)!r}"
        )
    scores, ids = library.index.search(library.encoder.encode([question]), K)
    rows = [row for row in ids[0].tolist() if row >= 0]
    return Answer(scores[0].tolist(), [library.entry(row) for row in rows], unknown)


def show(console: Console, answer: Answer, seconds: float) -> None:
    for score, entry in zip(answer.scores, answer.entries, strict=False):
        console.print(f"{score:.3f}  [bold]{entry.package}  {entry.name}[/bold]", highlight=False)
        console.print(Padding(escape(entry.sentence), (0, 0, 0, 7)), highlight=False)
    unknown = f"; unknown words: {', '.join(answer.unknown)}" if answer.unknown else ""
    console.print(f"{1e3 * seconds:.1f} ms{unknown}", highlight=False)


def run_ask(folder: Path, question: str | None) -> None:
    """Answers a question; without one, every line that is typed, until an empty one.

    Raises:
        ValueError: A folder that no demo wrote, or a question that cannot be answered; a typed one
            gets the message as its answer.
    """
    console = Console()
    begin = time.perf_counter()
    library = Library(folder)
    if question is not None:
        answer = ask(library, question)
        show(console, answer, time.perf_counter() - begin)  # the time to open the folder included
        return
    typed = sys.stdin.isatty()
    if typed:
        console.print(f"{len(library.index):,} sentences; an empty line ends.", highlight=False)
    while question := next_question(typed):
        try:
            begin = time.perf_counter()
            answer = ask(library, question)
            show(console, answer, time.perf_counter() - begin)
        except ValueError as error:
            console.print(str(error), highlight=False, markup=False)


def next_question(typed: bool) -> str:
    """The next question, "" after the last."""
    try:
        return input("? " if typed else "").strip()
    except EOFError:
        return ""
