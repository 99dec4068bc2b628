"""A scan with small buffers, for databases that the interpreter can scan."""

import pytest
from mrl_fast.kernels.search import plan, topk


@pytest.fixture
def rescans(monkeypatch):
    """A scan with small buffers, so that small databases are scanned in phases; counts the queries
    that were flagged."""
    monkeypatch.setattr(plan, "BUFFER", (16, 32))
    monkeypatch.setattr(plan, "LEAST_RANK", 4)
    counted, score_buckets = [], topk.score_buckets

    def spy(pairs, to, *rest):
        keys = score_buckets(pairs, to, *rest)
        if to.flag.any():
            counted.append(int(to.flag.sum()))
        return keys

    monkeypatch.setattr(topk, "score_buckets", spy)
    return counted
