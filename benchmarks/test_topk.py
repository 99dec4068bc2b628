"""Top-k and adaptive search against FAISS and torch: time a call, with recall asserted beside it.

Rows: one query (bandwidth), 16 and 256 (matrix products); k = 200 as a shortlist, k = 10 as a
search. The data is DESIGN's: 3,000 clusters, a falling spectrum, unit rows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mrl_fast import MatryoshkaIndex, prefix_topk
from mrl_fast.evaluate import recall_at_k


def make_inputs(rows: int, width: int, device: str, seed: int = 0):
    """Unit rows around 3,000 centres with deviations 1/√(1 + c/16), and queries near some rows."""
    torch.manual_seed(seed)
    spread = 1 / (1 + torch.arange(width, device=device) / 16).sqrt()
    centres = torch.randn(3000, width, device=device) * spread
    x = torch.empty(rows, width, device=device)
    for part in x.split(1 << 16):
        noise = 0.6 * torch.randn(part.shape, device=device) * spread
        part.copy_(F.normalize(centres[torch.randint(3000, (len(part),), device=device)] + noise))
    near = x[torch.randint(rows, (1024,), device=device)]
    noise = 0.3 * torch.randn(near.shape, device=device) * spread / spread.norm()
    return x, F.normalize(near + noise)


@pytest.fixture(scope="module")
def clustered():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return make_inputs(500_000, 768, device)


def faiss_rivals(x, q, k):
    """FAISS flat as it comes, and with BLAS from 4 queries on: its best at small batches."""
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(x.shape[1])
    flat.add(x.cpu().numpy())
    queries = q.cpu().numpy()

    def with_blas():
        before = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = 4
        try:
            return flat.search(queries, k)
        finally:
            faiss.cvar.distance_compute_blas_threshold = before

    return {"faiss": lambda: flat.search(queries, k), "faiss_blas": with_blas}


@pytest.mark.parametrize("k", [10, 200])
@pytest.mark.parametrize("batch", [1, 16, 256])
def test_prefix_topk(clustered, compare, device, batch, k):
    x, q = F.normalize(clustered[0][:, :64]), F.normalize(clustered[1][:batch, :64])
    rivals = {"torch": lambda: torch.topk(q @ x.T, k)}
    if device == "cpu":
        rivals |= faiss_rivals(x, q, k)
        scores, ids = rivals["faiss_blas"]()
        ours = prefix_topk(q, x, k)
        torch.testing.assert_close(ours.scores, torch.from_numpy(scores), atol=2e-6, rtol=0)
        assert recall_at_k(torch.from_numpy(ids), ours, q, x) > 0.999  # equal up to ties
    compare(
        lambda: prefix_topk(q, x, k), rivals, repetitions=5 if batch == 256 else 15,
        flops=2.0 * x.numel() * batch, read_bytes=4.0 * x.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_adaptive(clustered, compare, device, batch):
    if device != "cpu":
        pytest.skip("the index lives on the CPU")
    x, q = clustered[0], clustered[1][:batch]
    index = MatryoshkaIndex((64, 768), metric="ip")
    index.add(x)
    stages = [(64, 200), (768, 10)]
    exact = prefix_topk(clustered[1], x, 10)
    found = index.search(clustered[1], 10, stages=stages)
    assert recall_at_k(found.ids, exact, clustered[1], x) >= 0.99
    rivals = faiss_rivals(x, q, 10) | {"torch": lambda: torch.topk(q @ x.T, 10)}
    compare(lambda: index.search(q, 10, stages=stages), rivals, repetitions=5)
