"""FAISS flat indexes to an index of ours and back, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.search.index.validate import default_dims
from mrl_fast.shared import memory
from mrl_fast.shared.native import METRICS

try:
    import faiss
except ImportError as error:
    raise ImportError(
        "MatryoshkaIndex.from_faiss and to_faiss need FAISS: pip install 'mrl-fast[faiss]'"
    ) from error

CHUNK_BYTES = 1 << 26  # of fp32 vectors
SUPPORTED = "IndexFlat, IndexScalarQuantizer, or IndexIDMap or IndexIDMap2 of these"


def from_faiss(make: Callable[..., Any], index: Any, dims: Sequence[int] | None) -> Any:
    """The index that ``make(dims, metric=...)`` makes, with a FAISS index's vectors and ids; see
    ``MatryoshkaIndex.from_faiss``."""
    flat, ids = _opened(index)
    metrics = {faiss.METRIC_INNER_PRODUCT: "ip", faiss.METRIC_L2: "l2"}
    if flat.metric_type not in metrics:
        raise ValueError(
            f"index: expected METRIC_INNER_PRODUCT or METRIC_L2, got {_metric_name(flat)}"
        )
    dims = default_dims(flat.d) if dims is None else dims
    made = make(dims, metric=metrics[flat.metric_type])
    if made.width != flat.d:
        raise ValueError(f"dims: expected the last to be {flat.d}, got {made.width}")
    if (made.config.rotation is not None or made.codes is not None) and flat.ntotal:
        spread = np.linspace(0, flat.ntotal - 1, min(flat.ntotal, _rows(flat.d)))
        made.fit(flat.reconstruct_batch(spread.astype(np.int64)))
    for begin, end in _chunks(flat.ntotal, flat.d):
        made.add(flat.reconstruct_n(begin, end - begin), ids[begin:end])
    return made


def to_faiss(index: Any) -> Any:
    """A flat index of a MatryoshkaIndex's vectors, in the order of its rows; see its method."""
    ids = index.ids
    terms = METRICS[index.metric]
    made: Any = (faiss.IndexFlatL2 if terms.differences else faiss.IndexFlatIP)(index.width)
    mapped = not torch.equal(ids, memory.arange(0, len(ids)))
    if mapped:
        made = faiss.IndexIDMap2(made)
    for begin, end in _chunks(len(ids), index.width):
        x = index.reconstruct(ids[begin:end])
        if terms.normalized:
            x = _unit(x)
        if mapped:
            made.add_with_ids(x.numpy(), ids[begin:end].numpy())
        else:
            made.add(x.numpy())
    return made


def _unit(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    return (x / norms.where(norms > 0, 1)).float()


def _opened(index: Any) -> tuple[Any, np.ndarray]:
    """What holds the vectors, and the id of each, ``[N]`` int64."""
    names = []
    inner, ids = index, None
    while isinstance(inner, faiss.Index):
        inner = faiss.downcast_index(inner)
        names.append(type(inner).__name__)
        if isinstance(inner, (faiss.IndexFlat, faiss.IndexScalarQuantizer)):
            return inner, np.arange(inner.ntotal) if ids is None else _checked(ids)
        if not isinstance(inner, faiss.IndexIDMap) or ids is not None:
            break
        ids = faiss.vector_to_array(inner.id_map)
        inner = inner.index
    names = names or [type(index).__name__]
    raise TypeError(f"index: expected faiss {SUPPORTED}, got {' of '.join(names)}")


def _checked(ids: np.ndarray) -> np.ndarray:
    """FAISS takes any ids, an index those of at least 0, once each."""
    if len(ids) and ids.min() < 0:
        raise ValueError(f"index: expected ids of at least 0, got {ids.min()}")
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        raise ValueError(f"index: expected no id twice, got {values[counts > 1][0]} again")
    return ids


def _metric_name(index: Any) -> str:
    named = {getattr(faiss, name): name for name in dir(faiss) if name.startswith("METRIC_")}
    return named.get(index.metric_type, f"metric {index.metric_type}")


def _rows(width: int) -> int:
    return max(1, CHUNK_BYTES // (4 * width))


def _chunks(count: int, width: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, _rows(width)):
        yield begin, min(begin + _rows(width), count)
