"""An index over nested vectors: search a short prefix of every row, rerank the few that are
left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from mrl_fast.search.index import cost, tuning
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.config import IndexConfig, default_codes
from mrl_fast.search.index.graph import LEAST_SHARE, walks
from mrl_fast.search.index.persistence import Persistent
from mrl_fast.search.index.queries import checked_queries
from mrl_fast.search.index.rows import IndexRows
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.search.index.stages import checked_stages, plain_stages, tuned_now
from mrl_fast.shared.arrays import result_like
from mrl_fast.shared.checks import check_dims, check_int
from mrl_fast.shared.types import (
    ExactResult,
    RangeResult,
    SearchResult,
    Stage,
    StagedResult,
    Tuned,
)

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


class MatryoshkaIndex(Persistent):
    """Exact and adaptive search over vectors whose prefixes are embeddings.

    Whole vectors are added, and queries may be prefixes: what sentence-transformers encodes with
    ``truncate_dim=d`` searches the first d columns of every vector. An index of vectors that were
    truncated themselves has a D of that width.

    Any number of threads may search while others add, remove, update or save, which take turns: a
    search sees the index as one of them left it. Pickled, an index that was loaded and not changed
    since is its folder's path, which is refused once another has saved there; any other is its
    vectors. A copy is independent.

    A process that searches takes ``nbytes``, the 200 MiB or so of Python and PyTorch, and scratch
    that malloc keeps for the next search: 35 MiB after 256 queries that keep 2,000 rows each.

    Args:
        dims: Prefix widths that stages and queries may have, in any order, none twice. The largest
            is the vectors' width D; the smallest is laid out for scanning, so it should be the dim
            that searches start with.
        metric: As in ``prefix_topk``: ``"cosine"``, ``"ip"`` or ``"l2"``.
        dtype: What vectors are stored as: ``"float32"``, ``"float16"``, ``"bfloat16"`` or
            ``"int8"``. They are rounded to it as they are added, and are from then on what it
            holds: exact search is exact by that. With ``"int8"`` a row is codes of −127 to 127 and
            one scale, the largest |value| / 127, and stands for code · scale, in fp32; one of which
            no value is as large as 2e-36 becomes 0. It takes 4 bytes a row beside those of codes,
            norms and id, and no fp32 prefix: exact search reads all codes of every row, but with
            ``codes="bits"`` or ``prefix_dtype="int8"``. On a device its vectors are fp32.
        prefix_dtype: Without codes, what the first prefix is scanned as: ``"float32"``, or
            ``"int8"``, a quarter of the bytes: a code with one scale a row, for shortlists and
            bounds only. Scores are those of the vectors as stored.
        codes: ``"bits"``, the default for fp32 vectors of 128 to 8192 columns on the CPU where no
            prefix_dtype is given, codes every column in eight bits, of which the first four and the
            first, the sign, are read by themselves; less the mean of the first vectors, where that
            is a large part of them. A stage may then rank by one or four bits, and exact search
            reads four bits of all rows, eight of some, and the vectors of a few. It takes 9 bits a
            column and 8 or 12 bytes a dim more. On a device rows have eight bits of every column as
            int8, not less the mean, and 12 or 16 bytes more; by all D columns exact search and
            range search scan these, and stages may rank by them.
        rotation: ``"pca"`` for vectors that were not trained to be cut: an orthogonal rotation that
            puts their energy first, fitted by ``fit`` or else on the first vectors that are added.
            Inner products, distances and full-width cosines keep their values up to rounding.
        device: ``"cpu"``, or ``"cuda"`` or ``"cuda:<number>"``: vectors are changed, saved and
            loaded on the host, and a row-major copy on the device is searched. A search with
            queries there waits for nothing, runs on the current stream and can be captured in a
            CUDA graph, whose replays search the rows of its time as long as the index lives.

    Raises:
        ValueError, TypeError: A dim given twice, an unknown metric, dtype or rotation.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        metric: str = "cosine",
        dtype: str = "float32",
        prefix_dtype: str | None = None,
        codes: str | None = None,
        rotation: str | None = None,
        device: str = "cpu",
    ):
        widths = tuple(sorted(check_dims(dims, ascending=False)))
        if prefix_dtype is None and codes is None:
            codes = default_codes(widths, dtype, device)
        prefix = "float32" if prefix_dtype is None else prefix_dtype
        self._make(IndexConfig(widths, metric, dtype, prefix, codes, rotation, device))

    dims = property(lambda self: self.config.dims)
    metric = property(lambda self: self.config.metric)
    dtype = property(lambda self: self.config.dtype)
    prefix_dtype = property(lambda self: self.config.prefix_dtype)
    codes = property(lambda self: self.config.codes)
    device = property(lambda self: self.config.device)
    tuned = property(
        lambda self: tuned_now(self._tuned, len(self)),
        doc="What ``tune`` chose and whether it is in force, a Tuned; None before.",
    )
    place = property(lambda self: self.config.place, doc="Where kernels run.")
    width = property(lambda self: self.config.width, doc="D, the width of the vectors.")
    nbytes = property(lambda self: self._rows.snapshot.nbytes, doc="Of vectors, codes, norms, ids.")

    @property
    def ids(self) -> Tensor:
        """The vectors' ids in the order of rows, ``[N]`` int64.

        That is the order of adding, but ``update`` moves rows to the end: a mask that was made of
        them before it, or beside writers, is of other rows, where a list of ids stays right.
        """
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
        tuned = f", graph of {now.graph.rows:,}{tuned}" if now.graph else tuned
        return (
            f"MatryoshkaIndex({self.config}): {now.size:,} vectors{removed}, "
            f"{now.nbytes / 2**20:,.1f} MiB{tuned}"
        )

    fit = of_rows(IndexRows.fit)
    add = of_rows(IndexRows.add)
    update = of_rows(IndexRows.update)
    remove = of_rows(IndexRows.remove)
    compact = of_rows(IndexRows.compact)
    build_graph = of_rows(IndexRows.build_graph)
    contains = of_rows(IndexRows.contains)
    reconstruct = of_rows(IndexRows.reconstruct)

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        dim: int | None = None,
        stages: Sequence[Stage] | None = None,
        exact: bool = False,
        allowed: Any = None,
        out: SearchResult | None = None,
    ) -> StagedResult | ExactResult:
        """The k nearest vectors of each query, by all columns or by a prefix.

        Args:
            queries: ``[B, D]`` floating point, or ``[B, d]`` of a prefix, d in ``dims``: tensor,
                numpy array, DLPack object or list of rows. A single query ``[D]`` is ``[1, D]``,
                with results ``[1, k]``. With a rotation, which mixes all columns, only ``[B, D]``.
            k: Neighbours a query, at least 1; those beyond the number of vectors are missing.
            dim: Search by the first ``dim`` columns, in ``dims`` and at most the queries' width;
                None is all that the queries have. An error together with stages.
            stages: ``(dim, keep)`` pairs, dims of the index ascending, keeps not growing, the last
                at least k: search all rows by the first dim and rerank what each stage keeps by the
                next. With codes the first may be ``(dim, 1, keep)``, by the signs of any prefix, or
                ``(D, 4, keep)``, by four bits of every column, and what it keeps may be ranked by
                more bits, ``(D, 4, keep)`` or ``(D, 8, keep)``, before vectors are read: ``[(D, 1,
                500), (D, 8, 100), (D, 10)]`` reads 100 of them, which saves time where these lie
                on disk, codes in memory. On a device the first may be ``(D, 8, keep)``, and with an
                int8 prefix ``(dims[0], 8, keep)``; the next may have that dim again. No dim may be
                larger than the queries' width. None: the stages that ``tune`` chose, where it did,
                for at least this k, at most a tenth of the vectors were added since, and all D
                columns of all vectors are searched; else exact, and where they lapsed or vectors
                are ``allowed`` a warning says so once.
                After ``build_graph`` the first may be ``("graph", beam, keep)``: of the ``beam``
                best rows by signs that it comes by, the ``keep`` best by four bits go on, and as
                many of those that were added since. A larger beam finds more. Where under an eighth
                of the rows may be found, the search is exact instead.
            exact: The k best by fp64 scores, provably: a row is dropped only where a bound on its
                score excludes it. By a dim between the first and D the CPU knows no bounds and
                reads that prefix of every row. On a device scores that are equal in fp32 are equal.
                An error together with stages.
            allowed: Searches these vectors only: ``[n]`` ids, as in ``add``, of which unknown ones
                are ignored, or ``[N]`` bool or uint8 (0 or 1, never ids), aligned with ``ids``. On
                the CPU, where they are few (under one in 64), they alone are read. A mask is of the
                rows of its moment: beside writers pass ids. A bool mask already on the device is
                used in place if nothing was removed; other filters pass through the host.
            out: A SearchResult of contiguous ``[B, k]`` fp32 and int64 tensors or arrays, of the
                kind and on the device of the queries, to write to.

        Returns:
            SearchResult: scores ``[B, k]`` fp32 at the last stage's dim, or the dim searched by,
                and ids ``[B, k]`` int64, best first, equal scores in the order of adding, of the
                kind and on the device of the queries (of a list, tensors); −inf and −1 where
                missing. Its ``stages`` are those it came by: None where the search was exact, which
                returns an ExactResult.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values, stages that do
                not fit.
        """
        if stages is not None and (exact or dim is not None):
            name, expected, got = ("exact", False, exact) if exact else ("dim", None, dim)
            raise ValueError(f"{name}: expected {expected} where stages are given, got {got}")
        q, dim = checked_queries(queries, self.config, dim)
        k, now, checked = check_int(k, "k", 1), self._rows.snapshot, None
        if stages is not None:
            checked = self._checked(stages, k, dim)
        elif dim == self.width and not exact:
            filtered = allowed is not None
            checked = plain_stages(
                self._tuned, k, now.size, self._lapses_said,
                filtered=filtered, has_graph=now.graph is not None,
            )  # fmt: skip
        rows, q, _keepalive = self._searched(now, allowed, q)
        graph = None
        if checked is not None and walks(checked):
            if now.graph is None:
                raise ValueError("stages[0]: expected a graph: build_graph() first, got none")
            if rows.eligible >= LEAST_SHARE * now.count:
                graph = now.graph
            else:  # a walk would pass through many rows for each that may be found
                dim, checked = checked[-1][0], None
        if checked is None:
            *found, touched = self._rows.backend.exact_search(q, rows, dim, k, self.metric)
            result = ExactResult(*found)
            result.rows_touched = touched
        else:
            walk = {} if graph is None else {"graph": graph.native}
            found = self._rows.backend.search_rows(q, rows, checked, self.metric, **walk)
            result = StagedResult(*found)
            result.stages = checked
        return result_like(queries, result, out)

    def range_search(
        self, queries: Any, threshold: float, *, dim: int | None = None, allowed: Any = None
    ) -> RangeResult:
        """Every vector whose score, by all columns or by a prefix, is at least a threshold,
        provably.

        Equals what an exact search for all vectors returns, down to the threshold.

        Args:
            queries, dim, allowed: As in ``search``.
            threshold: Of scores: with ``"l2"``, −r² for the vectors within a distance r, so at most
                0.

        Returns:
            RangeResult: limits ``[B + 1]``, and the scores and ids of one query after the other.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values.
        """
        q, dim = checked_queries(queries, self.config, dim)
        least, now = inputs.threshold(threshold, self.metric), self._rows.snapshot
        rows, q, _keepalive = self._searched(now, allowed, q)
        found = self._rows.backend.range_search(q, rows, dim, least, self.metric)
        return result_like(queries, RangeResult(*found))

    def tune(
        self,
        queries: Any,
        k: int = 10,
        recall: float = 0.99,
        *,
        batch: int | None = None,
        confidence: float = 0.95,
        seconds: float = 20.0,
        progress: bool = True,
    ) -> tuning.TuneReport:
        """Finds the fastest stages that reach a recall, by measuring on this machine.

        Plain searches of all vectors for at most this k use them from then on: ``tuned`` says while
        they do. What is shown holds for all vectors: with ``allowed`` a plain search is exact.

        Args:
            queries: ``[n, D]`` samples of what will be asked, at least 256, none of them used to
                train or to tune before.
            k: Neighbours a query. recall: Share of the exact k best that must be found, in (0, 1].
            batch: Queries a call whose time counts; None is all of them at once.
            confidence: That the stages reach it on further queries of this kind, in [0.5, 1).
            seconds: About how long it may take; the report says what was left out for it.
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
            self, q, k, recall,
            batch=batch, confidence=confidence, seconds=seconds, progress=progress,
        )  # fmt: skip
        self._tuned = Tuned(report.stages, report.k, len(self), report.target)
        self._lapses_said = set()
        return report

    def explain(self, stages: Sequence[Stage], *, batch: int = 1) -> cost.Explanation:
        """What ``stages``, as in ``search``, cost a query: rows visited, multiply-adds, bytes read.
        A ``batch`` of queries shares what the first stage reads."""
        return cost.explain(self, stages, batch=batch)

    def _checked(self, stages: Sequence[Stage], k: int, dim: int) -> list[Stage]:
        """As ``checked_stages``, which takes 8 µs: what was checked last is known by its text."""
        if type(stages) not in (list, tuple) or any(type(s) not in (list, tuple) for s in stages):
            return checked_stages(stages, self.config, k, dim)  # others' texts may not tell
        asked = repr(stages), k, dim
        last, checked = self._checked_last
        if asked != last:
            checked = checked_stages(stages, self.config, k, dim)
            self._checked_last = asked, checked
        return [*checked]

    def _searched(self, now: Snapshot, allowed: Any, q: Tensor) -> tuple[Any, Tensor, Any]:
        """The rows to search, the queries in their space, and a keepalive for both."""
        q = self._rows.backend.queries(q, self.config)
        rows, keepalive = self._rows.backend.restricted(now, inputs.allowed(allowed, now.size))
        rotation = self._rows.rotation
        if rotation is not None and now.count:
            q = self._rows.backend.rotated(q, rotation)
        return rows, q, keepalive
