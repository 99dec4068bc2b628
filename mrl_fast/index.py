"""An index over nested vectors: search a short prefix of every row, rerank the few that are left.

The first prefix lies in tiles for scanning, as it is or as int8, and the other columns row-major
for reranking; a search goes from one to the other, and no fp32 column is stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast import cpu
from mrl_fast import tune as tuning
from mrl_fast._arrays import as_tensor, like, result_like
from mrl_fast._checks import (
    METRICS,
    check_choice,
    check_dims,
    check_finite,
    check_int,
    check_matrix,
    check_stages,
)
from mrl_fast._types import ExactResult, SearchResult
from mrl_fast.rotation import Rotation

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PREFIX_DTYPES = ("float32", "int8")


class MatryoshkaIndex:
    """Exact and adaptive search over vectors whose prefixes are embeddings, in memory, on the CPU.

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
    ):
        self.dims = check_dims(dims)
        self.metric = check_choice(metric, "metric", METRICS)
        self.dtype = check_choice(dtype, "dtype", tuple(DTYPES))
        self.prefix_dtype = check_choice(prefix_dtype, "prefix_dtype", PREFIX_DTYPES)
        if prefix_dtype == "int8" and self.dims[0] > 1 << 15:  # sums of codes are int32
            raise ValueError(
                f"dims[0]: expected at most {1 << 15} with prefix_dtype='int8', got {self.dims[0]}"
            )
        if rotation is not None:
            check_choice(rotation, "rotation", ("pca",))
        self._rotation = None if rotation is None else Rotation(self.width)
        layout = cpu.Layout(self.dims[0], self.width, DTYPES[dtype], coded=prefix_dtype == "int8")
        self._store = cpu.Store(layout)
        self._next_id = 0  # one more than the largest id
        self._tuned: tuple[list[tuple[int, int]] | None, int, int] | None = None  # stages, k, rows

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return self.dims[-1]

    @property
    def ids(self) -> Tensor:
        """The rows' ids in the order they were added, ``[N]`` int64."""
        return self._store.ids.clone()

    @property
    def rotation(self) -> Tensor | None:
        """The rotation, ``[D, D]`` fp32, its rows the new axes; None where there is none yet."""
        return None if self._rotation is None else self._rotation.axes

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes: vectors, codes, norms, ids."""
        return self._store.nbytes

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        prefix = "" if self.prefix_dtype == "float32" else f", prefix_dtype={self.prefix_dtype!r}"
        rotation = "" if self._rotation is None else ", rotation='pca'"
        return (
            f"MatryoshkaIndex(dims={self.dims}, metric={self.metric!r}, dtype={self.dtype!r}"
            f"{prefix}{rotation}): {len(self):,} vectors, {self.nbytes / 2**20:,.1f} MiB"
        )

    def fit(self, samples: Any) -> None:
        """Fits the rotation to samples, instead of to the first vectors that are added.

        Args:
            samples: ``[n, D]`` floating point; a few times D of them are enough.

        Raises:
            ValueError, TypeError: An index without rotation, or one that holds vectors already;
                samples of a wrong shape or dtype, NaN or infinite values, or none.
        """
        if self._rotation is None:
            raise ValueError("rotation: expected 'pca' where samples are given, got None")
        if len(self):
            raise ValueError(f"samples: expected an empty index, got {len(self)} vectors in it")
        x = self._check_vectors(samples, "samples")
        if not len(x):
            raise ValueError("samples: expected at least one vector, got none")
        self._rotation = Rotation(self.width).fit(x)

    def add(self, vectors: Any, ids: Any = None) -> None:
        """Appends vectors; all of them or, where anything is wrong, none.

        Vectors that are stored never move: adding costs what the new vectors cost.

        Args:
            vectors: ``[n, D]`` floating point, any row stride: tensor, numpy array or DLPack
                object.
            ids: ``[n]`` int64, at least 0, none of them in use; default: consecutive after the
                largest.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values, an id that is
                taken.
        """
        x = self._check_vectors(vectors, "vectors")
        new_ids = self._check_ids(ids, len(x))
        if not len(x):
            return
        rotation = self._rotation
        if rotation is not None and rotation.axes is None:
            rotation = Rotation(self.width).fit(x)

        def convert(part: Tensor) -> Tensor:
            if rotation is not None:
                part = rotation.apply(part)
            stored = part.to(DTYPES[self.dtype])
            if stored.dtype != part.dtype:
                check_finite(stored, f"vectors as {self.dtype}")
            return stored

        self._store.append(x, new_ids, convert)
        self._rotation = rotation
        self._next_id = max(self._next_id, int(new_ids.max()) + 1)

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        stages: Sequence[tuple[int, int]] | None = None,
        exact: bool = False,
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
                bound on their score says that they cannot be among them. An error together with
                stages.

        Returns:
            SearchResult: scores ``[B, k]`` fp32 at the last stage's dim and ids ``[B, k]`` int64,
                best first, of the kind of the queries; −inf and −1 where missing. Equal scores are
                in the order the vectors were added. An exact search's is an ExactResult, which says
                how many rows were read.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values, stages that do
                not fit.
        """
        q = self._check_matrix(queries, "queries").float()
        k = check_int(k, "k", 1)
        if exact and stages is not None:
            raise ValueError("exact: expected False where stages are given, got True")
        if self._rotation is not None and len(self):
            q = self._rotation.apply(q)
        checked = self._tuned_stages(k) if stages is None else self._check_stages(stages, k)
        rows, _alive = self._store.snapshot
        if exact or checked is None:
            scores, found, touched = cpu.exact_search(q, rows, self.width, k, self.metric)
            result = ExactResult(scores, found)
            result.rows_touched = touched
        else:
            scores, found = cpu.search_rows(q, rows, checked, self.metric)
            result = SearchResult(scores, found)
        return result_like(queries, result)

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
        q = self._check_vectors(queries, "queries").float()
        report = tuning.tune(
            self, q, k, recall, batch=batch, confidence=confidence, progress=progress
        )
        self._tuned = (report.stages, report.k, len(self))
        return report

    def explain(self, stages: Sequence[tuple[int, int]], *, batch: int = 1) -> tuning.Explanation:
        """What a stage list costs a query: rows visited, multiply-adds, bytes read.

        Args:
            stages: As in ``search``.
            batch: Queries a call; they share what is read of the first stage.
        """
        return tuning.explain(self, stages, batch=batch)

    def reconstruct(self, ids: Any) -> Any:
        """The vectors of these ids, ``[n, D]`` fp32, as stored; rotated back where they were
        rotated.

        Args:
            ids: ``[n]`` int64.

        Raises:
            ValueError, TypeError: An unknown id; a wrong shape or dtype.
        """
        wanted = as_tensor(ids, "ids")
        if wanted.dtype != torch.int64 or wanted.ndim != 1:
            raise TypeError(f"ids: expected [n] int64, got {list(wanted.shape)} {wanted.dtype}")
        by_id, order = self._store.ids.sort()
        place = torch.searchsorted(by_id, wanted)
        known = torch.zeros_like(wanted, dtype=torch.bool)
        if len(self):
            known = by_id[place.clamp(max=len(self) - 1)] == wanted
        if not known.all():
            raise ValueError(f"ids: expected ids of the index, got {int(wanted[~known][0])}")
        vectors = self._store.vectors(order[place] if len(wanted) else wanted)
        if self._rotation is not None and len(self):
            vectors = self._rotation.undo(vectors)
        return like(ids)(vectors)

    def _tuned_stages(self, k: int) -> list[tuple[int, int]] | None:
        stages, tuned_k, rows = self._tuned or (None, 0, 0)
        if stages is None or k > tuned_k or len(self) > 1.1 * rows:
            return None
        return [*stages[:-1], (stages[-1][0], k)]

    def _check_stages(self, stages: Any, k: int) -> list[tuple[int, int]]:
        checked = list(check_stages(stages))
        for i, (dim, _) in enumerate(checked):
            if dim not in self.dims:
                raise ValueError(f"stages[{i}] dim: expected one of {self.dims}, got {dim}")
        if checked[-1][1] < k:
            raise ValueError(
                f"stages: expected a last keep of at least k={k}, got {checked[-1][1]}"
            )
        return [*checked[:-1], (checked[-1][0], k)]

    def _check_vectors(self, vectors: Any, name: str) -> Tensor:
        x = self._check_matrix(vectors, name)
        check_finite(x, name)
        return x

    def _check_matrix(self, vectors: Any, name: str) -> Tensor:
        x = check_matrix(as_tensor(vectors, name), name)
        if x.device.type != "cpu":
            raise ValueError(f"{name}: expected vectors on the CPU, got {x.device}")
        if x.shape[1] != self.width:
            raise ValueError(f"{name}: expected width {self.width}, got {x.shape[1]}")
        return x

    def _check_ids(self, ids: Any, count: int) -> Tensor:
        if ids is None:
            return torch.arange(self._next_id, self._next_id + count)
        new = as_tensor(ids, "ids")
        if new.dtype != torch.int64:
            raise TypeError(f"ids: expected int64, got {new.dtype}")
        if new.shape != (count,):
            raise ValueError(f"ids: expected shape [{count}], got {list(new.shape)}")
        if count and new.min() < 0:
            raise ValueError(f"ids: expected ids of at least 0, got {int(new.min())}")
        ascending = not count or bool((new[0] >= self._next_id) & (new.diff() > 0).all())
        if not ascending:  # otherwise none can be taken
            values, counts = torch.cat([self._store.ids, new]).unique(return_counts=True)
            if len(values) < len(self) + count:
                raise ValueError(
                    f"ids: expected ids that are not in use, got {int(values[counts > 1][0])}"
                )
        return new
