"""Vectors that lie on disk: what a search waits for, and that it finds what it does in memory."""

import mmap
import os
import resource

import pytest
import torch

from mrl_fast import MatryoshkaIndex
from tests.helpers.index_model import one_thread, vectors  # noqa: F401

ROWS, WIDTH, KEEP, K = 20_000, 512, 400, 20
SEARCHES = {
    "bits": ({"codes": "bits"}, {"stages": [(WIDTH, 1, KEEP), (WIDTH, K)]}),
    "bits exact": ({"codes": "bits"}, {"exact": True}),
    "int8": ({"prefix_dtype": "int8"}, {"stages": [(64, KEEP), (WIDTH, K)]}),
    "prefix": ({"prefix_dtype": "float32"}, {"stages": [(64, KEEP), (WIDTH, K)]}),
}


def waits() -> int:
    """How often this process has waited for a page from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def uncache(path, begin: int) -> None:
    """Drops the pages of a file from `begin` on; what is mapped now stays."""
    with open(path, "rb") as file:
        begin += -begin % mmap.PAGESIZE
        os.posix_fadvise(file.fileno(), begin, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no way to drop cached pages")
@pytest.mark.parametrize("name", SEARCHES)
def test_rows_are_read_at_once(name, tmp_path):
    options, how = SEARCHES[name]
    index = MatryoshkaIndex((64, WIDTH), metric="ip", **options)
    centres = vectors(200, WIDTH, 0)
    index.add(centres.repeat(ROWS // 200, 1) + 0.8 * vectors(ROWS, WIDTH, 1))
    q = centres[:1] + 0.2 * vectors(1, WIDTH, 2)
    expected = index.search(q, K, **how)
    index.save(tmp_path)
    (file,) = tmp_path.glob("rows-*")
    suffix = ROWS * (WIDTH - (64 if name.startswith("prefix") else 0)) * 4
    begin = file.stat().st_size - suffix  # the vectors are the last part of the file

    uncache(file, begin)
    again = MatryoshkaIndex.load(tmp_path)
    before = waits()
    found = again.search(q, K, **how)
    waited = waits() - before
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.ids, expected.ids)
    assert waited < 30  # for more rows than that; a file system that keeps all pages makes none
