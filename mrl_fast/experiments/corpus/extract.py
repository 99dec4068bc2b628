"""Docstrings and comments of Python files, which are parsed and not imported.

    python extract.py < FILES    # a JSON list of paths; a JSON list of findings a line

It runs in processes of its own, by the standard library alone, so that none of them loads torch.
"""

from __future__ import annotations

import ast
import gc
import inspect
import json
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

MARKUP = re.compile(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`_{0,2}|[`*]+|\|")
BULLET = re.compile(r"^(?:[-*•+]|\d+[.)])\s+")
END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])")
ABBREVIATED = re.compile(r"\b(?:e\.g|i\.e|etc|cf|vs|al|[A-Z])\.$")
WORD = re.compile(r"[A-Za-z]{2,}")
TITLE = re.compile(r":$|^\*{0,2}\w+(?:, \*{0,2}\w+)* : ")  # what follows, indented, is a new item
NO_PROSE = (">>>", "...", "..", "$", "#")
FEWEST_WORDS, MOST_WORDS = 3, 80
CODE = ("#!", "#:", "# -*-", "# type:", "# noqa", "# fmt:", "# pragma", "# pylint", "# mypy")


class Found(NamedTuple):
    """A docstring, or a file's comments."""

    name: str  # within its module, "Class.method"; "" where it is not public, and for comments
    summary: str  # the first sentence, if the name is public and the sentence prose; else ""
    sentences: list[str]  # all sentences, where all are asked for


def extract(source: str, *, everything: bool) -> list[Found]:
    """What a file documents, from top to bottom.

    Args:
        everything: All sentences of all docstrings, and the comments too; otherwise only the first
            sentence of what has a public name.

    Raises:
        SyntaxError, ValueError, RecursionError: It does not parse.
    """
    found = []
    for name, text in documented(ast.parse(source), "", True):
        summary = summary_of(text) if name else ""
        sentences = list(sentences_of(text)) if everything else []
        if summary or sentences:
            found.append(Found(name, summary, sentences))
    if everything:
        comments = [s for block in comments_of(source) for s in sentences_of(block)]
        found.append(Found("", "", comments))
    return found


def documented(node: ast.AST, name: str, public: bool) -> Iterator[tuple[str, str]]:
    """Name and docstring of a node and of what it defines. The name is "" where it is not public;
    nothing inside a function is."""
    assert isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    if text := ast.get_docstring(node, clean=False):
        yield name if public else "", inspect.cleandoc(text)
    inside = public and isinstance(node, (ast.Module, ast.ClassDef))
    for child in definitions(node):
        full = f"{name}.{child.name}" if name else child.name
        yield from documented(child, full, inside and not child.name.startswith("_"))


def definitions(
    node: ast.AST,
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions of a body, also those under an ``if`` or a ``try``."""
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield child
            elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                yield from definitions(child)


def comments_of(source: str) -> Iterator[str]:
    """Comments that have lines to themselves, those on neighbouring lines as one."""
    block: list[str] = []
    for line in [*source.split("\n"), ""]:
        line = line.strip()
        if line.startswith("#") and not line.startswith(CODE):
            block.append(line.lstrip("# "))
        elif block:
            yield "\n".join(block)
            block = []


def summary_of(text: str) -> str:
    """The first sentence of the first paragraph; "" where that is no prose."""
    for item in items_of(text.split("\n\n")[0]):
        sentence = split_sentences(item)[0]
        return sentence if is_prose(sentence) else ""
    return ""


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of prose, without markup."""
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.lstrip().startswith(NO_PROSE):
            for item in items_of(paragraph):
                yield from filter(is_prose, split_sentences(item))


def items_of(paragraph: str) -> Iterator[str]:
    """A paragraph as one line; a list, or a list of parameters, as a line an item. Code and rules
    are left out."""
    item: list[str] = []
    depth = 0
    for raw in paragraph.split("\n"):
        line = raw.strip()
        before, depth = depth, len(raw) - len(raw.lstrip())
        new = depth < before or (depth > before and item and TITLE.search(item[-1]))
        if item and (new or BULLET.match(line) or not WORD.search(line)):
            yield " ".join(item)
            item = []
        if WORD.search(line) and not line.startswith(NO_PROSE):
            item.append(line if item else BULLET.sub("", line))
    if item:
        yield " ".join(item)


def split_sentences(text: str) -> list[str]:
    text = MARKUP.sub(lambda match: match[1] or "", text)
    parts: list[str] = []
    for part in END.split(" ".join(text.split())):
        if parts and ABBREVIATED.search(parts[-1]):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return parts


def is_prose(sentence: str) -> bool:
    words = WORD.findall(sentence)
    letters = sum(map(len, words))
    return (
        FEWEST_WORDS <= len(words) <= MOST_WORDS
        and sentence.isascii()
        and letters >= 0.6 * len(sentence)
        and words[0] != words[0].upper()
    )


def main(everything: bool) -> None:
    gc.disable()  # a syntax tree has many objects and no cycle
    for path in json.load(sys.stdin):
        try:
            with open(path, encoding="utf-8") as file:
                found = extract(file.read(), everything=everything)
        except (SyntaxError, ValueError, RecursionError, OSError):
            found = None
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(everything="--everything" in sys.argv)
