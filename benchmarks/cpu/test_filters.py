"""Searching only the allowed rows, against searching all rows and dropping the others.

    pytest benchmarks/cpu/test_filters.py -s [--rows N]

A random share of the rows is allowed, from all but 1 % to 1 in 1,000, as a mask; queries as in
test_search.py. unfiltered: the same search of all rows. post_filter: ours for twice as many
neighbours as should do, of which the allowed ones are kept. faiss: the flat index with an
IDSelectorBitmap, which scores the allowed rows only, without BLAS.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from benchmarks.measure import DEVICE
from benchmarks.search_data import RECALL, SHORTLISTS, K, standard
from benchmarks.search_rivals import faiss
from mrl_fast import MatryoshkaIndex, SearchResult, prefix_topk
from mrl_fast.evaluate import recall_at_k

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the index lives on the CPU")
REPETITIONS = {1: 31, 16: 9, 256: 3}
SHARES = (0.99, 0.5, 0.1, 0.01, 0.001)
JUDGED = 64


@pytest.fixture(scope="module", params=["clustered", "centreless"])
def filled(request):
    rows = request.config.getoption("rows")
    x, q = standard(rows, 768, centres=3000 if request.param == "clustered" else 0)
    index = MatryoshkaIndex((64, 768), metric="ip", prefix_dtype="int8")
    index.add(x)
    flat = faiss().IndexFlatIP(768)
    flat.add(x.numpy())
    return f"{request.param} {rows:,} × 768", x, q, index, flat


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("kind", ["adaptive", "exact"])
def test_filter(filled, compare, kind, batch, share):
    data, x, q, index, flat = filled
    if kind == "adaptive" and data.startswith("centreless"):
        pytest.skip("64 columns need shortlists of thousands there")
    allowed = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) < share
    selector = faiss().IDSelectorBitmap(np.packbits(allowed.numpy(), bitorder="little"))
    parameters = faiss().SearchParameters(sel=selector)

    def post_filter(queries: torch.Tensor):
        wanted = min(int(2 * K / share), len(x))
        wider = {"exact": True}
        if kind == "adaptive":
            wider = {"stages": [(64, max(keep, 2 * wanted)), (768, wanted)]}
        scores, ids = index.search(queries, wanted, **wider)
        return scores.masked_fill(~allowed[ids], -torch.inf).topk(K)

    def by_faiss(queries: torch.Tensor):
        return flat.search(queries.numpy(), K, params=parameters)

    inside = allowed.nonzero()[:, 0]
    best = prefix_topk(q[:JUDGED], x[inside], K)
    truth = SearchResult(best.scores, inside[best.ids])

    def how_at(keep: int) -> dict:
        return {"stages": [(64, keep), (768, K)]} if kind == "adaptive" else {"exact": True}

    def recall_at(keep: int) -> float:
        found = index.search(q[:JUDGED], K, allowed=allowed, **how_at(keep))
        return recall_at_k(found.ids, truth, q[:JUDGED], x)

    # The shortest list that is good enough: allowed rows lie further apart than all rows do.
    keep = next(keep for keep in SHORTLISTS if recall_at(keep) >= RECALL)
    how, recall = how_at(keep), recall_at(keep)
    assert kind == "adaptive" or recall == 1.0
    rivals: dict[str, Callable[[], object]] = {
        "unfiltered": lambda: index.search(q[:batch], K, **how),
        "faiss": lambda: by_faiss(q[:batch]),
    }
    if batch * K / share < 3e5:  # beyond that it takes minutes
        rivals["post_filter"] = lambda: post_filter(q[:batch])
    name = f"64:{keep} → 768:{K}" if kind == "adaptive" else kind
    compare(
        lambda: index.search(q[:batch], K, allowed=allowed, **how),
        rivals,
        repetitions=REPETITIONS[batch],
        shuffle=True,  # a search finds rows in cache that the one before it has read
        notes={"filter": name, "data": data, "batch": batch, "share": share, "recall": recall},
    )
