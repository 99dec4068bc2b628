"""What the spread-out regulariser does to a static encoder: its ranking, and what signs find of it.

    python -m benchmarks.cpu.spread_out docs glosses --weights 0 100 --out FILE.md

Encoders as those of benchmarks/vector_sets.py, of 256 columns and five prefixes. Of each: MRR@10 of
texts that were held out, and, by the signs of the first 64, 128 and 256 columns, the share of the
exact ten by all columns that is among the best 50. Mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.vector_sets import corpus, gloss_texts
from mrl_fast import MatryoshkaIndex, SpreadOut
from mrl_fast.evaluate import Qrels, judged
from mrl_fast.experiments.demo import encoder
from mrl_fast.experiments.demo.data import DIMS, split

SHORTLIST, K = 50, 10
BY_SIGNS = (64, 128, 256)
STEPS = {"docs": 150, "glosses": 250}
Texts = tuple[tuple[list[str], list[str]], list[str], list[str], list[list[int]]]


def docs() -> Texts:
    """Pairs to learn from; what is asked, what is searched, and the places that answer."""
    pairs = split(corpus().names)
    return pairs.trained(), pairs.asked, pairs.sentences, [[place] for place in pairs.held_out]


def glosses() -> Texts:
    texts = gloss_texts()
    searched = list(dict.fromkeys(gloss for _, gloss in texts.pairs))
    places = {gloss: i for i, gloss in enumerate(searched)}
    answers: dict[str, set[int]] = {word: set() for word in texts.asked}
    for word, gloss in texts.pairs:
        if word in answers:
            answers[word].add(places[gloss])
    return texts.taught(), texts.asked, searched, [sorted(answers[w]) for w in texts.asked]


def measures(model: encoder.TextEncoder, texts: Texts) -> list[float]:
    """MRR@10, then what signs find, in the order of BY_SIGNS."""
    _, asked, searched, answers = texts
    bags = model.bags(asked)
    rows = bags.known().nonzero().ravel()
    queries = F.normalize(model.encode(bags.select(rows)))
    index = MatryoshkaIndex(DIMS, metric="cosine", codes="bits")
    index.add(F.normalize(model.encode(searched)))
    exact = index.search(queries, K, exact=True).ids
    pairs = [(i, place) for i, row in enumerate(rows.tolist()) for place in answers[row]]
    query, place = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    found = [judged(exact, Qrels(query, place, torch.ones_like(query))).mrr]
    for dim in BY_SIGNS:
        stages = [(dim, 1, SHORTLIST), (DIMS[-1], K)]
        ids: Tensor = index.search(queries, K, stages=stages).ids
        found.append((ids[:, :, None] == exact[:, None, :]).any(1).double().mean().item())
    return found


def row(name: str, weight: float, results: Sequence[Sequence[float]]) -> str:
    cells = [name, f"{weight:g}", str(len(results))]
    for values in zip(*results, strict=True):
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.4f}{spread}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="What spreading embeddings out does to them.")
    parser.add_argument("sets", nargs="+", choices=("docs", "glosses"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=encoder.BATCH)
    parser.add_argument("--steps", type=int, help="default: 150 of docs, 250 of glosses")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 100.0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    header = ["set", "weight", "seeds", "MRR@10", *(f"by signs of {d}" for d in BY_SIGNS)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in options.sets:
        texts = {"docs": docs, "glosses": glosses}[name]()
        results: dict[float, list[list[float]]] = {weight: [] for weight in options.weights}
        for seed in range(options.seeds):
            for weight, found in results.items():
                spread = SpreadOut(weight, weight) if weight else None
                model = encoder.train(
                    *texts[0], DIMS,
                    steps=options.steps or STEPS[name], batch=options.batch, seed=seed,
                    spread_out=spread,
                )  # fmt: skip
                found.append(measures(model, texts))
                print(name, seed, weight, *(f"{value:.4f}" for value in found[-1]), flush=True)
        lines += [row(name, weight, found) for weight, found in results.items()]
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.write_text(table)


if __name__ == "__main__":
    main()
