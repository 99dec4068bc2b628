"""An index over nested vectors: search a short prefix of every row, rerank the few that are
left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from mrl_fast.search.index import answers, cost
from mrl_fast.search.index.answers import Asked, Found
from mrl_fast.search.index.config import IndexConfig, default_codes
from mrl_fast.search.index.persistence import Persistent
from mrl_fast.search.index.rows import IndexRows
from mrl_fast.search.index.searchable import Searchable
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.shared.checks import check_dims
from mrl_fast.shared.types import Stage

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


class MatryoshkaIndex(Searchable, Persistent):
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

    nbytes = property(lambda self: self._rows.snapshot.nbytes, doc="Of vectors, codes, norms, ids.")

    @property
    def on_disk(self) -> bool:
        return self._rows.snapshot.on_disk

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

    def explain(self, stages: Sequence[Stage], *, batch: int = 1) -> cost.Explanation:
        return cost.explain(self, stages, batch=batch)

    def _now(self) -> Snapshot:
        return self._rows.snapshot

    def _nearest(self, now: Snapshot, asked: Asked, allowed: Any) -> Found:
        return answers.nearest(self._rows, now, asked, allowed)

    def _within(
        self, now: Snapshot, asked: Asked, threshold: float, allowed: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return answers.within(self._rows, now, asked, threshold, allowed)
