"""A MatryoshkaIndex as LangChain's VectorStore."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Any

from mrl_fast.integrations.stores.metadata import names_of, plain_metadata
from mrl_fast.integrations.stores.records import Codec, Records
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.index.validate import number
from mrl_fast.shared.native import METRICS

try:
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import VectorStore
except ImportError as error:
    raise ImportError(
        "mrl_fast.integrations.langchain needs LangChain: pip install 'mrl-fast[langchain]'"
    ) from error

from mrl_fast.integrations.stores.langchain_filters import Filter, keep_of


def _encode(document: Document) -> dict[str, Any]:
    return {
        "id": document.id,
        "page_content": document.page_content,
        "metadata": document.metadata,
    }


def _decode(fields: dict[str, Any]) -> Document:
    return Document(**fields)


CODEC = Codec("langchain documents", _encode, _decode)


class MatryoshkaVectorStore(VectorStore):
    """Documents by id, found by the embeddings of their texts.

    Searches are exact until ``store.index.tune`` was called on sample queries, or with ``stages=``.
    While one thread changes the store, searches of others find each document as it was before the
    change or after it. Copies and pickles hold the documents and the index; they are independent.

    Args:
        embedding: Makes the vectors; those of a Matryoshka model, or any with ``rotation="pca"``.
        dims: Prefix widths. None: the embeddings' width, and its halves down to 64.
        metric, dtype, prefix_dtype, rotation: As for a MatryoshkaIndex.

    Every search takes:

    - ``filter``, asked of all documents before the search: a function of the Document (LangChain's
      FAISS store hands its functions the metadata), or a dict of conditions that must all hold.
      ``{"page": 1}``: metadata have this key with this value. ``{"page": [1, 2]}``: with one of
      these values. ``{"page": {"$gt": 1, "$lte": 9}}``: operators ``$eq $neq $gt $gte $lt $lte $in
      $nin``, for which a missing key is None. ``{"$or": [{…}, {…}]}``, ``$and``, ``$not: {…}``.
    - ``score_threshold``: documents with a lower score are left out.
    - ``fetch_k``, for FAISS's users: without effect but for marginal relevance, as the filter comes
      before the search.
    - further keywords of ``MatryoshkaIndex.search``, such as ``stages``.
    """

    def __init__(
        self,
        embedding: Embeddings,
        dims: Sequence[int] | None = None,
        *,
        metric: str = "cosine",
        dtype: str = "float32",
        prefix_dtype: str | None = None,
        rotation: str | None = None,
    ):
        self._embedding = embedding
        options = {
            "metric": metric,
            "dtype": dtype,
            "prefix_dtype": prefix_dtype,
            "rotation": rotation,
        }
        self._records: Records[Document] = Records(CODEC, dims, options)

    @property
    def embeddings(self) -> Embeddings:
        return self._embedding

    @property
    def index(self) -> MatryoshkaIndex | None:
        """The index, to tune or to look at, not to change; None before there are dims or texts."""
        return self._records.index

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Adds texts, replacing documents of the same ids.

        Args:
            texts: n of them.
            metadatas: n of them, as JSON can hold them. numpy's numbers and arrays, and tuples, are
                kept as Python's numbers and lists.
            ids: n of them, text or integers, which are kept as text; None, or an id that is None:
                a new one.
            kwargs: What LangChain passes to every store (``batch_size``); without effect.

        Returns:
            The n ids.

        Raises:
            ValueError: Other numbers of metadatas or ids; NaN, infinity, a date or another object
                in metadata, naming the document and the key.
        """
        texts = list(texts)
        given = [""] * len(texts) if ids is None else names_of(ids)
        names = [name or str(uuid.uuid4()) for name in given]
        metadatas = [{} for _ in texts] if metadatas is None else list(metadatas)
        for name, all_of in (("metadatas", metadatas), ("ids", names)):
            if len(all_of) != len(texts):
                raise ValueError(f"{name}: expected {len(texts)}, one a text, got {len(all_of)}")
        documents = [
            Document(
                id=name, page_content=text, metadata=plain_metadata(fields, f"document {name!r}")
            )
            for name, text, fields in zip(names, texts, metadatas, strict=True)
        ]
        if texts:
            self._records.put(names, self._embedding.embed_documents(texts), documents)
        return names

    def delete(self, ids: Sequence[str] | None = None, **kwargs: Any) -> bool:
        """Deletes documents; unknown ids are ignored. None: all documents."""
        if ids is None:
            self._records.clear()
        else:
            self._records.remove(names_of(ids))
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of these ids, in their order; unknown ids are left out."""
        found = (self._records.get(name) for name in names_of(ids))
        return [_copy(document) for document in found if document is not None]

    def similarity_search_with_score_by_vector(
        self,
        embedding: Sequence[float],
        k: int = 4,
        filter: Filter | None = None,
        fetch_k: int | None = None,
        *,
        score_threshold: float | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """The k nearest documents and their scores, larger is better: cosines, inner products, or
        −squared distances."""
        least = self._least(score_threshold)
        found = self._records.search(embedding, k, keep_of(filter), least, **kwargs)
        return [(_copy(document), score) for document, score in found]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,
        fetch_k: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        vector = self._embedding.embed_query(query)
        return self.similarity_search_with_score_by_vector(vector, k, filter, fetch_k, **kwargs)

    def similarity_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: Filter | None = None,
        fetch_k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        found = self.similarity_search_with_score_by_vector(embedding, k, filter, fetch_k, **kwargs)
        return [document for document, _ in found]

    def similarity_search(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,
        fetch_k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        found = self.similarity_search_with_score(query, k, filter, fetch_k, **kwargs)
        return [document for document, _ in found]

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        *,
        score_threshold: float | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Of the fetch_k nearest, k that are relevant and unlike one another, by cosines.

        Args:
            lambda_mult: The weight of relevance: 1 for that only, 0 for difference only.
        """
        keep, least = keep_of(filter), self._least(score_threshold)
        found = self._records.diverse(embedding, k, fetch_k, lambda_mult, keep, least, **kwargs)
        return [_copy(document) for document, _ in found]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        **kwargs: Any,
    ) -> list[Document]:
        vector = self._embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(
            vector, k, fetch_k, lambda_mult, **kwargs
        )

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> MatryoshkaVectorStore:
        """A new store of these texts; kwargs as for the class."""
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def save_local(self, folder_path: str | os.PathLike[str]) -> None:
        """Writes documents (JSON, no pickle) and index to a folder: what it does not have yet. At
        every moment the folder holds the old store or the new one, also if the process is killed.

        Args:
            folder_path: New, empty, or with such a store, which is replaced.

        Raises:
            ValueError: A folder with other files, or one that another process has saved to since
                this store was loaded.
        """
        self._records.save(folder_path)

    @classmethod
    def load_local(
        cls, folder_path: str | os.PathLike[str], embedding: Embeddings, *, verify: bool = False
    ) -> MatryoshkaVectorStore:
        """Opens what ``save_local`` wrote.

        Args:
            embedding: As when it was saved: it is not saved itself.
            verify: Read all vectors and compare checksums.

        Raises:
            FileNotFoundError: There is no store.
            ValueError: Another version, or damage: names the file.
        """
        store = cls(embedding)
        store._records.load(folder_path, verify=verify)
        return store

    def __copy__(self) -> MatryoshkaVectorStore:
        made = object.__new__(type(self))
        vars(made).update(vars(self), _records=copy(self._records))
        return made

    def _least(self, threshold: float | None) -> float | None:
        """A threshold of scores; refuses one that no score can reach."""
        if threshold is None:
            return None
        threshold = number(threshold, "score_threshold")
        if METRICS[self._records.metric].differences and threshold > 0:
            raise ValueError(
                f"score_threshold: expected at most 0, as scores by {self._records.metric!r} are, "
                f"got {threshold}"
            )
        return threshold

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        """Scores as relevance in [0, 1]: cosines, negative ones as 0; of distances what LangChain
        makes of them for unit vectors; inner products as they are."""
        terms = METRICS[self._records.metric]
        if terms.normalized:
            return lambda score: min(max(score / terms.product, 0.0), 1.0)
        if terms.differences:
            return lambda score: max(1 - math.sqrt(-score / terms.squares) / math.sqrt(2), 0.0)
        return lambda score: score


def _copy(document: Document) -> Document:
    return document.model_copy(deep=True)
