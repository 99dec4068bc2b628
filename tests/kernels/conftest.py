"""A scan with small buffers, for databases that the interpreter can scan."""

import pytest
from mrl_fast.kernels.search import plan, topk


@pytest.fixture
def rescans(monkeypatch):
    """A scan with small buffers, so that small databases are scanned in phases; counts the queries
    that were flagged."""
    monkeypatch.setattr(plan, "BUFFER", (16, 32))
    monkeypatch.setattr(plan, "LEAST_RANK", 4)
    counted, rescan = [], topk.rescan

    def spy(self, keys, flag, k):
        if flag.any():
            counted.append(int(flag.sum()))
        rescan(self, keys, flag, k)

    monkeypatch.setattr(topk, "rescan", spy)
    return counted
