"""Hard negatives for a data set of pairs, from an index: sentence-transformers'
``mine_hard_negatives`` without a score matrix and without FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast.integrations.sentence_transformers.mining.candidates import Miner, Rescore
from mrl_fast.integrations.sentence_transformers.mining.formats import columns
from mrl_fast.integrations.sentence_transformers.mining.options import (
    Limits,
    checked_choice,
    checked_limits,
    checked_output,
    checked_window,
    deprecated,
)
from mrl_fast.integrations.sentence_transformers.mining.pairs import Pairs, read_pairs
from mrl_fast.integrations.sentence_transformers.mining.report import report
from mrl_fast.integrations.sentence_transformers.mining.vectors import (
    Embedder,
    Prompt,
    checked_index,
    index_of,
    process_pool,
)
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.shared.checks import check_int


def mine_hard_negatives(
    dataset: Any, model: Any,
    anchor_column_name: str | None = None, positive_column_name: str | None = None,
    corpus: Sequence[str] | None = None, cross_encoder: Any = None,
    range_min: int = 0, range_max: int | None = None,
    max_score: float | None = None, min_score: float | None = None,
    absolute_margin: float | None = None, relative_margin: float | None = None,
    num_negatives: int = 3, sampling_strategy: str = "top",
    query_prompt_name: str | None = None, query_prompt: str | None = None,
    corpus_prompt_name: str | None = None, corpus_prompt: str | None = None,
    include_positives: bool = False, output_format: str = "triplet", output_scores: bool = False,
    batch_size: int = 32, faiss_batch_size: int = 16384, use_faiss: bool = False,
    use_multi_process: bool | list[str] = False, verbose: bool = True,
    cache_folder: str | None = None,
    as_triplets: bool | None = None, margin: float | None = None,
    *, index: MatryoshkaIndex | None = None,
) -> Any:  # fmt: skip
    """Adds hard negatives to pairs of an anchor and a positive: the data set that
    ``sentence_transformers.util.mine_hard_negatives`` makes, of candidates from an index.

    Rows of equal anchors are one query whose positives they all are. A query's candidates are the
    corpus's best ``range_max`` and as many more as a query has positives at most; its positives are
    left out, then what the limits exclude; of what is left, best first, ranks ``range_min`` to
    ``range_max`` may be negatives. Equal scores are in the order of the corpus. Any number of
    candidates may be asked for; those of a batch of queries are in memory, no scores of others.

    It differs from the original where that takes what it was not given: a column's name that the
    data set does not have is an error, and texts have to be ``str``.

    Args:
        dataset: A ``datasets.Dataset`` of at least two columns of texts.
        model: The SentenceTransformer, whose similarity is cosine, dot or euclidean.
        anchor_column_name, positive_column_name: Default: the first and the second column.
        corpus: Texts that may be negatives beside all positives; default: none.
        cross_encoder: Where a limit is given, its scores replace the model's, of positives too.
        range_min, range_max: Ranks of candidates, at least 0 and at least ``range_min`` and
            ``num_negatives``. By default range_max is range_min, num_negatives (ten times as many
            with max_score, a margin, or a cross-encoder and min_score) and a query's positives at
            most.
        max_score, min_score: Candidates above or below are left out.
        absolute_margin: Candidates are left out whose score is not at least so much below the least
            of the query's positives.
        relative_margin: The same, as a share of that positive's |score|.
        num_negatives: A query, at least 1.
        sampling_strategy: ``"top"``, or ``"random"``, by Python's ``random`` as the original draws.
        query_prompt_name, query_prompt, corpus_prompt_name, corpus_prompt: For ``encode_query`` and
            ``encode_document``.
        include_positives: Positives stay among the candidates; makes ``"n-tuple"``.
        output_format: ``"triplet"`` (anchor, positive, negative), ``"n-tuple"`` (anchor, positive,
            negative_1, …; only where all were found), ``"labeled-pair"`` (anchor, text, label) or
            ``"labeled-list"`` (anchor, texts, labels).
        output_scores: Adds ``scores``, or has them in place of labels.
        batch_size: Texts that are encoded at a time.
        faiss_batch_size: Queries that are searched at a time, at most.
        use_faiss: Unused: the index searches, and is right beyond 2,048 candidates.
        use_multi_process: Encode in processes: True, or a list of devices.
        verbose: Show progress and a table of what was found.
        cache_folder: Embeddings are read from and written to the original's files there. These are
            named by texts, prompts and the base model's name, not by its weights.
        as_triplets, margin: Deprecated: ``output_format`` and ``absolute_margin``.
        index: What is searched, as it is tuned. An empty MatryoshkaIndex, of any codes, dtype or
            device, gets the vectors of all texts, whose ids are their places among the distinct
            texts of corpus and then positives. One that holds them already is searched as it is,
            and only queries are encoded. None: a new one, searched exactly, on the model's device
            where that is a GPU.

    Returns:
        A ``datasets.Dataset``.

    Raises:
        ValueError, TypeError: No rows, no such column, texts that are none; a range without room
            for the negatives; an unknown format or strategy; an index of another metric or width,
            or of other texts; NaN or infinite embeddings.
        ImportError: ``datasets`` is not installed.
    """
    from datasets import Dataset

    check_int(batch_size, "batch_size", 1)
    check_int(faiss_batch_size, "faiss_batch_size", 1)
    if as_triplets is not None:
        output_format = "triplet" if as_triplets else "n-tuple"
        deprecated("as_triplets", f"output_format={output_format!r}")
    if margin is not None:
        absolute_margin = margin
        deprecated("margin", "absolute_margin or relative_margin")
    limits = checked_limits(Limits(absolute_margin, relative_margin, max_score, min_score))
    choice = checked_choice(num_negatives, sampling_strategy, include_positives)
    output = checked_output(output_format, output_scores, choice.include_positives)
    pairs = read_pairs(dataset, anchor_column_name, positive_column_name, corpus)
    many = limits.of_the_best or (cross_encoder is not None and min_score is not None)
    window = checked_window(range_min, range_max, choice.number, pairs.most, many)
    index = checked_index(index, model, pairs.corpus)

    embedder = Embedder(model, batch_size, use_multi_process, cache_folder, verbose)
    if index is None or not len(index):
        prompt = Prompt(corpus_prompt_name, corpus_prompt)
        index = index_of(embedder.embed(pairs.corpus, "corpus", prompt), model, index)
    prompt = Prompt(query_prompt_name, query_prompt)
    queries = embedder.embed(pairs.queries, "query", prompt)
    rescored = cross_encoder if limits.given else None
    with process_pool(rescored, use_multi_process if rescored is not None else False) as pool:
        rescore = None if rescored is None else _rescore(rescored, pairs, batch_size, pool)
        miner = Miner(pairs, queries, index, rescore, window, limits, choice, verbose)
        found = miner.mine(faiss_batch_size)
    if verbose:
        print(report(pairs, found, limits, output))
    return Dataset.from_dict(columns(pairs, found, output))


def _rescore(cross_encoder: Any, pairs: Pairs, batch_size: int, pool: Any) -> Rescore:
    def rescore(queries: Tensor, places: Tensor) -> Tensor:
        texts = [
            (pairs.queries[query], pairs.corpus[place])
            for query, place in zip(queries.tolist(), places.tolist(), strict=True)
        ]
        if not texts:
            return torch.empty(0, dtype=torch.float32, device="cpu")
        scores = cross_encoder.predict(
            texts, batch_size=batch_size, convert_to_tensor=True, pool=pool
        )
        if list(scores.shape) != [len(texts)]:
            raise ValueError(
                f"cross_encoder: expected one score a pair, got shape {list(scores.shape)} for "
                f"{len(texts)} pairs"
            )
        return scores.float().cpu()

    return rescore
