"""Folders that should hold Fashion-MNIST and do not, each in its own way."""

import numpy as np
import pytest

from mrl_fast.experiments.reproduce.images import load_fashion_mnist


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "--data: expected a folder"),
        ("file", "--data: expected a folder"),
        ("empty", "--data: expected fashion_mnist.npz in"),
        ("garbage", "--data: expected a readable"),
        ("keys", "--data: expected a readable"),
        ("shape", r"--data: expected images \[n, h, w\] uint8 and labels \[n\]"),
    ],
)
def test_bad_data(tmp_path, name, message):
    for folder in ("empty", "garbage", "keys", "shape"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("a file")
    (tmp_path / "garbage" / "fashion_mnist.npz").write_bytes(b"PK not really")
    images, labels = np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8)
    np.savez(tmp_path / "keys" / "fashion_mnist.npz", x_train=images)
    np.savez(
        tmp_path / "shape" / "fashion_mnist.npz",
        x_train=images, y_train=labels[:3], x_test=images, y_test=labels,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist(tmp_path / name)
