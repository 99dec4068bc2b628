"""A MatryoshkaIndex as LangChain's VectorStore."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

from mrl_fast.integrations.stores.records import Codec, Records
from mrl_fast.search.index import MatryoshkaIndex

try:
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import VectorStore
except ImportError as error:
    raise ImportError(
        "mrl_fast.integrations.langchain needs LangChain: pip install 'mrl-fast[langchain]'"
    ) from error

Filter = dict[str, Any] | Callable[[Document], bool]


def _encode(document: Document) -> dict[str, Any]:
    return {
        "id": document.id,
        "page_content": document.page_content,
        "metadata": document.metadata,
    }


CODEC = Codec("langchain documents", _encode, lambda fields: Document(**fields))


class MatryoshkaVectorStore(VectorStore):
    """Documents by id, found by the embeddings of their texts.

    Searches are exact until ``store.index.tune`` was called on sample queries, or with ``stages=``.
    Where others search meanwhile, they find each document as it was before a change or after it.

    Args:
        embedding: Makes the vectors; those of a Matryoshka model, or any with ``rotation="pca"``.
        dims: Prefix widths. None: the embeddings' width, and its halves down to 64.
        metric, dtype, prefix_dtype, rotation: As for a MatryoshkaIndex.

    Every search takes ``filter``: values of metadata that a document must have, or a function of
    the Document, asked of all documents; and further keywords of ``MatryoshkaIndex.search``, such
    as ``stages``.
    """

    def __init__(
        self,
        embedding: Embeddings,
        dims: Sequence[int] | None = None,
        *,
        metric: str = "cosine",
        dtype: str = "float32",
        prefix_dtype: str = "float32",
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
            metadatas: n of them.
            ids: n of them; None, or an id that is None: a new one.
            kwargs: What LangChain passes to every store (``batch_size``); without effect.

        Returns:
            The n ids.
        """
        texts = list(texts)
        for name, given in (("metadatas", metadatas), ("ids", ids)):
            if given is not None and len(given) != len(texts):
                raise ValueError(f"{name}: expected {len(texts)}, one a text, got {len(given)}")
        names = [name or str(uuid.uuid4()) for name in ids or [None] * len(texts)]
        documents = [
            Document(id=name, page_content=text, metadata=deepcopy(metadata))
            for name, text, metadata in zip(
                names, texts, metadatas or [{} for _ in texts], strict=True
            )
        ]
        if texts:
            self._records.put(names, self._embedding.embed_documents(texts), documents)
        return names

    def delete(self, ids: Sequence[str] | None = None, **kwargs: Any) -> bool:
        """Deletes documents; ids that there are not are ignored. None: all documents."""
        if ids is None:
            self._records.clear()
        else:
            self._records.remove(ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents there are, in the order of the ids."""
        found = (self._records.get(name) for name in ids)
        return [_copy(document) for document in found if document is not None]

    def similarity_search_with_score_by_vector(
        self, embedding: Sequence[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The k nearest documents and their scores, larger is better: cosines, inner products, or
        −squared distances."""
        found = self._records.search(embedding, k, _keep(filter), **kwargs)
        return [(_copy(document), score) for document, score in found]

    def similarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        vector = self._embedding.embed_query(query)
        return self.similarity_search_with_score_by_vector(vector, k, **kwargs)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        found = self.similarity_search_with_score_by_vector(embedding, k, **kwargs)
        return [document for document, _ in found]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Of the fetch_k nearest, k that are relevant and unlike one another, by cosines.

        Args:
            lambda_mult: The weight of relevance: 1 for that only, 0 for difference only.
        """
        found = self._records.diverse(embedding, k, fetch_k, lambda_mult, _keep(filter), **kwargs)
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
            ValueError: Metadata that JSON does not give back as it was; a folder with other files,
                or one that another process has saved to since this store was loaded.
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

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        """Scores as relevance in [0, 1]: cosines, negative ones as 0; of distances what LangChain
        makes of them for unit vectors; inner products as they are."""
        metric = "cosine" if self.index is None else self.index.metric
        return {
            "cosine": lambda score: min(max(score, 0.0), 1.0),
            "l2": lambda score: max(1 - math.sqrt(-score) / math.sqrt(2), 0.0),
            "ip": lambda score: score,
        }[metric]


def _copy(document: Document) -> Document:
    return document.model_copy(deep=True)


def _keep(filter: Filter | None) -> Callable[[Document], bool] | None:
    if filter is None or callable(filter):
        return filter
    if not isinstance(filter, dict):
        raise TypeError(
            f"filter: expected a dict or a function of a Document, got {type(filter).__name__}"
        )
    for key, value in filter.items():
        if key.startswith("$") or (isinstance(value, dict) and any("$" in name for name in value)):
            raise ValueError(
                f"filter: expected values that metadata must have, got {key!r}: {value!r}; for "
                "operators pass a function of a Document"
            )
    return lambda document: all(
        key in document.metadata and document.metadata[key] == value
        for key, value in filter.items()
    )
