"""Top-k by 64 columns of 500,000 rows against FAISS, torch and USearch, agreement asserted first.

k = 200 as a shortlist, k = 10 as a search; 1 query is bandwidth, 16 a server's batch, 256 and 4,096
are matrix products.

prefix_topk       row-major [N, 64]
strided           the first 64 of 768 columns, in place; FAISS would need a copy and stays out
index             the same rows in an index, fp32
index_int8        the same rows in an index with an int8 prefix. Its codes decide a shortlist only,
                  so a 65th column of zeros is searched as 64:keep → 65:200: the answer is the
                  rivals' top 200 in fp32, and our time includes rescoring
"""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import DEVICE
from benchmarks.search_data import Search, standard
from benchmarks.search_rivals import MANY, flat, torch_scan, usearch_scan
from mrl_fast import MatryoshkaIndex, SearchResult, prefix_topk
from mrl_fast.evaluate import recall_at_k

REPETITIONS = {1: 15, 16: 15, 256: 5, 4096: 3}
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the index lives on the CPU")
each_batch = pytest.mark.parametrize("batch", [1, 16, 256, 4096])
JUDGED = 256  # queries that recall is measured on


@pytest.fixture(scope="module")
def wide(request) -> tuple[Tensor, Tensor]:
    return standard(request.config.getoption("rows"), 768, device=DEVICE)


@pytest.fixture(scope="module")
def narrow(wide) -> tuple[Tensor, Tensor]:
    x, q = wide
    return F.normalize(x[:, :64]), F.normalize(q[:, :64])


def row(
    compare, what: str, ours: Search, rivals: dict[str, Search], vectors: tuple[Tensor, Tensor],
    k: int, *,
    least_recall: float = 0.999, number_bytes: int = 4,
) -> None:  # fmt: skip
    """Checks that all agree with the exact answer, up to ties and rounding, then times them."""
    x, q = vectors
    judged = q[:JUDGED]
    exact = prefix_topk(judged, x, k)
    # Rows are unit vectors, of which rounding may swap the k-th with the next.
    exact = SearchResult(exact.scores - 1e-6, exact.ids)
    notes: dict[str, object] = {"case": what, "data": f"clustered {len(x):,} × 64", "batch": len(q)}
    for name, search in {"mrl_fast": ours, **rivals}.items():
        recall = recall_at_k(search(judged, k), exact, judged, x)
        assert recall >= (least_recall if name == "mrl_fast" else 0.999), (name, recall)
        notes["recall" if name == "mrl_fast" else f"{name}_recall"] = recall
    calls = {name: lambda s=search: s(q, k) for name, search in rivals.items()}
    compare(
        lambda: ours(q, k), calls, repetitions=REPETITIONS[len(q)], notes=notes,
        flops=128.0 * len(x) * len(q), read_bytes=64.0 * number_bytes * len(x),
    )  # fmt: skip


def full_scans(x: Tensor, batch: int) -> dict[str, Search]:
    if DEVICE != "cpu":
        return {"torch": torch_scan(x)}
    return {name: rival.search for name, rival in flat(x, batch).items()}


@pytest.mark.parametrize("k", [10, 200])
@each_batch
def test_prefix_topk(narrow, compare, batch, k):
    x, q = narrow[0], narrow[1][:batch]
    ours = lambda q, k: prefix_topk(q, x, k).ids  # noqa: E731
    row(compare, f"prefix_topk, k {k}", ours, full_scans(x, batch), (x, q), k)


@each_batch
def test_strided(wide, compare, batch):
    x, q = wide[0][:, :64], wide[1][:batch, :64]
    rivals = {"torch": torch_scan(x)}
    if DEVICE == "cpu" and batch < MANY:
        rivals["usearch"] = usearch_scan(x)
    ours = lambda q, k: prefix_topk(q, x, k).ids  # noqa: E731
    row(compare, "prefix_topk of 64 of 768, k 200", ours, rivals, (x, q), 200)


@on_cpu
@pytest.mark.parametrize("k", [10, 200])
@each_batch
def test_index(narrow, compare, batch, k):
    x, q = narrow[0], narrow[1][:batch]
    index = MatryoshkaIndex((64,), metric="ip", prefix_dtype="float32")
    index.add(x)
    ours = lambda q, k: index.search(q, k, stages=[(64, k)]).ids  # noqa: E731
    row(compare, f"index float32, k {k}", ours, full_scans(x, batch), (x, q), k)


@on_cpu
@each_batch
def test_index_int8(narrow, compare, batch):
    x, q = narrow[0], narrow[1][:batch]
    index = MatryoshkaIndex((64, 65), metric="ip", prefix_dtype="int8")
    index.add(F.pad(x, (0, 1)))
    keep = 250
    ours = lambda q, k: index.search(F.pad(q, (0, 1)), k, stages=[(64, keep), (65, k)]).ids  # noqa: E731
    row(
        compare, f"index int8 64:{keep} → fp32, k 200", ours, full_scans(x, batch), (x, q), 200,
        least_recall=0.99, number_bytes=1,
    )  # fmt: skip
