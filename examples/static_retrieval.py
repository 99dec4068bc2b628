"""A static encoder, trained from nothing in a minute on a CPU: a text is the mean of its words.

It learns from names of documented functions and classes, each paired with the first sentence of its
docstring, of installed packages; put your own pairs in place of ``names`` and ``sentences``. Every
prefix of the vectors is trained by one nested InfoNCE. Names that were held out then find their
sentences among all, by every prefix and by one bit a column.

``--sparse`` gives gradients to the words of a batch alone, by SparseAdam, which pays where words
are many more than a batch has. ``--profile`` says where a step's time goes, with it and without.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mrl_fast import MatryoshkaIndex, MatryoshkaInfoNCELoss, SpreadOut
from mrl_fast.evaluate import retrieval
from mrl_fast.experiments.common import cache_folder
from mrl_fast.experiments.corpus import PACKAGES, read_corpus
from mrl_fast.experiments.demo.data import split
from mrl_fast.experiments.demo.encoder import Bags, TextEncoder, vocabulary

DIMS = (16, 32, 64, 128, 256)
SHORTLIST = 50  # rows that signs choose and vectors rank
QUICK = ("networkx", "numpy")  # installed wherever PyTorch and mrl_fast are


class Clock:
    """Seconds of each part of the steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, part: str | None = None) -> None:
        """The time since the last lap was of ``part``; of none that is reported without one."""
        now = time.perf_counter()
        if part is not None:
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def report(self, steps: int) -> str:
        total = sum(self.seconds.values())
        parts = [
            f"{part} {1000 * seconds / steps:.1f} ms ({seconds / total:.0%})"
            for part, seconds in self.seconds.items()
        ]
        return f"a step of {1000 * total / steps:.1f} ms: {', '.join(parts)}"


def train(
    encoder: TextEncoder,
    pairs: Sequence[Bags],
    loss_fn: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch: int,
) -> tuple[Tensor, Clock]:
    """Every step's loss of each prefix, ``[steps, G]``, and where the time went."""
    known = (pairs[0].known() & pairs[1].known()).nonzero().ravel()  # rows with words on both sides
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order, history, clock = known[:0], [], Clock()
    for _ in (bar := tqdm(range(steps), disable=None)):
        if len(order) < batch:
            order = known[torch.randperm(len(known))]
        rows, order = order[:batch], order[batch:]
        clock.lap()
        names, sentences = (encoder(bags.select(rows)) for bags in pairs)
        clock.lap("embed")
        loss = loss_fn(names, sentences)
        clock.lap("loss")
        optimizer.zero_grad()
        loss.backward()
        clock.lap("backward")
        optimizer.step()
        schedule.step()
        clock.lap("optimizer")
        history.append(loss_fn.per_dim)
        bar.set_postfix_str(f"loss {loss.item():.2f}")
    return torch.stack(history), clock


def by_signs(index: MatryoshkaIndex, queries: Tensor, dim: int) -> float:
    """Share of the exact ten that are found where one bit of each of ``dim`` columns chooses."""
    exact = index.search(queries, 10, exact=True).ids
    found = index.search(queries, 10, stages=[(dim, 1, SHORTLIST), (index.width, 10)]).ids
    return (found[:, :, None] == exact[:, None, :]).any(1).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two packages, few steps")
    parser.add_argument("--sparse", action="store_true", help="gradients of a batch's words alone")
    parser.add_argument("--spread-out", type=float, default=0.0, metavar="WEIGHT")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    steps, batch, packages = (40, 512, QUICK) if options.quick else (150, 2048, PACKAGES)

    torch.manual_seed(0)
    pairs = split(read_corpus(packages, cache=cache_folder()).names)
    names, sentences = pairs.trained()
    encoder = TextEncoder(vocabulary([*names, *sentences]), DIMS[-1])
    encoder.bag.sparse = options.sparse
    print(f"{len(names):,} pairs of {len(encoder.words):,} words are learned from")

    weight = options.spread_out
    loss_fn = MatryoshkaInfoNCELoss(DIMS, spread_out=SpreadOut(weight, weight) if weight else None)
    kind = torch.optim.SparseAdam if options.sparse else torch.optim.Adam
    optimizer = kind(encoder.parameters(), lr=0.1)
    bags = encoder.bags(names), encoder.bags(sentences)
    losses, clock = train(encoder, bags, loss_fn, optimizer, steps, batch)
    if options.profile:
        print(clock.report(steps))

    vectors, asked = encoder.encode(pairs.sentences), encoder.encode(pairs.asked)
    places = range(len(vectors))
    quality = retrieval(asked, pairs.held_out, vectors, places, DIMS, k=10, divisor="relevant")
    index = MatryoshkaIndex(DIMS, metric="cosine", codes="bits")
    index.add(vectors)
    print(
        f"{len(asked):,} names ask {len(vectors):,} sentences: MRR@10 and recall@10 of their own;"
    )
    print(f"and the share of an exact ten that is among the {SHORTLIST} best by signs, %")
    print(f"{'dims':>6} {'first loss':>11} {'last':>8} {'MRR':>8} {'recall':>8} {'by signs':>9}")
    first, last = losses[:10].mean(0).tolist(), losses[-10:].mean(0).tolist()
    for d, start, end, result in zip(DIMS, first, last, quality, strict=True):
        print(
            f"{d:>6} {start:>11.3f} {end:>8.3f} {result.mrr:>8.3f} {result.recall:>8.3f} "
            f"{100 * by_signs(index, asked, d):>9.1f}"
        )


if __name__ == "__main__":
    main()
