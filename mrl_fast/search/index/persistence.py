"""What of an index lasts beyond it: its folder, a pickle, an index of FAISS."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any, TypeVar

from mrl_fast.search.disk import folder
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.disk.remote import fetched, is_remote
from mrl_fast.search.index import pickled
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.blocks import Layout
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.graph import walks
from mrl_fast.search.index.rows import IndexRows
from mrl_fast.search.index.stages import checked_tuned
from mrl_fast.shared.types import Tuned

Index = TypeVar("Index", bound="Persistent")
# What loads a folder whose manifest names another format: ``load`` of another kind of index.
LOADERS: dict[str, Callable[..., Any]] = {}


class Persistent(pickled.Copies):
    """An index's state, and how it is saved, loaded and converted."""

    config: IndexConfig
    _tuned: Tuned | None
    _begin: Callable[[IndexConfig], None]  # of Searchable

    def _make(self, config: IndexConfig) -> None:
        self._begin(config)
        self._rows = IndexRows(config)
        self._saved: folder.Saved | None = None  # to where it was saved last, or loaded from
        self._left: dict[Path, folder.Entry] = {}  # every such folder's manifest, as of then
        self._loaded_marks: tuple[Any, ...] | None = None  # as the folder has it that it is from

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the folder does not have yet; until that is done it holds what it held.

        To the folder that this index was saved to last, or loaded from, only new vectors are
        written, and where nothing changed since, nothing. The index's own vectors stay where they
        are, in memory.

        Args:
            path: A folder: new, empty, or with an index, which is replaced.

        Raises:
            ValueError: A folder with other files, or with an index that is damaged or of another
                version; one that this index was saved to or loaded from, where another has saved
                since.
            OSError: The folder cannot be written to, or the disk is full.
        """
        self._save(Path(path))

    def _save(self, path: Path, kept: folder.Entry | None = None) -> folder.Entry:
        """As ``save``; the folder's manifest. Files that ``kept`` names stay, too."""
        with self._rows.changing():
            store, now, marks = self._rows.store, self._rows.snapshot, self._marks()

            def replaced(saved: folder.Saved) -> None:
                there = self._loaded_marks and self._saved and self._saved.path == saved.path
                self._loaded_marks = marks if there else None
                self._saved, store.saved_prefix_rows = saved, now.count
                self._left[saved.path] = saved.manifest

            contents = folder.Contents(
                self._fields(),
                self._rows.layout,
                now.blocks,
                now.counts,
                now.live,
                self._rows.frame,
                now.graph,
            )
            prefix_rows, left = store.saved_prefix_rows, self._left
            folder.save(path, contents, self._saved, prefix_rows, left, replaced, kept)
            assert self._saved is not None
            return self._saved.manifest

    @classmethod
    def load(
        cls: type[Index], path: str | os.PathLike[str], *, device: str = "cpu", verify: bool = False
    ) -> Index:
        """Opens what ``save`` wrote, without reading it: vectors come from the file as they are
        needed, so that an index may be larger than memory. A folder that a ShardedIndex saved
        becomes one. Codes that version 2 of the files holds are made again, in memory, from all
        vectors: save the index once.

        Args:
            path: The folder. Its files must not be changed but by ``save``, which may run
                meanwhile. A URL, ``s3://bucket/index``, is read to a copy on this machine first,
                by fsspec: what the copy lacks, below ``$MRL_FAST_CACHE`` or ``~/.cache/mrl_fast``.
            device: As for a new index; with a copy to another device everything is read.
            verify: Read every file and compare its checksum. The manifest's is always compared.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: A file and no folder; another version, or damage: names the file and the
                field.
        """
        path = fetched(str(path)) if is_remote(path) else Path(path)
        if load := LOADERS.get(manifests.format_of(path) or ""):
            return load(path, device=device, verify=verify)
        return cls._load(path, device, verify)

    @classmethod
    def _load(
        cls: type[Index],
        path: Path,
        device: str,
        verify: bool,
        manifest: folder.Entry | None = None,
    ) -> Index:
        """As ``load``, of a folder of one index; of the files that ``manifest`` names."""
        make = partial(cls._from_fields, inputs.device(device))
        index, contents, index._saved = folder.load(path, make, verify=verify, manifest=manifest)
        next_id = index._saved.manifest["next_id"]
        index._rows.adopt(
            contents.blocks, contents.counts, contents.alive, contents.axes, next_id, contents.graph
        )
        if index._rows.layout.reads(index._saved.manifest["version"]):
            index._rows.store.saved_prefix_rows = sum(contents.counts)
        index._left[index._saved.path] = index._saved.manifest
        index._loaded_marks = index._marks()
        return index

    @classmethod
    def from_faiss(
        cls: type[Index], index: Any, dims: Sequence[int] | None = None, **options: Any
    ) -> Index:
        """An index of a FAISS index's vectors, in their order, with its metric and ids.

        An exact search finds what FAISS finds, up to the order of equal scores and rounding. Codes
        of a scalar quantiser become the vectors that FAISS decodes them to.

        Args:
            index: faiss.IndexFlat (IP, L2), IndexScalarQuantizer, or IndexIDMap or IndexIDMap2 of
                one.
            dims: Prefix widths, the last the index's. None: the width, and its halves down to 64.
            options: ``dtype``, ``prefix_dtype``, ``codes``, ``rotation`` and ``device``, as for a
                new index; a rotation is fitted on vectors from all over the index.

        Raises:
            TypeError: Another kind of index; names it and those that are supported. An unknown
                option, such as the metric.
            ValueError: Another metric than inner product and L2; ids below 0 or given twice; dims
                that do not end at the index's width.
            ImportError: FAISS is not installed.
        """
        from mrl_fast.search.index.faiss_flat import from_faiss

        if "metric" in options:
            raise TypeError("metric: expected none, as it is the FAISS index's own")
        return from_faiss(partial(cls, **options), index, dims)

    def to_faiss(self) -> Any:
        """A FAISS flat index of the vectors, in the order of rows.

        No other thread may change this index meanwhile. Vectors are fp32 there. For ``"l2"``
        FAISS's scores are squared distances. ``"cosine"`` becomes unit vectors under inner products
        (of norm 0 stay 0): normalise queries too.

        Returns:
            faiss.IndexFlatIP or IndexFlatL2 where ids are 0, 1, 2, … in the order of rows; else
            faiss.IndexIDMap2 of one.

        Raises:
            ImportError: FAISS is not installed.
        """
        from mrl_fast.search.index.faiss_flat import to_faiss

        return to_faiss(self)

    def _marks(self) -> tuple[Any, ...]:
        """The objects that a change of anything that ``save`` writes replaces."""
        return self._rows.snapshot, self._rows.frame, self._tuned

    def _is_as_loaded(self) -> bool:
        marks = self._loaded_marks
        return marks is not None and all(map(is_, marks, self._marks()))

    def _fields(self) -> dict[str, Any]:
        """What a manifest says of the index, as JSON; ``_from_fields`` reads it."""
        tuned = None if self._tuned is None else self._tuned.fields
        return {**self.config.fields, "next_id": self._rows.next_id, "tuned": tuned}

    @classmethod
    def _from_fields(cls: type[Index], device: str, fields: dict[str, Any]) -> tuple[Index, Layout]:
        index = cls.__new__(cls)
        index._make(IndexConfig.from_fields(fields, device))
        if fields["tuned"] is not None:
            tuned = checked_tuned(fields["tuned"], replace(index.config, device="cpu"))
            # Stages by a host's codes, or its graph, are none of a device's.
            bits = tuned.stages[0][1:-1] if tuned.stages else ()
            ranks = set(bits) <= set(index.config.ranking) and not walks(tuned.stages)
            index._tuned = tuned if device == "cpu" or ranks else None
        return index, index._rows.layout
