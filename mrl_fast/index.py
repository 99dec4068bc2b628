"""An index over nested vectors: search a short prefix of every row, rerank the few that are left.

No column is stored twice: the first prefix lies in vertical tiles for scanning, the other columns
    row-major for
reranking, and a search that wants both goes from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrl_fast import cpu
from mrl_fast._arrays import as_tensor, like, result_like
from mrl_fast._C import TILE
from mrl_fast._checks import (
    METRICS,
    check_choice,
    check_dims,
    check_finite,
    check_int,
    check_matrix,
    check_stages,
)
from mrl_fast._types import SearchResult

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class MatryoshkaIndex:
    """Exact and adaptive search over vectors whose prefixes are embeddings, in memory, on the CPU.

    Args:
        dims: Prefix widths that stages may use, strictly ascending. The last is the vectors' width
            D; the first is laid out for scanning, so it should be the dim that searches start with.
        metric: ``"cosine"`` (each prefix normalised on its own), ``"ip"`` or ``"l2"`` (scores are
            −squared distance).
        dtype: What the columns after the first prefix are stored as: ``"float32"``, ``"float16"``
            or ``"bfloat16"``. Vectors are rounded to it as they are added; the first prefix keeps
            the rounded values in fp32.

    Raises:
        ValueError, TypeError: Dims that do not ascend, an unknown metric or dtype.
    """

    def __init__(self, dims: Sequence[int], *, metric: str = "cosine", dtype: str = "float32"):
        self.dims = check_dims(dims)
        self.metric = check_choice(metric, "metric", METRICS)
        self.dtype = check_choice(dtype, "dtype", tuple(DTYPES))
        self._count = 0
        self._next_id = 0  # one more than the largest id
        self._tiles = torch.empty(0, self.dims[0], TILE)  # columns [0, dims[0]), fp32
        self._tail = torch.empty(0, self.width - self.dims[0], dtype=DTYPES[dtype])  # the others
        self._ids = torch.empty(0, dtype=torch.int64)

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return self.dims[-1]

    @property
    def ids(self) -> Tensor:
        """The rows' ids in the order they were added, ``[N]`` int64."""
        return self._ids[: self._count].clone()

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes, room for growth included."""
        return sum(t.numel() * t.element_size() for t in (self._tiles, self._tail, self._ids))

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return (
            f"MatryoshkaIndex(dims={self.dims}, metric={self.metric!r}, dtype={self.dtype!r}): "
            f"{len(self):,} vectors, {self.nbytes / 2**20:,.1f} MiB"
        )

    def add(self, vectors: Any, ids: Any = None) -> None:
        """Appends vectors; all of them or, where anything is wrong, none.

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
        if x.dtype != DTYPES[self.dtype]:
            x = x.to(DTYPES[self.dtype])
            check_finite(x, f"vectors as {self.dtype}")
        new_ids = self._check_ids(ids, len(x))
        begin, end, prefix = self._count, self._count + len(x), self.dims[0]
        if not len(x):
            return
        self._reserve(end)
        self._tail[begin:end] = x[:, prefix:]
        self._ids[begin:end] = new_ids
        # A tile that is already begun is completed lane by lane; the rest starts at a tile.
        lane = begin % TILE
        fill = min(-begin % TILE, len(x))
        if fill:
            self._tiles[begin // TILE, :, lane : lane + fill] = x[:fill, :prefix].T
        if fill < len(x):
            cpu.pack(x[fill:, :prefix], self._tiles[(begin + fill) // TILE :])
        self._count = end
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
                next. None searches all rows at width D.
            exact: Insist on the answer at width D; an error together with stages.

        Returns:
            SearchResult: scores ``[B, k]`` fp32 at the last stage's dim and ids ``[B, k]`` int64,
                best first, of the
            kind of the queries; −inf and −1 where missing. Equal scores are in the order the
            vectors were added.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values, stages that do
                not fit.
        """
        q = self._check_vectors(queries, "queries").float()
        k = check_int(k, "k", 1)
        if stages is None:
            checked = [(self.width, k)]
        elif exact:
            raise ValueError("exact: expected False where stages are given, got True")
        else:
            checked = list(check_stages(stages))
            for i, (dim, _) in enumerate(checked):
                if dim not in self.dims:
                    raise ValueError(f"stages[{i}] dim: expected one of {self.dims}, got {dim}")
            if checked[-1][1] < k:
                raise ValueError(
                    f"stages: expected a last keep of at least k={k}, got {checked[-1][1]}"
                )
            checked[-1] = (checked[-1][0], k)
        scores, rows = cpu.search_rows(
            q, self._tiles, self._tail, self._count, checked, self.metric
        )
        if self._count:
            rows = torch.where(rows >= 0, self._ids[rows.clamp(min=0)], -1)
        return result_like(queries, SearchResult(scores, rows))

    def reconstruct(self, ids: Any) -> Any:
        """The vectors of these ids, ``[n, D]`` fp32, as stored.

        Args:
            ids: ``[n]`` int64.

        Raises:
            ValueError, TypeError: An unknown id; a wrong shape or dtype.
        """
        wanted = as_tensor(ids, "ids")
        if wanted.dtype != torch.int64 or wanted.ndim != 1:
            raise TypeError(f"ids: expected [n] int64, got {list(wanted.shape)} {wanted.dtype}")
        by_id, order = self._ids[: self._count].sort()
        place = torch.searchsorted(by_id, wanted)
        known = torch.zeros_like(wanted, dtype=torch.bool)
        if self._count:
            known = by_id[place.clamp(max=self._count - 1)] == wanted
        if not known.all():
            raise ValueError(f"ids: expected ids of the index, got {int(wanted[~known][0])}")
        rows = order[place] if len(wanted) else wanted
        prefix = self._tiles[rows // TILE, :, rows % TILE]
        return like(ids)(torch.cat([prefix, self._tail[rows].float()], dim=1))

    def _check_vectors(self, vectors: Any, name: str) -> Tensor:
        x = check_matrix(as_tensor(vectors, name), name)
        if x.device.type != "cpu":
            raise ValueError(f"{name}: expected vectors on the CPU, got {x.device}")
        if x.shape[1] != self.width:
            raise ValueError(f"{name}: expected width {self.width}, got {x.shape[1]}")
        check_finite(x, name)
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
            values, counts = torch.cat([self._ids[: self._count], new]).unique(return_counts=True)
            if len(values) < self._count + count:
                raise ValueError(
                    f"ids: expected ids that are not in use, got {int(values[counts > 1][0])}"
                )
        return new

    def _reserve(self, count: int) -> None:
        """Room for ``count`` rows; grows by half at least, so that many small adds stay cheap."""
        room = len(self._ids)
        if count <= room:
            return
        rows = max(count, room + room // 2)
        rows += -rows % TILE
        self._tiles = _grown(self._tiles, rows // TILE, -(-self._count // TILE))
        self._tail = _grown(self._tail, rows, self._count)
        self._ids = _grown(self._ids, rows, self._count)


def _grown(old: Tensor, length: int, used: int) -> Tensor:
    new = old.new_empty(length, *old.shape[1:])
    new[:used] = old[:used]
    return new
