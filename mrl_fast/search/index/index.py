"""An index over nested vectors: search a short prefix of every row, rerank the few that are
left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrl_fast.search.disk import folder
from mrl_fast.search.index import tuning
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.blocks import Layout
from mrl_fast.search.index.rows import DTYPES, Collection
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.shared.arrays import result_like
from mrl_fast.shared.checks import check_finite, check_int
from mrl_fast.shared.types import ExactResult, RangeResult, SearchResult, Tuned

MANY = 1 << 62  # more than there are rows, and yet an int64


class MatryoshkaIndex(Collection):
    """Exact and adaptive search over vectors whose prefixes are embeddings.

    Any number of threads may search while others add, remove, update or save: a search sees the
    index as one of these left it, and they take turns.

    Args:
        dims: Prefix widths that stages may use, strictly ascending. The last is the vectors' width
            D; the first is laid out for scanning, so it should be the dim that searches start with.
        metric: ``"cosine"`` (each prefix normalised on its own), ``"ip"`` or ``"l2"`` (scores are
            −squared distance).
        dtype: What vectors are stored as: ``"float32"``, ``"float16"`` or ``"bfloat16"``. They are
            rounded to it as they are added.
        prefix_dtype: What the first prefix is scanned as: ``"float32"``, or ``"int8"``, a quarter
            of the bytes: a code for a shortlist and for bounds, one unit a row, from which no score
            is returned; reranking starts at the first column of the vectors as stored.
        rotation: ``"pca"`` for vectors that were not trained to be cut: an orthogonal rotation that
            puts their energy first, fitted by ``fit`` or else on the first vectors that are added.
            Inner products, distances and full-width cosines keep their values up to rounding.
        device: ``"cpu"``, or ``"cuda"`` or ``"cuda:<number>"``: the vectors stay on the host, where
            they are changed, saved and loaded, and a row-major copy on the device is searched. A
            search with queries there waits for nothing, runs on the current stream and can be
            captured in a CUDA graph, which holds until the index is changed.

    Raises:
        ValueError, TypeError: Dims that do not ascend, an unknown metric, dtype or rotation.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        metric: str = "cosine",
        dtype: str = "float32",
        prefix_dtype: str = "float32",
        rotation: str | None = None,
        device: str = "cpu",
    ):
        super().__init__(
            dims, metric=metric, dtype=dtype, prefix_dtype=prefix_dtype, rotation=rotation,
            device=device,
        )  # fmt: skip
        self._tuned: Tuned | None = None
        self._saved: folder.Saved | None = None

    @property
    def tuned(self) -> Tuned | None:
        """What ``tune`` chose: stages, k, and how many vectors there were."""
        return self._tuned

    def __repr__(self) -> str:
        now = self._store.snapshot
        prefix = "" if self.prefix_dtype == "float32" else f", prefix_dtype={self.prefix_dtype!r}"
        rotation = "" if self._rotation is None else ", rotation='pca'"
        device = "" if self.device == "cpu" else f", device={self.device!r}"
        removed = f", {now.count - now.size:,} removed" if now.count > now.size else ""
        tuned = "" if self._tuned is None or not self._tuned.stages else ", tuned"
        return (
            f"MatryoshkaIndex(dims={self.dims}, metric={self.metric!r}, dtype={self.dtype!r}"
            f"{prefix}{rotation}{device}): {now.size:,} vectors{removed}, "
            f"{now.nbytes / 2**20:,.1f} MiB{tuned}"
        )

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        stages: Sequence[tuple[int, int]] | None = None,
        exact: bool = False,
        allowed: Any = None,
        out: SearchResult | None = None,
    ) -> SearchResult:
        """The k nearest vectors of each query.

        Args:
            queries: ``[B, D]`` floating point: tensor, numpy array or DLPack object.
            k: Neighbours a query, at least 1; beyond the vectors there are they are missing.
            stages: ``(dim, keep)`` pairs, dims of the index ascending, keeps not growing, the last
                at least k: search all rows by the first dim and rerank what each stage keeps by the
                next. None: the stages that ``tune`` chose, where it did, for at least this k, and
                at most a tenth of the vectors were added since; else exact.
            exact: The k best at width D by fp64 scores, provably: rows are dropped only where a
                bound on their score says that they cannot be among them. On a device scores that
                are equal in fp32 are equal. An error together with stages.
            allowed: Searches these vectors only: ``[n]`` int64 ids, of which unknown ones are
                ignored, or ``[N]`` bool, aligned with ``ids``. On the CPU, where they are few (one
                in 32), they alone are read. On a device only a mask that is there, of an index from
                which nothing was removed, does not pass through the host.
            out: A SearchResult of contiguous ``[B, k]`` fp32 and int64 tensors or arrays, of the
                kind and on the device of the queries, to write to.

        Returns:
            SearchResult: scores ``[B, k]`` fp32 at the last stage's dim and ids ``[B, k]`` int64,
                best first, of the kind of the queries and where they are; −inf and −1 where
                missing. Equal scores are in the order the vectors were added. An exact search's is
                an ExactResult, which says how many rows were read.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values, stages that do
                not fit.
        """
        q = self._queries(queries)
        k = check_int(k, "k", 1)
        if exact and stages is not None:
            raise ValueError("exact: expected False where stages are given, got True")
        now = self._store.snapshot
        checked = (
            self._tuned_stages(k, now) if stages is None else inputs.stages(stages, self.dims, k)
        )
        q = self._rotated(q, now)
        rows, _held = self._allowed(allowed, now)
        if exact or checked is None:
            *found, touched = self._engine.exact_search(q, rows, self.width, k, self.metric)
            result = ExactResult(*found)
            result.rows_touched = touched
        else:
            result = SearchResult(*self._engine.search_rows(q, rows, checked, self.metric))
        return result_like(queries, result, out)

    def range_search(self, queries: Any, threshold: float, *, allowed: Any = None) -> RangeResult:
        """Every vector whose score at width D is at least a threshold, provably.

        Equals what an exact search for all vectors returns, down to the threshold.

        Args:
            queries: ``[B, D]`` floating point.
            threshold: Of scores: with ``"l2"``, −r² for the vectors within a distance r.
            allowed: As in ``search``.

        Returns:
            RangeResult: limits ``[B + 1]`` int64, and scores fp32 and ids int64 of all queries one
                after the other.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values.
        """
        q = self._queries(queries)
        least = inputs.number(threshold, "threshold")
        now = self._store.snapshot
        rows, _held = self._allowed(allowed, now)
        found = self._engine.range_search(
            self._rotated(q, now), rows, self.width, least, self.metric
        )
        return result_like(queries, RangeResult(*found))

    def tune(
        self,
        queries: Any,
        k: int = 10,
        recall: float = 0.99,
        *,
        batch: int | None = None,
        confidence: float = 0.95,
        progress: bool = True,
    ) -> tuning.TuneReport:
        """Finds the fastest stages that reach a recall, by measuring on this machine.

        Plain searches for at most this k use them from then on.

        Args:
            queries: ``[n, D]`` samples of what will be asked, at least 256, none of them used to
                train or to tune before.
            k: Neighbours a query. recall: Share of the exact k best that must be found, in (0, 1].
            batch: Queries a call whose time counts; None is all of them at once.
            confidence: That the stages reach it on further queries of this kind, in [0.5, 1).
            progress: Show a bar.

        Returns:
            TuneReport: ``stages`` (None where the exact search is the fastest or nothing else is
            safe) and a row for every list that was tried; ``print`` shows the table, ``plot(path)``
            draws it.

        Raises:
            ValueError, TypeError: Too few queries, a wrong shape or dtype; an empty index.
        """
        q = inputs.vectors(queries, "queries", self.width).float()
        report = tuning.tune(
            self, q, k, recall, batch=batch, confidence=confidence, progress=progress
        )
        self._tuned = Tuned(report.stages, report.k, len(self))
        return report

    def explain(self, stages: Sequence[tuple[int, int]], *, batch: int = 1) -> tuning.Explanation:
        """What a stage list costs a query: rows visited, multiply-adds, bytes read.

        Args:
            stages: As in ``search``.
            batch: Queries a call; they share what is read of the first stage.
        """
        return tuning.explain(self, stages, batch=batch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the folder does not have yet; until that is done it holds what it held.

        Writes new vectors only, where this index was saved to the folder, or loaded from it,
        before. Its vectors then stay where they are, in memory.

        Args:
            path: A folder: new, empty, or with an index, which is replaced.

        Raises:
            ValueError: A folder with other files, or with an index that is damaged or of another
                version; one that another index has been saved to since this one was.
            OSError: The folder cannot be written to, or the disk is full.
        """
        tuned = self._tuned
        with self._writing:
            fields = {
                "dims": list(self.dims),
                "metric": self.metric,
                "dtype": self.dtype,
                "prefix_dtype": self.prefix_dtype,
                "rotation": None if self._rotation is None else "pca",
                "next_id": self._next_id,
                "tuned": None if tuned is None else tuned._asdict(),
            }
            now = self._store.snapshot

            def replaced(saved: folder.Saved) -> None:
                self._saved, self._store.unmoved = saved, now.count

            contents = folder.Contents(
                fields, self._layout, now.blocks, now.counts, now.alive, self.rotation
            )
            folder.save(Path(path), contents, self._saved, self._store.unmoved, replaced)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: str = "cpu", verify: bool = False
    ) -> MatryoshkaIndex:
        """Opens what ``save`` wrote, without reading it: vectors come from the file as they are
        needed, so that an index may be larger than memory.

        Args:
            path: The folder. Its files must not be changed but by ``save``, which may run
                meanwhile.
            device: As for a new index; with a copy to another device everything is read.
            verify: Read every file and compare its checksum. The manifest's is always compared.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: Another version, or damage: names the file and the field.
        """
        device = inputs.device(device)
        index, contents, saved = folder.load(
            Path(path), partial(cls._of_fields, device), verify=verify
        )
        if index._rotation is not None:
            index._rotation.axes = contents.axes
        index._store.adopt(contents.blocks, contents.counts, contents.alive)
        index._saved = saved
        return index

    @classmethod
    def from_faiss(
        cls,
        index: Any,
        dims: Sequence[int] | None = None,
        *,
        dtype: str = "float32",
        prefix_dtype: str = "float32",
        rotation: str | None = None,
    ) -> MatryoshkaIndex:
        """An index of a FAISS index's vectors, in their order, with its metric and ids.

        An exact search finds what FAISS finds, up to the order of equal scores and the rounding of
        its sums. An inner-product index stays one, of unit vectors too. Codes of a scalar quantiser
        become the vectors that they stand for, as FAISS decodes them.

        Args:
            index: faiss.IndexFlat (IP, L2), IndexScalarQuantizer, or IndexIDMap or IndexIDMap2 of
                one.
            dims: Prefix widths, the last the index's. None: the width, and its halves down to 64.
            dtype, prefix_dtype, rotation: As for a new index; a rotation is fitted on vectors from
                all over the index.

        Raises:
            TypeError: Another kind of index; names it and those that are supported.
            ValueError: Another metric than inner product and L2; ids below 0 or given twice; dims
                that do not end at the index's width.
            ImportError: FAISS is not installed.
        """
        from mrl_fast.search.index.faiss_flat import from_faiss

        return from_faiss(
            cls, index, dims, dtype=dtype, prefix_dtype=prefix_dtype, rotation=rotation
        )

    def to_faiss(self) -> Any:
        """A FAISS flat index of the vectors, in the order of rows. No other thread may change this
        index meanwhile.

        Its exact searches find what ours find; for ``"l2"`` FAISS's scores are squared distances.
        ``"cosine"`` becomes unit vectors under inner products (vectors of norm 0 stay 0): queries
        must be normalised too. Vectors are fp32 there.

        Returns:
            faiss.IndexFlatIP or IndexFlatL2 where ids are 0, 1, 2, … in the order of rows; else
            faiss.IndexIDMap2 of one.

        Raises:
            ImportError: FAISS is not installed.
        """
        from mrl_fast.search.index.faiss_flat import to_faiss

        return to_faiss(self)

    @classmethod
    def _of_fields(cls, device: str, fields: dict[str, Any]) -> tuple[MatryoshkaIndex, Layout]:
        index = cls(
            fields["dims"],
            metric=fields["metric"],
            dtype=fields["dtype"],
            prefix_dtype=fields["prefix_dtype"],
            rotation=fields["rotation"],
            device=device,
        )
        index._next_id = fields["next_id"]
        if (tuned := fields["tuned"]) is not None:
            if not isinstance(tuned, dict) or set(tuned) != set(Tuned._fields):
                raise ValueError(f"tuned: expected {', '.join(Tuned._fields)}, got {tuned!r:.80}")
            k = check_int(tuned["k"], "tuned k", 1, MANY)
            stages = tuned["stages"]
            if stages is not None:
                stages = inputs.stages(stages, index.dims, k)
                check_int(stages[0][1], "tuned keep", 1, MANY)
            index._tuned = Tuned(stages, k, check_int(tuned["rows"], "tuned rows", 0, MANY))
        return index, index._layout

    def _tuned_stages(self, k: int, now: Snapshot) -> list[tuple[int, int]] | None:
        stages, tuned_k, rows = self._tuned or (None, 0, 0)
        if stages is None or k > tuned_k or now.size > 1.1 * rows:
            return None
        return [*stages[:-1], (stages[-1][0], k)]

    def _allowed(self, allowed: Any, now: Snapshot) -> tuple[Any, Any]:
        """The rows to search, and what must be kept meanwhile."""
        checked = None if allowed is None else inputs.allowed(allowed, now.size)
        return self._engine.restricted(now, checked)

    def _queries(self, queries: Any) -> Tensor:
        """``[B, D]`` where the index is searched, fp32 or as the vectors are stored; finite, as far
        as the host can see."""
        q = inputs.matrix(queries, "queries", self.width)
        if q.device.type == "cpu" and self.device != "cpu":
            check_finite(q, "queries")
        as_stored = self.device != "cpu" and q.dtype == DTYPES[self.dtype]
        return q.to(self.place, q.dtype if as_stored else torch.float32)
