"""Candidates of each query from an index, scored, left out by limits, and the negatives chosen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mrl_fast.integrations.sentence_transformers.mining.options import Choice, Limits, Window
from mrl_fast.integrations.sentence_transformers.mining.pairs import Pairs
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.ops import rerank
from mrl_fast.shared.native import METRICS

HELD = 1 << 23  # candidates of a batch of queries, at 12 bytes each and a few times that to filter
PAIRS = 1 << 14  # whose vectors are compared at a time

# Scores [n] fp32 of pairs of a query and a text of the corpus, by their places, [n] int64 each
Rescore = Callable[[Tensor, Tensor], Tensor]


class Negatives(NamedTuple):
    """What was chosen; of missing negatives the score is −inf."""

    positive_scores: Tensor  # [P] fp32
    ids: Tensor  # [Q, n] int64, places in the corpus
    scores: Tensor  # [Q, n] fp32, best first
    left_out: dict[str, int]  # candidates, by the name of the limit
    candidates: int  # in all


class Miner(NamedTuple):
    pairs: Pairs
    queries: Tensor  # [Q, D]
    searched: MatryoshkaIndex
    rescore: Rescore | None
    window: Window
    limits: Limits
    choice: Choice
    verbose: bool

    def mine(self, batch: int) -> Negatives:
        """``batch``: queries at a time, at most; fewer where their candidates are many."""
        positive = self._positive_scores()
        least = torch.full((len(self.queries),), torch.inf, dtype=torch.float32, device="cpu")
        least.scatter_reduce_(0, self.pairs.owner, positive, "amin")
        batch = max(1, min(batch, HELD // self.window.searched))
        left_out: Counter[str] = Counter()
        chosen = []
        with tqdm(total=len(self.queries), desc="mine", disable=not self.verbose) as bar:
            for first in range(0, len(self.queries), batch):
                part = slice(first, first + batch)
                ids, scores = self._candidates(part)
                self._leave_out(scores, least[part, None], left_out)
                chosen.append(self._chosen(ids, scores))
                bar.update(len(ids))
        ids, scores = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        searched = len(self.queries) * self.window.searched
        return Negatives(positive, ids, scores, dict(left_out), searched)

    def _positive_scores(self) -> Tensor:  # [P]
        """By the routine that scores candidates: the same bits for the same pair."""
        owner, document = self.pairs.owner, self.pairs.document
        if self.rescore is not None:
            return self.rescore(owner, document)
        found, width = [], self.queries.shape[1]
        for own, place in zip(owner.split(PAIRS), document.split(PAIRS), strict=True):
            vectors = self.searched.reconstruct(place)[:, :width]
            queries = self.queries[own].to(vectors.dtype)
            rows = torch.arange(len(own), dtype=torch.int64, device="cpu")
            found.append(rerank(queries, vectors, rows[:, None], 1, metric=self.searched.metric))
        return self._similarities(torch.cat([result.scores[:, 0] for result in found]))

    def _candidates(self, part: slice) -> tuple[Tensor, Tensor]:  # [b, k] int64 and fp32
        k = self.window.searched
        found = self.searched.search(self.queries[part], min(k, len(self.searched)))
        missing = (0, k - found.ids.shape[1])
        ids = torch.nn.functional.pad(found.ids, missing, value=-1)
        scores = torch.nn.functional.pad(
            self._similarities(found.scores), missing, value=-torch.inf
        )
        queries = torch.arange(len(self.queries), dtype=torch.int64, device="cpu")[part, None]
        if not self.choice.include_positives:
            keys = queries * len(self.pairs.corpus) + ids
            scores[torch.isin(keys, self.pairs.keys)] = -torch.inf
        if self.rescore is not None:
            kept = scores != -torch.inf
            scores[kept] = self.rescore(queries.expand_as(ids)[kept], ids[kept])
        return ids, scores

    def _similarities(self, scores: Tensor) -> Tensor:
        """A model's: −distance, where the index has −distance²."""
        terms = METRICS[self.searched.metric]
        return -(-scores / terms.squares).sqrt() if terms.differences else scores

    def _leave_out(self, scores: Tensor, least: Tensor, left_out: Counter[str]) -> None:
        """Sets to −inf what a limit excludes; ``least [b, 1]``: of each query's positives."""

        def leave(name: str, excluded: Tensor) -> None:
            left_out[name] += int((excluded & (scores != -torch.inf)).sum())
            scores[excluded] = -torch.inf

        limits = self.limits
        if limits.absolute_margin is not None:
            leave("absolute_margin", scores + limits.absolute_margin > least)
        if limits.relative_margin is not None:
            leave("relative_margin", scores > least - least.abs() * limits.relative_margin)
        if limits.max_score is not None:
            leave("max_score", scores > limits.max_score)
        if limits.min_score is not None:
            leave("min_score", scores < limits.min_score)

    def _chosen(self, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:  # [b, n] each
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        window = slice(self.window.first, self.window.last)
        scores, ids = scores[:, window], ids.gather(1, order)[:, window]
        count = self.choice.number
        if self.choice.sampling == "top":
            return ids[:, :count], scores[:, :count]
        # what is left lies in front; drawn as sentence-transformers draws, from Python's generator
        options = (scores != -torch.inf).sum(1).clamp(min=count).tolist()
        drawn = [sorted(random.sample(range(n), k=count)) for n in options]
        places = torch.tensor(drawn, dtype=torch.int64, device="cpu")
        return ids.gather(1, places), scores.gather(1, places)
