"""Embeddings of queries and of a corpus, kept in files that sentence-transformers reads too, and an
index of the corpus."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.shared.checks import check_finite

# An index's metrics that order unit vectors as a model's similarity does; a new one has the first.
METRICS = {"cosine": ("cosine", "ip"), "dot": ("ip", "cosine"), "euclidean": ("l2",)}


class Prompt(NamedTuple):
    name: str | None
    text: str | None


class Embedder(NamedTuple):
    """How texts are embedded: unit vectors by ``model.encode_query`` or ``encode_document``."""

    model: Any
    batch_size: int
    use_multi_process: bool | list[str]
    cache_folder: str | None
    verbose: bool

    def embed(self, texts: list[str], role: str, prompt: Prompt) -> Tensor:  # [n, D]
        """``role``: ``"query"`` or ``"corpus"``."""
        file = self._file(texts, role, prompt)
        if file is not None and file.exists():
            return self._read(file, len(texts))
        encode = self.model.encode_query if role == "query" else self.model.encode_document
        with process_pool(self.model, self.use_multi_process) as pool:
            found = encode(
                texts, pool=pool, batch_size=self.batch_size, normalize_embeddings=True,
                convert_to_numpy=True, show_progress_bar=self.verbose,
                prompt_name=prompt.name, prompt=prompt.text,
            )  # fmt: skip
        vectors = torch.from_numpy(np.asarray(found))
        check_finite(vectors, f"model: its embeddings of the {role}")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.npy")
            try:
                np.save(part, found)
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
        return vectors

    def _file(self, texts: list[str], role: str, prompt: Prompt) -> Path | None:
        """Where sentence-transformers keeps these embeddings."""
        if self.cache_folder is None:
            return None
        name = self.model.model_card_data.base_model or ""
        key = repr((name, prompt.text, prompt.name, texts)).encode()
        digest = hashlib.sha256(key, usedforsecurity=False).hexdigest()
        return Path(self.cache_folder) / f"{role}_embeddings_{digest}.npy"

    def _read(self, file: Path, count: int) -> Tensor:
        try:
            kept = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"cache_folder: expected embeddings in {file}: {error}") from error
        if kept.ndim != 2 or len(kept) != count or kept.dtype.kind != "f":
            raise ValueError(
                f"cache_folder: expected {count} embeddings in {file}, got shape "
                f"{list(kept.shape)} of {kept.dtype}"
            )
        if self.verbose:
            print(f"{len(kept):,} embeddings read from {file}")
        vectors = torch.from_numpy(kept)
        check_finite(vectors, f"cache_folder: {file.name}")
        return vectors


@contextmanager
def process_pool(model: Any, wanted: bool | list[str]) -> Iterator[Any]:
    """The processes of a model, on the devices that are listed; None where none are wanted."""
    if not wanted:
        yield None
        return
    pool = model.start_multi_process_pool(None if isinstance(wanted, bool) else wanted)
    try:
        yield pool
    finally:
        model.stop_multi_process_pool(pool)


def checked_index(index: Any, model: Any, texts: list[str]) -> MatryoshkaIndex | None:
    """An index that fits a model, and is empty or holds the texts' vectors by their places."""
    similarity = str(model.similarity_fn_name)
    if similarity not in METRICS:
        raise ValueError(
            f"model: expected a similarity of {', '.join(METRICS)}, by which an index searches, "
            f"got {similarity}"
        )
    if index is None:
        return None
    if not isinstance(index, MatryoshkaIndex):
        raise TypeError(f"index: expected a MatryoshkaIndex or None, got {type(index).__name__}")
    if index.metric not in METRICS[similarity]:
        raise ValueError(
            f"index: expected a metric of {', '.join(METRICS[similarity])} for a model's "
            f"similarity {similarity}, got {index.metric}"
        )
    if len(index):
        places = torch.arange(len(texts), dtype=torch.int64, device="cpu")
        missing = (~index.contains(places)).nonzero().flatten().tolist()
        if missing:
            raise ValueError(
                f"index: expected none or all of {len(texts):,} vectors, by their texts' places "
                f"among the distinct ones of corpus and positives; {len(missing):,} are missing, "
                f"the first {missing[0]}, {texts[missing[0]][:40]!r}"
            )
        if len(index) > len(texts):
            raise ValueError(
                f"index: expected {len(texts):,} vectors, one for each distinct text of corpus and "
                f"positives, got {len(index):,}: pass the corpus that it was made of"
            )
    return index


def index_of(vectors: Tensor, model: Any, index: MatryoshkaIndex | None) -> MatryoshkaIndex:
    """The vectors in an index, whose ids are their places."""
    if index is None:
        metric = METRICS[str(model.similarity_fn_name)][0]
        device = str(model.device) if model.device.type == "cuda" else "cpu"
        dtype = str(vectors.dtype).removeprefix("torch.").replace("64", "32")
        index = MatryoshkaIndex((vectors.shape[1],), metric=metric, dtype=dtype, device=device)
    if index.width != vectors.shape[1]:
        raise ValueError(
            f"index: expected a width of {vectors.shape[1]}, the model's, got {index.width}"
        )
    index.add(vectors, ids=range(len(vectors)))
    return index
