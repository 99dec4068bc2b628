"""A MatryoshkaIndex as LlamaIndex's vector store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

from mrl_fast.integrations.stores.metadata import plain_metadata
from mrl_fast.integrations.stores.records import Codec, Records
from mrl_fast.search.index import MatryoshkaIndex

try:
    from llama_index.core.bridge.pydantic import BaseModel, PrivateAttr
    from llama_index.core.schema import (
        BaseNode,
        Document,
        ImageDocument,
        ImageNode,
        IndexNode,
        Node,
        TextNode,
    )
    from llama_index.core.vector_stores.types import (
        DEFAULT_PERSIST_DIR,
        DEFAULT_PERSIST_FNAME,
        BasePydanticVectorStore,
        MetadataFilters,
        VectorStoreQuery,
        VectorStoreQueryMode,
        VectorStoreQueryResult,
    )
except ImportError as error:
    raise ImportError(
        "mrl_fast.integrations.llama_index needs LlamaIndex: pip install 'mrl-fast[llama-index]'"
    ) from error

from mrl_fast.integrations.stores.llama_filters import keep_of, passes

NODES = {
    kind.class_name(): kind
    for kind in (TextNode, Node, ImageNode, IndexNode, Document, ImageDocument)
}


def _encode(node: BaseNode) -> dict[str, Any]:
    if type(node) not in NODES.values():
        raise TypeError(f"expected one of {', '.join(NODES)}, got {type(node).__name__}")
    return node.model_dump(mode="json")


def _decode(fields: dict[str, Any]) -> BaseNode:
    return NODES[fields["class_name"]].from_dict(fields)


CODEC = Codec("llama_index nodes", _encode, _decode)


class MatryoshkaVectorStore(BasePydanticVectorStore):
    """Nodes by id, found by their embeddings; keeps the nodes too.

    Searches are exact until ``store.client.tune`` was called on sample queries, or with
    ``vector_store_kwargs={"stages": …}``. While one thread changes the store, searches of others
    find each node as it was before the change or after it. Copies and pickles hold the nodes and
    the index; they are independent.

    Args:
        dims: Prefix widths. None: the embeddings' width, and its halves down to 64.
        metric, dtype, prefix_dtype, rotation: As for a MatryoshkaIndex.
    """

    stores_text: bool = True
    _records: Records[BaseNode] = PrivateAttr()

    def __init__(
        self,
        dims: Sequence[int] | None = None,
        *,
        metric: str = "cosine",
        dtype: str = "float32",
        prefix_dtype: str | None = None,
        rotation: str | None = None,
    ):
        super().__init__(stores_text=True)
        options = {
            "metric": metric,
            "dtype": dtype,
            "prefix_dtype": prefix_dtype,
            "rotation": rotation,
        }
        self._records = Records(CODEC, dims, options)

    # LlamaIndex's own ways to pickle and copy a component drop or share what is private.

    def __getstate__(self) -> dict[Any, Any]:
        return BaseModel.__getstate__(self)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        BaseModel.__setstate__(self, state)

    def __copy__(self) -> MatryoshkaVectorStore:
        made = super().__copy__()
        made._records = copy(self._records)
        return made

    @classmethod
    def class_name(cls) -> str:
        return "MatryoshkaVectorStore"

    @property
    def client(self) -> MatryoshkaIndex | None:
        """The index, to tune or to look at, not to change; None before there are dims or nodes."""
        return self._records.index

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Adds nodes that have embeddings, replacing those of the same ids.

        Metadata, those of related nodes too, are kept as JSON can hold them: numpy's numbers and
        arrays, and tuples, as Python's numbers and lists.

        Raises:
            ValueError: A node without embedding; NaN, infinity, a date or another object in
                metadata, naming the node and the key.
        """
        vectors = [node.get_embedding() for node in nodes]
        names = [node.node_id for node in nodes]
        self._records.put(names, vectors, [_kept(node) for node in nodes])
        return names

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Deletes the nodes of a document."""
        nodes = self._records.values()
        self._records.remove([node.node_id for node in nodes if node.ref_doc_id == ref_doc_id])

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Deletes the nodes that have one of the ids, if given, and pass the filters, if given.

        Raises:
            ValueError: Neither is given; ``clear`` deletes all.
        """
        if node_ids is None and filters is None:
            raise ValueError("node_ids: expected node_ids or filters, got neither; clear() for all")
        self._records.remove([node.node_id for node in self._found(node_ids, filters)])

    def clear(self) -> None:
        self._records.clear()

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """The nodes, without embeddings, that have one of the ids, if given, in their order, and
        pass the filters, if given."""
        return [_copy(node) for node in self._found(node_ids, filters)]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nodes nearest to an embedding.

        Args:
            query: Mode default, or mmr: of ``mmr_prefetch_factor`` (4) times as many those that are
                relevant and unlike one another, ``mmr_threshold`` (0.5) the weight of relevance.
                Filters are asked of all nodes before the search. ``node_ids=[]`` is as None.
            kwargs: ``mmr_threshold``, ``mmr_prefetch_factor``; further keywords of
                ``MatryoshkaIndex.search``, such as ``stages``.

        Returns:
            VectorStoreQueryResult: nodes without embeddings, ids, and similarities, larger is
            better: cosines, inner products, or −squared distances.

        Raises:
            ValueError: Another mode; no embedding.
        """
        if query.query_embedding is None:
            raise ValueError("query_embedding: expected an embedding, got None")
        keep, k = keep_of(query.node_ids, query.filters, query.doc_ids), query.similarity_top_k
        weight = kwargs.pop("mmr_threshold", query.mmr_threshold)
        factor = kwargs.pop("mmr_prefetch_factor", 4.0)
        if query.mode == VectorStoreQueryMode.DEFAULT:
            found = self._records.search(query.query_embedding, k, keep, **kwargs)
        elif query.mode == VectorStoreQueryMode.MMR:
            weight, fetch = 0.5 if weight is None else weight, int(k * factor)
            found = self._records.diverse(query.query_embedding, k, fetch, weight, keep, **kwargs)
        else:
            raise ValueError(f"mode: expected 'default' or 'mmr', got {str(query.mode.value)!r}")
        return VectorStoreQueryResult(
            nodes=[_copy(node) for node, _ in found],
            similarities=[score for _, score in found],
            ids=[node.node_id for node, _ in found],
        )

    def persist(self, persist_path: str | os.PathLike[str], fs: Any = None) -> None:
        """Writes nodes (JSON, no pickle) and index: what the folder does not have yet. At every
        moment it holds the old store or the new one, also if the process is killed.

        Args:
            persist_path: A folder: new, empty, or with such a store, which is replaced.
            fs: None: files are local.

        Raises:
            ValueError: A file system; a node that JSON does not give back as it was; a folder with
                other files, or one that another process has saved to since this store was loaded.
        """
        _local(fs)
        self._records.save(persist_path)

    @classmethod
    def from_persist_path(
        cls, persist_path: str | os.PathLike[str], fs: Any = None, *, verify: bool = False
    ) -> MatryoshkaVectorStore:
        """Opens what ``persist`` wrote.

        Args:
            verify: Read all vectors and compare checksums.

        Raises:
            FileNotFoundError: There is no store.
            ValueError: A file system; another version, or damage: names the file.
        """
        _local(fs)
        store = cls()
        store._records.load(persist_path, verify=verify)
        return store

    @classmethod
    def from_persist_dir(
        cls, persist_dir: str = DEFAULT_PERSIST_DIR, namespace: str = "default", fs: Any = None
    ) -> MatryoshkaVectorStore:
        """Opens what ``StorageContext.persist`` wrote of this store."""
        path = os.path.join(persist_dir, f"{namespace}__{DEFAULT_PERSIST_FNAME}")
        return cls.from_persist_path(path, fs)

    def _found(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[BaseNode]:
        if node_ids is None:
            nodes = self._records.values()
        else:
            found = (self._records.get(name) for name in dict.fromkeys(node_ids))
            nodes = [node for node in found if node is not None]
        return [node for node in nodes if filters is None or passes(node, filters)]


def _local(fs: Any) -> None:
    if fs is not None:
        raise ValueError(f"fs: expected None, for local files, got {type(fs).__name__}")


def _kept(node: BaseNode) -> BaseNode:
    """A copy to keep."""
    name = f"node {node.node_id!r}"

    def plain(related: Any) -> Any:
        if isinstance(related, list):
            return [plain(one) for one in related]
        where = f"{name}: related node {related.node_id!r}"
        return related.model_copy(update={"metadata": plain_metadata(related.metadata, where)})

    return _with(
        node,
        plain_metadata(node.metadata, name),
        {how: plain(related) for how, related in node.relationships.items()},
    )


def _copy(node: BaseNode) -> BaseNode:
    return _with(node, deepcopy(node.metadata), dict(node.relationships))


def _with(node: BaseNode, metadata: dict[str, Any], relationships: dict[Any, Any]) -> BaseNode:
    """Without the embedding, which the index has; the object of an IndexNode is not copied."""
    fields = {"embedding": None, "metadata": metadata, "relationships": relationships}
    return node.model_copy(update=fields)
