"""sentence-transformers' semantic search, by nested search. Needs nothing of that library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.queries import checked_queries
from mrl_fast.search.ops import funnel_search, prefix_topk
from mrl_fast.shared.arrays import as_vectors
from mrl_fast.shared.checks import check_choice, check_finite, check_int, check_stages
from mrl_fast.shared.native import METRICS
from mrl_fast.shared.types import SearchResult, Stage

# By the names of sentence-transformers' functions, of its SimilarityFunction, and of metrics here.
SIMILARITIES = {
    "cos_sim": "cosine",
    "pytorch_cos_sim": "cosine",
    "cosine": "cosine",
    "dot_score": "ip",
    "dot": "ip",
    "ip": "ip",
    "euclidean_sim": "l2",
    "euclidean": "l2",
    "l2": "l2",
}
# By sentence-transformers' names: bits of a column, and the option of an index that holds them. Its
# signed and unsigned forms differ in how codes are stored, and rank alike.
CODED: dict[str, tuple[int, dict[str, Any]]] = {
    "int8": (8, {"prefix_dtype": "int8"}),
    "uint8": (8, {"prefix_dtype": "int8"}),
    "binary": (1, {"codes": "bits"}),
    "ubinary": (1, {"codes": "bits"}),
}


def semantic_search(
    query_embeddings: Any,
    corpus_embeddings: Any,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500000,
    top_k: int = 10,
    score_function: str | Callable[..., Any] | None = None,
    *,
    dim: int | None = None,
    stages: Sequence[Stage] | None = None,
    allowed: Any = None,
    precision: str = "float32",
    rescore: bool = True,
    rescore_multiplier: int = 2,
) -> list[list[dict[str, int | float]]]:
    """The best of a corpus for each query, as ``sentence_transformers.util.semantic_search`` gives
    them, without scores in memory; of equal scores the lower corpus_id first.

    Prefixes of unit vectors are no unit vectors: by a prefix, search with cos_sim, which normalises
    each, and not with dot_score, which then prefers documents whose first columns are large.

    Args:
        query_embeddings: ``[B, D]``, or one query ``[D]``: tensor, numpy array, DLPack object, or a
            list of rows; or of a prefix ``[B, d]``: d is one of an index's dims, at least ``dim``.
            float64 is searched as fp32.
        corpus_embeddings: ``[N, D]`` of the same dtype, or a MatryoshkaIndex.
        query_chunk_size, corpus_chunk_size: At least 1; checked but unused, as no score matrix is
            held.
        top_k: Results a query, at least 1.
        score_function: ``"cos_sim"``, ``"dot_score"``, ``"euclidean_sim"``, or sentence-
            transformers' functions of these names; ``"cosine"``, ``"ip"``, ``"l2"``; or a model's
            ``similarity``. None: cos_sim, or an index's own metric.
        dim: Search by the first ``dim`` columns only; one of an index's dims.
        stages: ``(dim, keep)`` pairs: search a short prefix, rerank by longer ones, as
            ``funnel_search`` does. With neither, an index searches as it is tuned, or exactly.
        allowed: Of an index, searches these ids only, as its ``search`` does.
        precision: What all vectors are ranked by, as the ``corpus_precision`` of
            ``semantic_search_faiss``: ``"binary"`` or ``"ubinary"`` by the signs of the columns
            that are searched, of an index with ``codes="bits"`` on the CPU; ``"int8"`` or
            ``"uint8"`` by eight bits of the first prefix of an index with ``prefix_dtype="int8"``,
            or of all columns of one with ``codes="bits"`` on another device. A corpus on the CPU
            that is no index is copied and coded anew by every call, all the columns that are
            searched: worth it to try, not to serve. An error with stages. Where few ids are
            allowed, an index on the CPU ranks them by their vectors.
        rescore: With codes, whether more than top_k candidates are kept. Codes give no scores: the
            candidates are always scored and ordered by the corpus's vectors, not, as sentence-
            transformers does, by decoded codes. Without it they are the top_k by codes.
        rescore_multiplier: With codes and rescore, the candidates are so many times top_k, at least
            1.

    Returns:
        For each query a list of ``{"corpus_id": int, "score": float}``, best first: an index's ids,
        or rows; euclidean scores are −distance.

    Raises:
        ValueError, TypeError: Another score function, or not the index's; both dim and stages, or
            both precision and stages; a precision whose codes the index does not hold; allowed
            without an index; a wrong shape or dtype, NaN or infinite values.
    """
    check_int(query_chunk_size, "query_chunk_size", 1)
    check_int(corpus_chunk_size, "corpus_chunk_size", 1)
    k = check_int(top_k, "top_k", 1)
    if dim is not None and stages is not None:
        raise ValueError(f"dim: expected None where stages are given, got {dim}")
    candidates = _candidates(k, precision, rescore, rescore_multiplier, stages)
    metric = None if score_function is None else _metric(score_function)
    queries = as_vectors(query_embeddings, "query_embeddings", one=True)
    check_finite(queries, "query_embeddings")
    if isinstance(corpus_embeddings, MatryoshkaIndex):
        index = corpus_embeddings
        if metric not in (None, index.metric):
            raise ValueError(
                f"score_function: expected None or {index.metric!r}, the metric that the index was "
                f"made with, got {_shown(score_function)}"
            )
        metric = index.metric
        if precision != "float32":
            result = _search_codes(queries, index, (k, candidates), precision, dim, allowed)
        else:
            result = index.search(queries, k, dim=dim, stages=stages, allowed=allowed)
    else:
        if allowed is not None:
            raise ValueError(
                "allowed: expected None where the corpus is not a MatryoshkaIndex, "
                f"got {type(allowed).__name__}"
            )
        metric = metric or "cosine"
        corpus = as_vectors(corpus_embeddings, "corpus_embeddings")
        queries, corpus = _fitting(queries, corpus, dim is not None or stages is not None)
        if precision != "float32":
            queries, index = _coded(queries, corpus, metric, precision, dim)
            result = _search_codes(queries, index, (k, candidates), precision)
        else:
            result = _search_matrix(queries, corpus, k, metric, dim, stages)
    scores, terms = result.scores, METRICS[metric]
    if terms.differences:
        scores = -(-scores / terms.squares).sqrt()  # −distance
    return [
        [{"corpus_id": i, "score": score} for i, score in zip(*row, strict=True) if i >= 0]
        for row in zip(result.ids.tolist(), scores.tolist(), strict=True)
    ]


def _candidates(k: int, precision: Any, rescore: Any, multiplier: Any, stages: Any) -> int:
    """How many rows codes choose, of the options that say so, checked."""
    if not isinstance(precision, str):
        raise TypeError(f"precision: expected a str, got {type(precision).__name__}")
    check_choice(precision, "precision", ("float32", *CODED))
    if stages is not None and precision != "float32":
        raise ValueError(
            f"precision: expected 'float32' where stages are given, got {precision!r}: a stage "
            "(dim, bits, keep) says by how many bits it ranks"
        )
    if not isinstance(rescore, bool):
        raise TypeError(f"rescore: expected True or False, got {type(rescore).__name__}")
    multiplier = check_int(multiplier, "rescore_multiplier", 1)
    return k * multiplier if rescore else k


def _search_codes(
    queries: Tensor,
    index: MatryoshkaIndex,
    keeps: tuple[int, int],
    precision: str,
    dim: int | None = None,
    allowed: Any = None,
) -> SearchResult:
    """Ranks all rows by codes and what they keep by vectors; ``keeps``: of the last stage and of
    the first."""
    _, dim = checked_queries(queries, index.config, dim)
    bits = _held_bits(index.config, precision)
    k, candidates = (min(keep, max(1, len(index))) for keep in keeps)
    coded = dim if index.config.code.whole else index.dims[0]
    return index.search(queries, k, stages=[(coded, bits, candidates), (dim, k)], allowed=allowed)


def _held_bits(config: IndexConfig, precision: str) -> int:
    """The bits of a precision, where the index can rank by them."""
    bits, option = CODED[precision]
    if bits not in config.ranking:
        held = [name for name, (n, _) in CODED.items() if n in config.ranking]
        ((name, value),) = option.items()
        where = " on the CPU" if "codes" in option else ""
        raise ValueError(
            f"precision: expected one of {', '.join(map(repr, ['float32', *held]))}, by which this "
            f"index can rank, got {precision!r}, which needs {name}={value!r}{where}"
        )
    return bits


def _coded(
    queries: Tensor, corpus: Tensor, metric: str, precision: str, dim: int | None
) -> tuple[Tensor, MatryoshkaIndex]:
    """Queries and an index of a corpus, of the columns that are searched, which all are coded."""
    if corpus.device.type != "cpu":
        raise ValueError(
            f"precision: expected 'float32' where corpus_embeddings is on {corpus.device}, got "
            f"{precision!r}: pass a MatryoshkaIndex"
        )
    widest = min(queries.shape[1], corpus.shape[1])
    dim = widest if dim is None else check_int(dim, "dim", 1, widest)
    queries, corpus = queries[:, :dim], corpus[:, :dim]
    check_finite(corpus, "corpus_embeddings")
    dtype = str(corpus.dtype).removeprefix("torch.")
    index = MatryoshkaIndex((dim,), metric=metric, dtype=dtype, **CODED[precision][1])
    index.add(corpus)
    return queries, index


def _fitting(queries: Tensor, corpus: Tensor, prefix: bool) -> tuple[Tensor, Tensor]:
    """Both on the corpus's device and in its dtype, float64 as fp32; of one width, unless they are
    searched by a prefix."""
    queries = queries.to(corpus.device)
    queries, corpus = (x.float() if x.dtype == torch.float64 else x for x in (queries, corpus))
    width = queries.shape[1]
    if queries.dtype != corpus.dtype or (width != corpus.shape[1] and not prefix):
        hint = f": pass dim={width}" if width < corpus.shape[1] else ""
        raise ValueError(
            f"query_embeddings: expected width {corpus.shape[1]} and {corpus.dtype} as "
            f"corpus_embeddings, got {width} and {queries.dtype}{hint}"
        )
    return queries, corpus


def _search_matrix(
    queries: Tensor, corpus: Tensor, k: int, metric: str, dim: int | None, stages: Any
) -> SearchResult:
    if stages is None:
        return prefix_topk(queries, corpus, min(k, max(1, len(corpus))), dim=dim, metric=metric)
    checked = check_stages(stages)
    if checked[-1][1] < k:
        raise ValueError(f"stages: expected a last keep of at least top_k={k}, got {checked[-1]}")
    return funnel_search(queries, corpus, [*checked[:-1], (checked[-1][0], k)], metric=metric)


def _metric(score_function: Any) -> str:
    name = score_function
    if callable(score_function):
        known = str(getattr(score_function, "__module__", "")).startswith("sentence_transformers.")
        name = getattr(score_function, "__name__", None) if known else None
        if name == "similarity":  # of a model
            name = getattr(getattr(score_function, "__self__", None), "similarity_fn_name", None)
    if not isinstance(name, str) or name not in SIMILARITIES:
        raise ValueError(
            f"score_function: expected one of {', '.join(SIMILARITIES)}, by name or as "
            "sentence-transformers' function, or a model's similarity, "
            f"got {_shown(score_function)}"
        )
    return SIMILARITIES[name]


def _shown(score_function: Any) -> str:
    """What a user passed; a model's method would show the whole model."""
    name = getattr(getattr(score_function, "__self__", None), "similarity_fn_name", None)
    return repr(score_function) if name is None else f"a model's similarity, {name!r}"
