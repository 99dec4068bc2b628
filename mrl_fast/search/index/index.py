"""An index over nested vectors: search a short prefix of every row, rerank the few that are
left."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial, wraps
from operator import is_
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from mrl_fast.search.disk import folder
from mrl_fast.search.index import cost, pickled, tuning
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.blocks import Layout
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.rows import IndexRows
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.search.index.stages import checked_stages, checked_tuned
from mrl_fast.shared.arrays import result_like
from mrl_fast.shared.checks import check_dims, check_int
from mrl_fast.shared.types import ExactResult, RangeResult, SearchResult, Stage, Tuned

P = ParamSpec("P")
R = TypeVar("R")


def of_rows(
    method: Callable[Concatenate[IndexRows, P], R],
) -> Callable[Concatenate[MatryoshkaIndex, P], R]:
    """A method of an index that its rows answer."""

    @wraps(method)
    def answered(index: MatryoshkaIndex, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(index._rows, *args, **kwargs)

    return answered


class MatryoshkaIndex(pickled.Copies):
    """Exact and adaptive search over vectors whose prefixes are embeddings.

    Any number of threads may search while others add, remove, update or save, which take turns: a
    search sees the index as one of them left it. Pickled, an index that was loaded and not changed
    since is its folder's path; any other is its vectors. A copy is independent.

    Args:
        dims: Prefix widths that stages may use, strictly ascending. The last is the vectors' width
            D; the first is laid out for scanning, so it should be the dim that searches start with.
        metric: As in ``prefix_topk``: ``"cosine"``, ``"ip"`` or ``"l2"``.
        dtype: What vectors are stored as: ``"float32"``, ``"float16"`` or ``"bfloat16"``. They are
            rounded to it as they are added.
        prefix_dtype: What the first prefix is scanned as: ``"float32"``, or ``"int8"``, a quarter
            of the bytes: a code with one scale a row, for shortlists and bounds only. Scores are
            those of the vectors as stored.
        codes: ``"bits"`` codes every column in eight bits, of which the first four and the first,
            the sign, are read by themselves; less the mean of the first vectors, where that is a
            large part of them. A stage may then rank by one or four bits, and exact search reads
            four bits of all rows, eight of some, and the vectors of a few. It takes 9 bits a column
            and 8 or 12 bytes a dim more. A device ignores them.
        rotation: ``"pca"`` for vectors that were not trained to be cut: an orthogonal rotation that
            puts their energy first, fitted by ``fit`` or else on the first vectors that are added.
            Inner products, distances and full-width cosines keep their values up to rounding.
        device: ``"cpu"``, or ``"cuda"`` or ``"cuda:<number>"``: vectors are changed, saved and
            loaded on the host, and a row-major copy on the device is searched. A search with
            queries there waits for nothing, runs on the current stream and can be captured in a
            CUDA graph, whose replays search the rows of its time as long as the index lives.

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
        codes: str | None = None,
        rotation: str | None = None,
        device: str = "cpu",
    ):
        self._make(
            IndexConfig(check_dims(dims), metric, dtype, prefix_dtype, codes, rotation, device)
        )

    def _make(self, config: IndexConfig) -> None:
        self.config, self._rows = config, IndexRows(config)
        self._tuned: Tuned | None = None
        self._saved: folder.Saved | None = None
        self._loaded_marks: tuple[Any, ...] | None = None  # as the folder has it that it is from

    dims = property(lambda self: self.config.dims)
    metric = property(lambda self: self.config.metric)
    dtype = property(lambda self: self.config.dtype)
    prefix_dtype = property(lambda self: self.config.prefix_dtype)
    codes = property(lambda self: self.config.codes)
    device = property(lambda self: self.config.device)
    tuned = property(lambda self: self._tuned, doc="What ``tune`` chose, a Tuned; None before.")
    place = property(lambda self: self.config.place, doc="Where kernels run.")
    width = property(lambda self: self.config.width, doc="D, the width of the vectors.")
    nbytes = property(lambda self: self._rows.snapshot.nbytes, doc="Of vectors, codes, norms, ids.")

    @property
    def ids(self) -> Tensor:
        """The vectors' ids in the order they were added, ``[N]`` int64."""
        return self._rows.snapshot.ids

    @property
    def rotation(self) -> Tensor | None:
        """The rotation, ``[D, D]`` fp32, its rows the new axes; None where there is none yet."""
        return None if self._rows.rotation is None else self._rows.rotation.axes

    @property
    def removed(self) -> int:
        """Vectors that were removed or replaced and take room until ``compact``."""
        now = self._rows.snapshot
        return now.count - now.size

    def __len__(self) -> int:
        return self._rows.snapshot.size

    def __repr__(self) -> str:
        now = self._rows.snapshot
        removed = f", {now.count - now.size:,} removed" if now.count > now.size else ""
        tuned = "" if self._tuned is None or not self._tuned.stages else ", tuned"
        return (
            f"MatryoshkaIndex({self.config}): {now.size:,} vectors{removed}, "
            f"{now.nbytes / 2**20:,.1f} MiB{tuned}"
        )

    fit = of_rows(IndexRows.fit)
    add = of_rows(IndexRows.add)
    update = of_rows(IndexRows.update)
    remove = of_rows(IndexRows.remove)
    compact = of_rows(IndexRows.compact)
    contains = of_rows(IndexRows.contains)
    reconstruct = of_rows(IndexRows.reconstruct)

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        stages: Sequence[Stage] | None = None,
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
                next. With codes the first may be ``(dim, 1, keep)``, by the signs of any prefix, or
                ``(D, 4, keep)``, by four bits of every column. None: the stages that ``tune``
                chose, where it did, for at least this k, and at most a tenth of the vectors were
                added since; else exact.
            exact: The k best at width D by fp64 scores, provably: a row is dropped only where a
                bound on its score excludes it. On a device scores that are equal in fp32 are
                equal. An error together with stages.
            allowed: Searches these vectors only: ``[n]`` ids, as in ``add``, of which unknown ones
                are ignored, or ``[N]`` bool, aligned with ``ids``. On the CPU, where they are few
                (one in 32), they alone are read. A bool mask already on the device is used in place
                if nothing was removed; other filters pass through the host.
            out: A SearchResult of contiguous ``[B, k]`` fp32 and int64 tensors or arrays, of the
                kind and on the device of the queries, to write to.

        Returns:
            SearchResult: scores ``[B, k]`` fp32 at the last stage's dim and ids ``[B, k]`` int64,
                best first, equal scores in the order of adding, of the kind and on the device of
                the queries; −inf and −1 where missing. Exact search returns an ExactResult.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values, stages that do
                not fit.
        """
        q = self._rows.backend.queries(inputs.matrix(queries, "queries", self.width), self.config)
        k = check_int(k, "k", 1)
        if exact and stages is not None:
            raise ValueError("exact: expected False where stages are given, got True")
        now = self._rows.snapshot
        checked = (
            self._tuned_stages(k, now) if stages is None else checked_stages(stages, self.config, k)
        )
        rows, q, _keepalive = self._searched(now, allowed, q)
        if exact or checked is None:
            *found, touched = self._rows.backend.exact_search(q, rows, self.width, k, self.metric)
            result = ExactResult(*found)
            result.rows_touched = touched
        else:
            result = SearchResult(*self._rows.backend.search_rows(q, rows, checked, self.metric))
        return result_like(queries, result, out)

    def range_search(self, queries: Any, threshold: float, *, allowed: Any = None) -> RangeResult:
        """Every vector whose score at width D is at least a threshold, provably.

        Equals what an exact search for all vectors returns, down to the threshold.

        Args:
            queries: ``[B, D]`` floating point.
            threshold: Of scores: with ``"l2"``, −r² for the vectors within a distance r.
            allowed: As in ``search``.

        Returns:
            RangeResult: limits ``[B + 1]``, and the scores and ids of one query after the other.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values.
        """
        q = self._rows.backend.queries(inputs.matrix(queries, "queries", self.width), self.config)
        least, now = inputs.number(threshold, "threshold"), self._rows.snapshot
        rows, q, _keepalive = self._searched(now, allowed, q)
        found = self._rows.backend.range_search(q, rows, self.width, least, self.metric)
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

    def explain(self, stages: Sequence[Stage], *, batch: int = 1) -> cost.Explanation:
        """What ``stages``, as in ``search``, cost a query: rows visited, multiply-adds, bytes read.
        A ``batch`` of queries shares what the first stage reads."""
        return cost.explain(self, stages, batch=batch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the folder does not have yet; until that is done it holds what it held.

        To the folder that this index was saved to last, or loaded from, only new vectors are
        written. The index's own vectors stay where they are, in memory.

        Args:
            path: A folder: new, empty, or with an index, which is replaced.

        Raises:
            ValueError: A folder with other files, or with an index that is damaged or of another
                version; one that another index has been saved to since this one was.
            OSError: The folder cannot be written to, or the disk is full.
        """
        with self._rows.changing():
            store, now, marks = self._rows.store, self._rows.snapshot, self._marks()

            def replaced(saved: folder.Saved) -> None:
                there = self._loaded_marks and self._saved and self._saved.path == saved.path
                self._loaded_marks = marks if there else None
                self._saved, store.saved_prefix_rows = saved, now.count

            contents = folder.Contents(
                self._fields(),
                self._rows.layout,
                now.blocks,
                now.counts,
                now.live,
                self._rows.frame,
            )
            folder.save(Path(path), contents, self._saved, store.saved_prefix_rows, replaced)

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
        make = partial(cls._from_fields, inputs.device(device))
        index, contents, index._saved = folder.load(Path(path), make, verify=verify)
        next_id = index._saved.manifest["next_id"]
        index._rows.adopt(contents.blocks, contents.counts, contents.alive, contents.axes, next_id)
        index._rows.store.saved_prefix_rows = sum(contents.counts)
        index._loaded_marks = index._marks()
        return index

    @classmethod
    def from_faiss(
        cls, index: Any, dims: Sequence[int] | None = None, **options: Any
    ) -> MatryoshkaIndex:
        """An index of a FAISS index's vectors, in their order, with its metric and ids.

        An exact search finds what FAISS finds, up to the order of equal scores and rounding. Codes
        of a scalar quantiser become the vectors that FAISS decodes them to.

        Args:
            index: faiss.IndexFlat (IP, L2), IndexScalarQuantizer, or IndexIDMap or IndexIDMap2 of
                one.
            dims: Prefix widths, the last the index's. None: the width, and its halves down to 64.
            options: ``dtype``, ``prefix_dtype``, ``rotation`` and ``device``, as for a new index; a
                rotation is fitted on vectors from all over the index.

        Raises:
            TypeError: Another kind of index; names it and those that are supported.
            ValueError: Another metric than inner product and L2; ids below 0 or given twice; dims
                that do not end at the index's width.
            ImportError: FAISS is not installed.
        """
        from mrl_fast.search.index.faiss_flat import from_faiss

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
        tuned = None if self._tuned is None else self._tuned._asdict()
        return {**self.config.fields, "next_id": self._rows.next_id, "tuned": tuned}

    @classmethod
    def _from_fields(cls, device: str, fields: dict[str, Any]) -> tuple[MatryoshkaIndex, Layout]:
        index = cls.__new__(cls)
        index._make(IndexConfig.from_fields(fields, device))
        if fields["tuned"] is not None:
            index._tuned = checked_tuned(fields["tuned"], index.config)
        return index, index._rows.layout

    def _tuned_stages(self, k: int, now: Snapshot) -> list[Stage] | None:
        stages, tuned_k, rows = self._tuned or (None, 0, 0)
        if stages is None or k > tuned_k or now.size > 1.1 * rows:
            return None
        return [*stages[:-1], (stages[-1][0], k)]

    def _searched(self, now: Snapshot, allowed: Any, q: Tensor) -> tuple[Any, Tensor, Any]:
        """The rows to search, the queries in their space, and a keepalive for both."""
        rows, keepalive = self._rows.backend.restricted(now, inputs.allowed(allowed, now.size))
        rotation = self._rows.rotation
        if rotation is not None and now.count:
            q = self._rows.backend.rotated(q, rotation)
        return rows, q, keepalive
