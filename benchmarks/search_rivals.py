"""Everyone who searches the same rows, each as ``(queries, k) → ids``.

Full-width scans, exact (``flat``):
    faiss               IndexFlatIP as it comes
    faiss_blas          with BLAS from 4 queries on; it waits for 128,000 / D by default
    faiss_shards        one query only: FAISS gives a query one thread, so a shard a thread
    torch               q @ x.T, 256 queries at a time, and topk
Other ways to the same answer (``others``), refined: k_factor · k rows are scored again in fp32:
    faiss_prefix        a second copy of the prefixes, refined
    faiss_prefix_4bit   4 bits a column of the prefixes (fast-scan), refined; prefix2: twice as wide
    faiss_4bit          2 bits a column of all columns (fast-scan), refined
    faiss_sq8           8 bits of all columns; sq8_refine: refined
    faiss_panorama      exact, columns level by level, rows dropped as they lose
    usearch             exact scan; prefix: of a strided prefix, and torch scores a shortlist again
Graphs and lists (``graphs``), on fewer rows, for their building time: faiss_hnsw, faiss_ivf.

At one query every FAISS index here is split into a shard a thread; IVF scans lists in parallel.
k_factor, keep and effort are the least that are good enough on held-out queries, as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.search_data import SHORTLISTS, Case, K, Search

FLAT = ("faiss", "faiss_blas", "faiss_shards", "torch")
MANY = 2048  # from here on only what may win takes part
FACTORS = tuple(keep // K for keep in SHORTLISTS)
EFFORTS = (10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024)


class Rival(NamedTuple):
    search: Search
    setting: str = ""


def faiss() -> Any:
    module: Any = pytest.importorskip("faiss")
    module.omp_set_num_threads(torch.get_num_threads())
    return module


def searching(index: Any) -> Search:
    return lambda q, k: torch.from_numpy(index.search(q.numpy(), k)[1])


def with_blas(search: Search) -> Search:
    from mrl_fast.experiments.demo.search import blas_from

    def run(q: Tensor, k: int) -> Tensor:
        with blas_from(4):
            return search(q, k)

    return run


def over_threads(x: Tensor, batch: int, make: Callable[[], Any]) -> Any:
    """A filled index; for a single query a shard a thread."""
    parts = []
    for rows in x.tensor_split(torch.get_num_threads() if batch == 1 else 1):
        parts.append(make())
        parts[-1].train(rows.numpy())
        parts[-1].add(rows.numpy())
    if len(parts) == 1:
        return parts[0]
    whole = faiss().IndexShards(x.shape[1], True, True)  # in threads, ids in the order of rows
    for part in parts:
        whole.add_shard(part)
    return whole


def flat(x: Tensor, batch: int) -> dict[str, Rival]:
    """The full-width scans that make sense at this batch."""

    def scan(shards_for: int) -> Search:
        return searching(over_threads(x, shards_for, lambda: faiss().IndexFlatIP(x.shape[1])))

    whole = scan(batch if batch > 1 else 2)
    if batch >= MANY:  # where BLAS is FAISS's default as well
        return {"faiss_blas": Rival(with_blas(whole))}
    found = {"faiss": Rival(whole), "torch": Rival(torch_scan(x))}
    if batch > 1:
        found["faiss_blas"] = Rival(with_blas(whole))
    elif torch.get_num_threads() > 1:
        found["faiss_shards"] = Rival(scan(1))
    return found


def torch_scan(x: Tensor) -> Search:
    def scan(q: Tensor, k: int) -> Tensor:
        return torch.cat([(part @ x.T).topk(k).indices for part in q.split(256)])

    return scan


def others(case: Case, batch: int) -> dict[str, Rival]:
    """Searches that take less than a full scan in fp32; with many queries only the fastest."""
    short = prefix_index(case, batch)
    refine = faiss().IndexRefineFlat(short, faiss().swig_ptr(case.x.numpy()))
    found = {
        "faiss_prefix": refined(case, refine, short),
        "faiss_prefix_4bit": refined(case, refine, prefix_index(case, batch, four_bits=1)),
        "faiss_prefix2_4bit": refined(case, refine, prefix_index(case, batch, four_bits=2)),
    }
    if batch >= MANY:
        return found
    sq8, width = sq8_index(case, batch), case.x.shape[1]
    fast_scan = over_threads(case.x, batch, lambda: four_bit_index(width, width // 2))
    return found | {
        "faiss_sq8": Rival(searching(sq8)),
        "faiss_sq8_refine": refined(case, refine, sq8),
        "faiss_4bit": refined(case, refine, fast_scan),
        "faiss_panorama": panorama(case, batch),
        "usearch": Rival(usearch_scan(case.x)),
        "usearch_prefix": cascade(case),
    }


def prefix_index(case: Case, batch: int, *, four_bits: int = 0) -> Any:
    """A second copy of the prefixes, which FAISS cannot search in an index that it has: fp32, or
    4 bits a column of a prefix so many times as wide."""
    f, width = faiss(), case.x.shape[1]
    columns = min(width, case.prefix * max(1, four_bits))

    def make() -> Any:
        # One code a column: with half as many, shortlists would be twice as long.
        index = four_bit_index(columns, columns) if four_bits else f.IndexFlatIP(columns)
        return f.IndexPreTransform(f.RemapDimensionsTransform(width, columns, False), index)

    return over_threads(case.x, batch, make)


def four_bit_index(columns: int, groups: int) -> Any:
    return faiss().IndexPQFastScan(columns, groups, 4, faiss().METRIC_INNER_PRODUCT)


def sq8_index(case: Case, batch: int) -> Any:
    f = faiss()
    kind = f.ScalarQuantizer.QT_8bit
    make = f.IndexScalarQuantizer
    return over_threads(case.x, batch, lambda: make(case.x.shape[1], kind, f.METRIC_INNER_PRODUCT))


def refining(refine: Any, base: Any) -> Callable[[int], Search]:
    """k_factor → the search for k_factor · k rows by a cheap index, then the best k in fp32.

    Args:
        refine: An IndexRefineFlat, whose fp32 rows all bases share.
    """

    def search_at(factor: int) -> Search:
        def run(q: Tensor, k: int) -> Tensor:
            refine.base_index, refine.k_factor = base, factor
            return torch.from_numpy(refine.search(q.numpy(), k)[1])

        return with_blas(run)

    return search_at


def refined(case: Case, refine: Any, base: Any) -> Rival:
    search_at = refining(refine, base)
    factor = case.least(search_at, FACTORS)
    return Rival(search_at(factor), f"k_factor {factor}")


def panorama(case: Case, batch: int) -> Rival:
    """Levels as wide as the prefix (20,000 x 768: 12 to 24 are equally fast, 4 to 8 slower)."""
    width = case.x.shape[1]
    levels = max(2, width // case.prefix)
    make = faiss().IndexFlatIPPanorama
    index = over_threads(case.x, batch, lambda: make(width, levels))
    return Rival(searching(index), f"{levels} levels")


def usearch_scan(x: Tensor) -> Search:
    """Rows may be strided. It keeps every score of a call, so 64 queries at a time."""
    usearch: Any = pytest.importorskip("usearch.index")
    threads = torch.get_num_threads()

    def scan(q: Tensor, k: int) -> Tensor:
        found = [
            usearch.search(
                x.numpy(), part.numpy(), k, usearch.MetricKind.IP, exact=True, threads=threads
            ).keys.reshape(len(part), k)
            for part in q.split(64)
        ]
        return torch.cat([torch.from_numpy(keys.astype("int64")) for keys in found])

    return scan


def cascade(case: Case) -> Rival:
    """What a client with a strided exact search would write: a shortlist, gathered and rescored."""
    scan = usearch_scan(case.x[:, : case.prefix])

    def search_at(keep: int) -> Search:
        def run(q: Tensor, k: int) -> Tensor:
            found = []
            for part in q.split(64):
                rows = scan(part[:, : case.prefix], keep)  # [B, keep]
                scores = torch.bmm(case.x[rows], part[:, :, None])[:, :, 0]
                found.append(rows.gather(1, scores.topk(k).indices))
            return torch.cat(found)

        return run

    keep = case.least(search_at, SHORTLISTS)
    return Rival(search_at(keep), f"keep {keep}")


def graphs(case: Case) -> dict[str, Any]:
    """HNSW32 and an inverted file over all columns, filled."""
    f, width = faiss(), case.x.shape[1]
    hnsw = f.IndexHNSWFlat(width, 32, f.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = 200  # 40 by default, which needs a larger efSearch
    hnsw.add(case.x.numpy())
    return {"faiss_hnsw": hnsw, "faiss_ivf": inverted_file(case)}


def inverted_file(case: Case) -> Any:
    f, width = faiss(), case.x.shape[1]
    lists = int(4 * len(case.x) ** 0.5)
    ivf = f.IndexIVFFlat(f.IndexFlatIP(width), width, lists, f.METRIC_INNER_PRODUCT)
    ivf.train(case.x.numpy())
    ivf.add(case.x.numpy())
    return ivf


def at_effort(name: str, index: Any) -> Callable[[int], Search]:
    """effort → the search: efSearch of a graph, nprobe of an inverted file."""

    def search_at(effort: int) -> Search:
        def run(q: Tensor, k: int) -> Tensor:
            if name == "faiss_hnsw":
                index.hnsw.efSearch = effort
            else:
                index.nprobe = effort
                index.parallel_mode = int(len(q) == 1)  # over lists; otherwise over queries
            return torch.from_numpy(index.search(q.numpy(), k)[1])

        return run

    return search_at
