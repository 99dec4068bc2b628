"""What every kind of index is asked in the same words: its searches, checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mrl_fast.search.index import cost, tuning
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.answers import Asked, Found
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.queries import checked_queries
from mrl_fast.search.index.stages import checked_stages, plain_stages, tuned_now
from mrl_fast.shared.arrays import result_like
from mrl_fast.shared.checks import check_int
from mrl_fast.shared.types import (
    ExactResult,
    RangeResult,
    SearchResult,
    Stage,
    StagedResult,
    Tuned,
)

T = TypeVar("T")
ALONE = nullcontext()


class State(Protocol):
    """An index as one change left it.

    Attributes:
        size: How many vectors it holds.
        graph: None where there is none.
    """

    @property
    def size(self) -> int: ...
    @property
    def graph(self) -> Any: ...


class Searchable(ABC):
    """Searches, and their tuning, of an index that knows how to answer a checked question."""

    config: IndexConfig

    def _begin(self, config: IndexConfig) -> None:
        self.config = config
        self._tuned: Tuned | None = None
        self._checked_last: tuple[Any, list[Stage]] = None, []  # the stages asked for last
        self._lapses_said: set[str] = set()  # why its stages are not used, where that was warned of

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
    has_graph = property(lambda self: self._now().graph is not None, doc="Of ``build_graph``.")

    @property
    @abstractmethod
    def on_disk(self) -> bool:
        """Whether vectors lie in files, which are mapped to memory."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def explain(self, stages: Sequence[Stage], *, batch: int = 1) -> cost.Explanation:
        """What ``stages``, as in ``search``, cost a query: rows visited, multiply-adds, bytes read.
        A ``batch`` of queries shares what the first stage reads."""

    @abstractmethod
    def _now(self) -> State: ...

    @abstractmethod
    def _nearest(self, now: Any, asked: Asked, allowed: Any) -> Found:
        """The answer to a search of the state ``now``."""

    @abstractmethod
    def _within(
        self, now: Any, asked: Asked, threshold: float, allowed: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Limits, scores and ids of the rows that reach a threshold."""

    def _together(self) -> AbstractContextManager[None]:
        """What a question is checked and answered in."""
        return ALONE

    def _lead(self, call: Callable[[], T], *asked: Any) -> T:
        """What a call returns that searches many times, and what by the time that it took; it was
        asked with these arguments."""
        return call()

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
        with self._together():
            asked, now = self._asked(queries, k, dim, stages, exact=exact, allowed=allowed)
            found = self._nearest(now, asked, allowed)
        if found.touched is not None:
            result = ExactResult(found.scores, found.ids)
            result.rows_touched = found.touched
        else:
            result = StagedResult(found.scores, found.ids)
            result.stages = asked.stages or []
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
        with self._together():
            q, dim = checked_queries(queries, self.config, dim)
            least = inputs.threshold(threshold, self.metric)
            found = self._within(self._now(), Asked(q, 0, dim, None), least, allowed)
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
        with self._together():
            q = inputs.vectors(queries, "queries", self.width).float()
            tune = partial(
                tuning.tune, self, q, k, recall,
                batch=batch, confidence=confidence, seconds=seconds, progress=progress,
            )  # fmt: skip
            report = self._lead(tune, q, k, recall, batch, confidence, seconds)
            self._tuned = Tuned(report.stages, report.k, len(self), report.target)
            self._lapses_said = set()
        return report

    def _asked(
        self, queries: Any, k: int, dim: int | None, stages: Sequence[Stage] | None, *,
        exact: bool, allowed: Any,
    ) -> tuple[Asked, Any]:  # fmt: skip
        """The question, checked, and the state of the index that is asked."""
        if stages is not None and (exact or dim is not None):
            name, expected, got = ("exact", False, exact) if exact else ("dim", None, dim)
            raise ValueError(f"{name}: expected {expected} where stages are given, got {got}")
        q, dim = checked_queries(queries, self.config, dim)
        k, now, checked = check_int(k, "k", 1), self._now(), None
        if stages is not None:
            checked = self._checked(stages, k, dim)
        elif dim == self.width and not exact and self._tuned is not None:
            checked = plain_stages(
                self._tuned, k, now.size, self._lapses_said,
                filtered=allowed is not None, has_graph=now.graph is not None,
            )  # fmt: skip
        return Asked(q, k, dim, checked), now

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
