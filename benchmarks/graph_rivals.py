"""Indexes that do not look at every row: built with the settings that their authors recommend, and
swept over what trades recall for time.

    FAISS HNSW32     efConstruction 200 (40 by default, which needs a larger efSearch)
    hnswlib          M 16, ef_construction 200
    SymphonyQG       rabitqlib: degree 32, ef_construction 200; 1-bit codes beside each node
    SVS Vamana       degree 64, window 128, alpha 0.95; on Intel's processors rows are LVQ4x8
    ScaNN            2 √N leaves, asymmetric hashing of 2 columns, refined

``pip install -c constraints.txt -e '.[rivals]'`` brings all but the first; one that is not
installed is left out, and said to be.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measure import processor
from benchmarks.search_data import Case, K, Search

Sweep = Callable[[int, np.ndarray, int], np.ndarray]  # effort, queries, k → ids
Made = tuple[Callable[[str], object], Sweep]  # saves to a path; searches
EFFORTS = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Built(NamedTuple):
    name: str
    build_s: float
    row_bytes: float  # of the file that it saves
    search_at: Callable[[int], Search]  # effort → the search


def faiss_hnsw(x: np.ndarray) -> Made:
    faiss: Any = importlib.import_module("faiss")
    index = faiss.IndexHNSWFlat(x.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    faiss.omp_set_num_threads(torch.get_num_threads())
    index.add(x)

    def search(effort: int, q: np.ndarray, k: int) -> np.ndarray:
        faiss.omp_set_num_threads(torch.get_num_threads())
        index.hnsw.efSearch = effort
        return index.search(q, k)[1]

    return lambda path: faiss.write_index(index, path), search


def hnswlib(x: np.ndarray) -> Made:
    index: Any = importlib.import_module("hnswlib").Index("ip", x.shape[1])
    index.init_index(len(x), M=16, ef_construction=200)
    index.add_items(x, num_threads=torch.get_num_threads())

    def search(effort: int, q: np.ndarray, k: int) -> np.ndarray:
        index.set_ef(effort)
        return index.knn_query(q, k, num_threads=torch.get_num_threads())[0]

    return index.save_index, search


def symphony_qg(x: np.ndarray) -> Made:
    index: Any = importlib.import_module("rabitqlib").SymqgIndex(x.shape[1], 32, "ip")
    index.build(x, 200, num_threads=torch.get_num_threads())

    def search(effort: int, q: np.ndarray, k: int) -> np.ndarray:
        call = index.search if len(q) == 1 else index.search_batch
        return call(q, k, effort, num_threads=torch.get_num_threads())[0]

    return index.save, search


def svs_vamana(x: np.ndarray) -> Made:
    svs: Any = importlib.import_module("svs")
    settings = svs.VamanaBuildParameters(alpha=0.95, graph_max_degree=64, window_size=128)
    data = lvq(svs, x) if "Intel" in processor() else x  # elsewhere LVQ ends the process
    threads = torch.get_num_threads()
    index = svs.Vamana.build(settings, data, svs.DistanceType.MIP, num_threads=threads)

    def search(effort: int, q: np.ndarray, k: int) -> np.ndarray:
        if index.num_threads != torch.get_num_threads():
            index.num_threads = torch.get_num_threads()
        index.search_window_size = effort
        return index.search(q, k)[0]

    def save(path: str) -> None:
        index.save(f"{path}.config", f"{path}.graph", f"{path}.data")

    return save, search


def lvq(svs: Any, x: np.ndarray) -> Any:
    """Rows in 4 bits a column, and 8 more for reranking."""
    with tempfile.NamedTemporaryFile(suffix=".fvecs", delete=False) as file:
        svs.write_vecs(x, file.name)
    loader = svs.VectorDataLoader(file.name, svs.DataType.float32, dims=x.shape[1])
    return svs.LVQLoader(loader, primary=4, residual=8)


def scann(x: np.ndarray) -> Made:
    """``effort`` / 1024 is the share of leaves that are visited; at least ``effort`` rows are
    refined."""
    module: Any = importlib.import_module("scann")
    leaves, threads = int(2 * len(x) ** 0.5), torch.get_num_threads()
    builder = module.scann_ops_pybind.builder(x, K, "dot_product")
    builder.set_n_training_threads(threads)
    sample = min(len(x), 250_000)
    builder = builder.tree(leaves, leaves // 10, training_sample_size=sample)
    index = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build()

    def search(effort: int, q: np.ndarray, k: int) -> np.ndarray:
        call = index.search_batched if len(q) == 1 else index.search_batched_parallel
        visited = max(1, min(leaves, leaves * effort // 1024))
        return call(
            q, final_num_neighbors=k, pre_reorder_num_neighbors=max(4 * k, effort),
            leaves_to_search=visited,
        )[0]  # fmt: skip

    def save(path: str) -> None:
        Path(path).mkdir()
        index.serialize(path)

    return save, search


def search_of(search: Sweep, effort: int) -> Search:
    return lambda q, k: torch.from_numpy(search(effort, q.numpy(), k).astype(np.int64))


GRAPHS = {
    "FAISS HNSW32": faiss_hnsw,
    "hnswlib": hnswlib,
    "SymphonyQG": symphony_qg,
    "SVS Vamana": svs_vamana,
    "ScaNN": scann,
}


def built(
    case: Case, names: Sequence[str] = (), say: Callable[[str], object] = print
) -> Iterator[Built]:
    """Builds each index whose package is installed, or those named, on all threads."""
    x = np.ascontiguousarray(case.x.numpy())
    for name, make in GRAPHS.items():
        if names and name not in names:
            continue
        begin = time.perf_counter()
        try:
            save, search = make(x)
        except ModuleNotFoundError as error:
            say(f"{name} is left out: {error}")
            continue
        build_s = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            save(f"{folder}/index")
            files = [file for file in Path(folder).rglob("*") if file.is_file()]
            row_bytes = sum(file.stat().st_size for file in files) / len(x)
        say(f"{name}: built in {build_s:.1f} s, {row_bytes:,.0f} bytes a row")
        yield Built(name, build_s, row_bytes, partial(search_of, search))
