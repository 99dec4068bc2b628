"""Labelled images: scikit-learn's digits, and a folder that holds Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Data(NamedTuple):
    name: str
    train: Tensor  # [N, pixels] fp32, about unit scale
    train_labels: Tensor  # [N] int64
    test: Tensor
    test_labels: Tensor


def load_digits() -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train, test = (torch.from_numpy(part).float() / 8 - 1 for part in parts[:2])
    train_labels, test_labels = (torch.from_numpy(part).long() for part in parts[2:])
    return Data("digits", train, train_labels, test, test_labels)


def load_fashion_mnist(folder: Path) -> Data:
    """Raises a ValueError where the folder, its file or one of its arrays is not what is needed."""
    if not folder.is_dir():
        raise ValueError(f"--data: expected a folder, got {folder}, which is none")
    file = folder / "fashion_mnist.npz"
    if not file.is_file():
        file = folder / "fashion_mnist" / "fashion_mnist.npz"
    if not file.is_file():
        raise ValueError(f"--data: expected fashion_mnist.npz in {folder} or its fashion_mnist/")
    arrays = {}
    try:
        with np.load(file, allow_pickle=False) as archive:
            for name in ("x_train", "y_train", "x_test", "y_test"):
                arrays[name] = archive[name]
    except Exception as error:  # whatever numpy and zipfile raise on a damaged file
        raise ValueError(f"--data: expected a readable {file}, got {error}") from error
    shape = arrays["x_train"].shape[1:]
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        images = x.ndim == 3 and x.shape[1:] == shape and len(x) and x.dtype == np.uint8
        if not images or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
            raise ValueError(
                f"--data: expected images [n, h, w] uint8 and labels [n], integers, in {file}, "
                f"got {part} {x.shape} {x.dtype} and {y.shape} {y.dtype}"
            )
        if y.min() < 0 or y.max() > 9:
            raise ValueError(
                f"--data: expected labels 0 to 9 in {file}, got {part} {y.min()} to {y.max()}"
            )
    train, test = (
        torch.from_numpy(arrays[name]).flatten(1).float().sub_(72.9).div_(90.0)  # mean, deviation
        for name in ("x_train", "x_test")
    )
    train_labels, test_labels = (torch.from_numpy(arrays[n]).long() for n in ("y_train", "y_test"))
    return Data("Fashion-MNIST", train, train_labels, test, test_labels)
