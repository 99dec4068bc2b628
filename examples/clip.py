"""Image and text towers trained together, at every prefix: CLIP's loss, or SigLIP's.

The images are DIR/fashion_mnist/fashion_mnist.npz, or without ``--data DIR`` scikit-learn's digits;
the captions are made of their labels. An image's class is then the caption nearest to it, with no
classifier, at any prefix.
"""

import argparse
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from mrl_fast import MatryoshkaInfoNCELoss, matryoshka_sigmoid_loss, prefix_topk

DIMS = (4, 8, 16, 32, 64)
BOTH = ("query_to_doc", "doc_to_query")
DIGITS = "zero one two three four five six seven eight nine".split()
CLOTHES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
CAPTIONS = ("a photo of a {}", "a small picture of a {}", "this image shows a {}", "a {}", "{}")


class Data(NamedTuple):
    train: torch.Tensor  # [N, pixels] fp32
    train_labels: torch.Tensor  # [N] int64
    test: torch.Tensor
    test_labels: torch.Tensor
    names: Sequence[str]  # of the classes


def load(folder: Path | None) -> Data:
    if folder is None:
        images, labels = load_digits(return_X_y=True)
        images, labels = torch.from_numpy(images).float() / 8 - 1, torch.from_numpy(labels).long()
        return Data(images[450:], labels[450:], images[:450], labels[:450], DIGITS)
    path = folder / "fashion_mnist" / "fashion_mnist.npz"
    if not path.is_file():
        raise SystemExit(f"--data: expected a folder with {path.relative_to(folder)}, got {folder}")
    with np.load(path) as file:
        train, test = (torch.from_numpy(file[name]).flatten(1) for name in ("x_train", "x_test"))
        labels = [torch.from_numpy(file[name]).long() for name in ("y_train", "y_test")]
    return Data(train / 127.5 - 1, labels[0], test / 127.5 - 1, labels[1], CLOTHES)


class TextTower(nn.Module):
    """The mean of a caption's word embeddings, and one hidden layer."""

    def __init__(self, captions: list[str], width: int):
        super().__init__()
        self.words = {w: i for i, w in enumerate(sorted({w for c in captions for w in c.split()}))}
        self.embed = nn.EmbeddingBag(len(self.words), 64)
        self.hidden = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, width))

    def forward(self, captions: list[str]) -> torch.Tensor:  # [B, width]
        ids = [[self.words[word] for word in caption.split()] for caption in captions]
        starts = np.cumsum([0] + [len(row) for row in ids[:-1]])
        flat = torch.tensor([word for row in ids for word in row])
        return self.hidden(self.embed(flat, torch.from_numpy(starts)))


class ClipLoss(nn.Module):
    """Softmax over a batch's captions and over its images, with a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.info_nce = MatryoshkaInfoNCELoss(
            DIMS, scale=1 / 0.07, learn_scale=True, directions=BOTH, partition_mode="per_direction"
        )

    def forward(self, images: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> Any:
        # Other captions of an image's class are not negatives of it.
        same = (labels[:, None] == labels[None, :]).fill_diagonal_(False)  # [B, B]
        loss = self.info_nce(images, texts, mask=dict.fromkeys(BOTH, same))
        return loss, self.info_nce.per_dim


class SigLipLoss(nn.Module):
    """Every pair on its own, with a learned scale and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> Any:
        # Duplicate captions count as negatives, so the loss has a floor.
        scale = self.log_scale.exp()
        return matryoshka_sigmoid_loss(images, texts, DIMS, scale=scale, bias=self.bias)


@torch.no_grad()
def zero_shot(image_tower: nn.Module, text_tower: nn.Module, data: Data) -> list[float]:
    """Share of test images whose nearest caption by a prefix's cosine names their class."""
    images = image_tower(data.test)
    captions = text_tower([CAPTIONS[0].format(name) for name in data.names])
    nearest = [prefix_topk(images, captions, 1, dim=d, metric="cosine").ids[:, 0] for d in DIMS]
    return [(found == data.test_labels).double().mean().item() for found in nearest]


def main() -> None:
    parser = argparse.ArgumentParser()
    default = os.environ.get("MRL_FAST_DATA")
    parser.add_argument("--loss", choices=("clip", "siglip"), default="clip")
    parser.add_argument("--data", type=Path, default=default, help="holds fashion_mnist/")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    options = parser.parse_args()
    steps = 150 if options.quick else 1500

    random.seed(0)
    torch.manual_seed(0)
    data = load(options.data)
    pixels, width = data.train.shape[1], DIMS[-1]
    image_tower = nn.Sequential(nn.Linear(pixels, 256), nn.GELU(), nn.Linear(256, width))
    text_tower = TextTower([c.format(name) for c in CAPTIONS for name in data.names], width)
    loss_fn = ClipLoss() if options.loss == "clip" else SigLipLoss()
    before = zero_shot(image_tower, text_tower, data)
    modules = nn.ModuleList([image_tower, text_tower, loss_fn])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3)
    history = []
    for _ in (bar := tqdm(range(steps), disable=None)):
        rows = torch.randint(len(data.train), (128,))
        labels = data.train_labels[rows]
        captions = [random.choice(CAPTIONS).format(data.names[label]) for label in labels.tolist()]
        loss, per_dim = loss_fn(image_tower(data.train[rows]), text_tower(captions), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(per_dim)
        bar.set_postfix_str("loss " + ", ".join(f"{loss:.2f}" for loss in per_dim.tolist()))

    first, last = (torch.stack(part).mean(0).tolist() for part in (history[:10], history[-10:]))
    print(f"{'dims':>6} {'first loss':>11} {'last':>8} {'accuracy before, %':>19} {'after, %':>9}")
    for row in zip(
        DIMS, first, last, before, zero_shot(image_tower, text_tower, data), strict=True
    ):
        d, start, end, untrained, accuracy = row
        print(f"{d:>6} {start:>11.3f} {end:>8.3f} {100 * untrained:>19.1f} {100 * accuracy:>9.1f}")


if __name__ == "__main__":
    main()
