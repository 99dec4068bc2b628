"""Labelled vectors, and int64 tensors by hand."""

import torch


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


def blobs(rows, classes, seed, width=12):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    x = torch.randn(rows, width, generator=generator)
    x[torch.arange(rows), labels % width] += 2
    return x, labels
