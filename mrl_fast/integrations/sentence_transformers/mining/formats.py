"""A mined data set in each of sentence-transformers' formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from mrl_fast.integrations.sentence_transformers.mining.candidates import Negatives
from mrl_fast.integrations.sentence_transformers.mining.options import Output
from mrl_fast.integrations.sentence_transformers.mining.pairs import Pairs

Scored = tuple[str, float]


class Query(NamedTuple):
    """A query with its texts and their scores."""

    text: str
    positives: list[Scored]
    negatives: list[Scored]  # best first, those that were found


def columns(pairs: Pairs, found: Negatives, output: Output) -> dict[str, list[Any]]:
    """Of a ``datasets.Dataset``, in its order."""
    names, rows_of = FORMATS[output.format]
    count = found.ids.shape[1]
    numbered = [f"negative_{i}" for i in range(1, count + 1)]
    named = [pairs.anchor_name, pairs.positive_name]
    named += numbered if output.format == "n-tuple" else names
    if output.format in ("triplet", "n-tuple"):
        named += ["scores"] * output.scores
    elif output.scores:
        named[-1] = named[-1].replace("label", "score")
    rows = [
        row
        for query in _queries(pairs, found)
        if output.format != "n-tuple" or len(query.negatives) == count
        for row in rows_of(query, output.scores)
    ]
    return {name: [row[place] for row in rows] for place, name in enumerate(named)}


def _queries(pairs: Pairs, found: Negatives) -> Iterator[Query]:
    positives: list[list[Scored]] = [[] for _ in pairs.queries]
    of_pairs = pairs.owner.tolist(), pairs.document.tolist(), found.positive_scores.tolist()
    for query, place, score in zip(*of_pairs, strict=True):
        positives[query].append((pairs.corpus[place], score))
    of_queries = found.ids.tolist(), found.scores.tolist()
    for i, (ids, scores) in enumerate(zip(*of_queries, strict=True)):
        negatives = [
            (pairs.corpus[place], score)
            for place, score in zip(ids, scores, strict=True)
            if score != -torch.inf
        ]
        yield Query(pairs.queries[i], positives[i], negatives)


def _triplets(query: Query, scored: bool) -> Iterator[tuple[Any, ...]]:
    for positive, score in query.positives:
        for negative, other in query.negatives:
            yield query.text, positive, negative, [score, other]


def _tuples(query: Query, scored: bool) -> Iterator[tuple[Any, ...]]:
    texts, others = zip(*query.negatives, strict=True)
    for positive, score in query.positives:
        yield query.text, positive, *texts, [score, *others]


def _labeled_pairs(query: Query, scored: bool) -> Iterator[tuple[Any, ...]]:
    for label, texts in ((1, query.positives), (0, query.negatives)):
        for text, score in texts:
            yield query.text, text, score if scored else label


def _labeled_lists(query: Query, scored: bool) -> Iterator[tuple[Any, ...]]:
    if query.negatives:
        texts, others = zip(*query.negatives, strict=True)
        for positive, score in query.positives:
            labels = [score, *others] if scored else [1, *[0] * len(others)]
            yield query.text, [positive, *texts], labels


# Names after those of the anchor and of the positive, without scores; rows of a query
FORMATS: dict[str, tuple[list[str], Callable[[Query, bool], Iterator[tuple[Any, ...]]]]] = {
    "triplet": (["negative"], _triplets),
    "n-tuple": ([], _tuples),
    "labeled-pair": (["label"], _labeled_pairs),
    "labeled-list": (["labels"], _labeled_lists),
}
