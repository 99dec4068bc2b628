"""Two text towers trained together, at every prefix: CLIP's loss, or SigLIP's.

One tower reads names of documented functions and classes, the other the first sentences of their
docstrings; the pairs are those of installed packages. A name that was held out then finds its
sentence among the others that were, by cosine, at any prefix.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mrl_fast import MatryoshkaInfoNCELoss, matryoshka_sigmoid_loss, prefix_topk
from mrl_fast.experiments.common import cache_folder
from mrl_fast.experiments.corpus import PACKAGES, read_corpus
from mrl_fast.experiments.demo.data import split
from mrl_fast.experiments.demo.encoder import split_words, vocabulary

DIMS = (8, 16, 32, 64, 128)
BOTH = ("query_to_doc", "doc_to_query")
QUICK = ("networkx", "numpy")  # installed wherever PyTorch and mrl_fast are


class TextTower(nn.Module):
    """The mean of the embeddings of a text's known words, and one hidden layer."""

    def __init__(self, texts: Sequence[str], width: int):
        super().__init__()
        self.numbers = {word: i for i, word in enumerate(vocabulary(texts), 1)}  # 0 fills up rows
        self.embed = nn.EmbeddingBag(1 + len(self.numbers), 128, padding_idx=0)
        self.hidden = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, width))

    def words(self, texts: Sequence[str]) -> torch.Tensor:
        """``[N, longest]`` int64, the numbers of each text's known words."""
        known = [[self.numbers[w] for w in split_words(t) if w in self.numbers] for t in texts]
        rows = [torch.tensor(row, dtype=torch.int64) for row in known]
        return pad_sequence(rows, batch_first=True)

    def forward(self, words: torch.Tensor) -> torch.Tensor:  # [B, width]
        return self.hidden(self.embed(words))


class ClipLoss(nn.Module):
    """Softmax over a batch's sentences and over its names, with a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.info_nce = MatryoshkaInfoNCELoss(
            DIMS, scale=1 / 0.07, learn_scale=True, directions=BOTH, partition_mode="per_direction"
        )

    def forward(self, names: torch.Tensor, sentences: torch.Tensor, same: torch.Tensor) -> Any:
        loss = self.info_nce(names, sentences, mask=dict.fromkeys(BOTH, same))
        return loss, self.info_nce.per_dim


class SigLipLoss(nn.Module):
    """Every pair on its own, with a learned scale and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, names: torch.Tensor, sentences: torch.Tensor, same: torch.Tensor) -> Any:
        # The loss takes no mask: other sentences of a name count as negatives.
        scale = self.log_scale.exp()
        return matryoshka_sigmoid_loss(names, sentences, DIMS, scale=scale, bias=self.bias)


class Texts(NamedTuple):
    """Pairs as the numbers of their words, a row a pair."""

    names: torch.Tensor  # [N, longest] int64
    sentences: torch.Tensor

    def same(self) -> torch.Tensor:
        """``[N, N]`` bool: another pair of the same name or sentence, which is no negative."""
        groups = [torch.unique(words, dim=0, return_inverse=True)[1] for words in self]
        equal = [group[:, None] == group[None, :] for group in groups]
        return (equal[0] | equal[1]).fill_diagonal_(False)


@torch.no_grad()
def found(name_tower: TextTower, sentence_tower: TextTower, texts: Texts) -> list[float]:
    """Share of names whose nearest sentence by a prefix's cosine is theirs."""
    names, sentences = name_tower(texts.names), sentence_tower(texts.sentences)
    nearest = [prefix_topk(names, sentences, 1, dim=d, metric="cosine").ids[:, 0] for d in DIMS]
    return [(ids == torch.arange(len(ids))).double().mean().item() for ids in nearest]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss", choices=("clip", "siglip"), default="clip")
    parser.add_argument("--quick", action="store_true", help="two packages, a tenth of the steps")
    options = parser.parse_args()
    steps, packages = (150, QUICK) if options.quick else (1500, PACKAGES)

    torch.manual_seed(0)
    pairs = split(read_corpus(packages, cache=cache_folder()).names)
    names, sentences = pairs.trained()
    name_tower, sentence_tower = TextTower(names, DIMS[-1]), TextTower(sentences, DIMS[-1])
    train = Texts(name_tower.words(names), sentence_tower.words(sentences))
    own = [pairs.entries[i].sentence for i in pairs.held_out]
    held_out = Texts(name_tower.words(pairs.asked), sentence_tower.words(own))
    print(f"{len(names):,} pairs are learned from, {len(own):,} are held out")

    loss_fn = ClipLoss() if options.loss == "clip" else SigLipLoss()
    before = found(name_tower, sentence_tower, held_out)
    modules = nn.ModuleList([name_tower, sentence_tower, loss_fn])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3)
    history = []
    for _ in (bar := tqdm(range(steps), disable=None)):
        rows = torch.randperm(len(names))[:256]
        batch = Texts(train.names[rows], train.sentences[rows])
        vectors = name_tower(batch.names), sentence_tower(batch.sentences)
        loss, per_dim = loss_fn(*vectors, batch.same())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(per_dim)
        bar.set_postfix_str("loss " + ", ".join(f"{loss:.2f}" for loss in per_dim.tolist()))

    first, last = (torch.stack(part).mean(0).tolist() for part in (history[:10], history[-10:]))
    after = found(name_tower, sentence_tower, held_out)
    print(f"{'dims':>6} {'first loss':>11} {'last':>8} {'found before, %':>17} {'after, %':>9}")
    for d, start, end, untrained, trained in zip(DIMS, first, last, before, after, strict=True):
        print(f"{d:>6} {start:>11.3f} {end:>8.3f} {100 * untrained:>17.1f} {100 * trained:>9.1f}")


if __name__ == "__main__":
    main()
