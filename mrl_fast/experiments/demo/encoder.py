"""The encoder: a text's vector is the mean of its words' vectors, trained on pairs of texts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mrl_fast.shared.types import SpreadOut
from mrl_fast.training.losses.info_nce import matryoshka_info_nce

WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
BATCH, STEPS = 2048, 150
LEARNING_RATE = 0.1


def split_words(text: str) -> list[str]:
    """Lower-case words, split at case, underscores and digits: ``read_CSVFile`` has three."""
    return [word.lower() for word in WORD.findall(text)]


class Bags(NamedTuple):
    """Texts as lists of their words' numbers, laid end to end."""

    words: Tensor  # [T] int64, one text after the other
    offsets: Tensor  # [n + 1] int64, where each text begins, and where the last ends

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def known(self) -> Tensor:
        """``[n]`` bool: texts that have a known word."""
        return self.offsets.diff() > 0

    def select(self, rows: Tensor) -> Bags:
        counts = self.offsets.diff()[rows]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shifts = (self.offsets[rows] - offsets[:-1]).repeat_interleave(counts)
        return Bags(self.words[torch.arange(len(shifts)) + shifts], offsets)


class TextEncoder(nn.Module):
    """Text → ``[width]``: the mean of the vectors of its known words, 0 where there are none."""

    def __init__(self, words: Sequence[str], width: int):
        super().__init__()
        self.words = list(words)
        self.numbers = {word: i for i, word in enumerate(self.words)}
        self.bag = nn.EmbeddingBag(
            len(self.words), width, mode="mean", sparse=True, include_last_offset=True
        )
        nn.init.normal_(self.bag.weight, std=0.3)  # short: a step of Adam turns them more

    def bags(self, texts: Iterable[str]) -> Bags:
        flat: list[int] = []
        offsets = [0]
        for text in texts:
            flat += [self.numbers[w] for w in split_words(text) if w in self.numbers]
            offsets.append(len(flat))
        return Bags(torch.tensor(flat, dtype=torch.int64), torch.tensor(offsets))

    def forward(self, bags: Bags) -> Tensor:
        return self.bag(bags.words, bags.offsets)

    @torch.no_grad()
    def encode(self, texts: Iterable[str] | Bags) -> Tensor:
        """``[n, width]``."""
        bags = texts if isinstance(texts, Bags) else self.bags(texts)
        parts = torch.arange(len(bags)).split(1 << 14)
        return torch.cat([self(bags.select(part)) for part in parts])

    def save(self, path: Path) -> None:
        """Writes a safetensors file with the words in its header."""
        save_file({"vectors": self.bag.weight.detach()}, path, {"words": json.dumps(self.words)})

    @classmethod
    def load(cls, path: Path) -> TextEncoder:
        """Reads a file that ``save`` wrote; any other raises a ValueError or an OSError."""
        try:
            with safe_open(path, "pt") as file:
                vectors = file.get_tensor("vectors")
                words = json.loads((file.metadata() or {})["words"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: expected an encoder, got {error}") from None
        if vectors.ndim != 2 or len(vectors) != len(words):
            raise ValueError(f"{path}: expected {len(words)} words, got {list(vectors.shape)}")
        encoder = cls(words, vectors.shape[1])
        encoder.bag.weight.data = vectors
        return encoder.eval()


def vocabulary(texts: Iterable[str], least: int = 2) -> list[str]:
    """Words that occur at least so many times, the most frequent first."""
    counts = Counter(word for text in texts for word in split_words(text))
    return sorted((w for w in counts if counts[w] >= least), key=lambda w: (-counts[w], w))


def train(
    queries: Sequence[str],
    documents: Sequence[str],
    dims: Sequence[int],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
    spread_out: SpreadOut | None = None,
    on_step: Callable[[TextEncoder, Tensor], object] = lambda encoder, per_dim: None,
) -> TextEncoder:
    """Trains an encoder each of whose prefixes finds a query's document among those of a batch.

    With ``dims=(D,)`` this is ordinary training; everything else is the same.

    Args:
        queries, documents: ``n`` texts each, in pairs.
        spread_out: As in ``matryoshka_info_nce``.
        on_step: Called with the encoder and the loss of every dim.
    """
    torch.manual_seed(seed)
    encoder = TextEncoder(vocabulary([*queries, *documents]), dims[-1])
    pairs = encoder.bags(queries), encoder.bags(documents)
    rows = (pairs[0].known() & pairs[1].known()).nonzero().ravel()
    batch = min(batch, len(rows))
    optimizer = torch.optim.SparseAdam(encoder.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order = rows[:0]
    for _ in range(steps):
        if len(order) < batch:
            order = rows[torch.randperm(len(rows))]
        chosen, order = order[:batch], order[batch:]
        q, d = (encoder(bags.select(chosen)) for bags in pairs)
        loss = matryoshka_info_nce(q, d, dims, spread_out=spread_out)
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        schedule.step()
        on_step(encoder, loss.per_dim)
    return encoder.eval()
