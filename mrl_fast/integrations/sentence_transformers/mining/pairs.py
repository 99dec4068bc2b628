"""A data set of (anchor, positive) rows as distinct queries and distinct texts of a corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Rows of equal anchors are one query with several positives; its pairs lie side by side."""

    anchor_name: str
    positive_name: str
    queries: list[str]  # distinct, in the order of their first rows
    corpus: list[str]  # distinct: the corpus, then positives that are not in it
    owner: Tensor  # [P] int64, ascending: the query of each distinct pair
    document: Tensor  # [P] int64: its positive's place in the corpus
    most: int  # rows of one query

    @property
    def keys(self) -> Tensor:
        """``[P]`` int64, one number a pair."""
        return self.owner * len(self.corpus) + self.document


def read_pairs(
    dataset: Any, anchor: str | None, positive: str | None, corpus: Iterable[str] | None
) -> Pairs:
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list):
        raise TypeError(f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
    anchor = _column(anchor, "anchor_column_name", columns, 0)
    positive = _column(positive, "positive_column_name", columns, 1)
    if anchor == positive:
        raise ValueError(f"positive_column_name: expected another than the anchors', {anchor!r}")
    anchors, positives = (_texts(dataset[c], f"dataset[{c!r}]") for c in (anchor, positive))
    if not anchors:
        raise ValueError("dataset: expected at least one row, got none")
    if isinstance(corpus, str):
        raise TypeError("corpus: expected a sequence of texts, got a str")
    listed = [] if corpus is None else _texts(corpus, "corpus")
    places = _places([*listed, *positives])
    of_query = _places(anchors)
    documents: list[dict[int, None]] = [{} for _ in of_query]  # in the order of rows
    for query, text in zip(anchors, positives, strict=True):
        documents[of_query[query]][places[text]] = None
    owner = [i for i, found in enumerate(documents) for _ in found]
    document = [place for found in documents for place in found]
    return Pairs(
        anchor, positive, [*of_query], [*places],
        torch.tensor(owner, dtype=torch.int64, device="cpu"),
        torch.tensor(document, dtype=torch.int64, device="cpu"),
        max(Counter(anchors).values()),
    )  # fmt: skip


def _places(texts: Iterable[str]) -> dict[str, int]:
    return {text: i for i, text in enumerate(dict.fromkeys(texts))}


def _column(name: str | None, argument: str, columns: list[str], place: int) -> str:
    if name is None:
        if len(columns) <= place:
            raise ValueError(f"dataset: expected at least two columns, got {columns}")
        return columns[place]
    if name not in columns:
        raise ValueError(f"{argument}: expected one of {columns}, got {name!r}")
    return name


def _texts(values: Iterable[Any], name: str) -> list[str]:
    texts = list(values)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}]: expected a str, got {type(text).__name__}")
    return texts
