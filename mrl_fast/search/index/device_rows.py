"""Where an index on a device keeps its vectors: on the host as every index does, which is what is
changed, saved and loaded, and on the device a row-major copy, which is what is searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrl_fast.kernels.search.metrics import upper
from mrl_fast.search.index.blocks import Layout
from mrl_fast.search.index.snapshot import Snapshot, flags_of
from mrl_fast.search.index.store import Store as HostStore
from mrl_fast.shared.native import TILE

CHUNK_ROWS = 1 << 16  # carried to the device at a time
CODE_SCALE = 1  # as enum Stat in csrc/cpu/search/search.h


class DeviceRows(NamedTuple):
    """The rows of one state on the device; a later state writes beyond them only.

    Attributes:
        vectors: ``[N, D]`` of the index's dtype.
        factors: ``[G, N]`` fp32, of every prefix in ``dims``: under cosine inverse norms, 0 of a
            norm that is 0; under l2 −‖x‖²/2; none under ip.
        tails: ``[N]`` fp32, norms of the columns after the first prefix, over the whole vector's
            under cosine; rounded up.
        largest, smallest: ``[G]`` fp32, of the norms; the smallest of those that are not 0.
        codes, units: ``[N, dims[0]]`` int8 and ``[N]`` fp32: the prefix as ``unit · code``, over
            its norm under cosine.
        ids: ``[N]`` int64.
        allowed: ``[N]`` uint8, 0 where a row was removed or is filtered out; None: all are.
        out: ``[N]`` fp32, −inf there, else 0.
    """

    dims: tuple[int, ...]
    vectors: Tensor
    factors: Tensor
    tails: Tensor
    largest: Tensor
    smallest: Tensor
    codes: Tensor | None
    units: Tensor | None
    ids: Tensor
    allowed: Tensor | None = None
    out: Tensor | None = None

    def only(self, allowed: Tensor | None) -> DeviceRows:
        """Those that are allowed, ``[N]`` bool."""
        if allowed is None:
            return self
        allowed = allowed.to(self.vectors.device, torch.uint8)
        out = torch.zeros(len(allowed), dtype=torch.float32, device=allowed.device)
        return self._replace(allowed=allowed, out=out.masked_fill_(allowed == 0, -torch.inf))


class Arrays:
    """Room for rows on the device, doubled when it is full."""

    def __init__(self, dims: Sequence[int], metric: str, layout: Layout, device: torch.device):
        self.dims, self.metric, self.device = tuple(dims), metric, device
        width, factors = dims[-1], 0 if metric == "ip" else len(dims)
        self.columns = {  # rows come first, but of factors, of which a scan reads one prefix's
            "vectors": (layout.dtype, (width,)),
            "factors": (torch.float32, (factors,)),
            "tails": (torch.float32, ()),
            "ids": (torch.int64, ()),
        }
        if layout.coded:
            self.columns |= {"codes": (torch.int8, (dims[0],)), "units": (torch.float32, ())}
        self.arrays = self._with_room(0)
        self.largest = torch.zeros(len(dims), dtype=torch.float32, device=device)
        self.smallest = torch.full_like(self.largest, torch.inf)

    def _with_room(self, rows: int) -> dict[str, Tensor]:
        arrays = {}
        for name, (dtype, shape) in self.columns.items():
            shape = (*shape, rows) if name == "factors" else (rows, *shape)
            arrays[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return arrays

    def append(self, snapshot: Snapshot, first: int) -> None:
        """The snapshot's rows from ``first`` on; those before it are here."""
        if snapshot.count > len(self.arrays["ids"]):
            room = max(snapshot.count, 2 * len(self.arrays["ids"]), 1024)
            grown = self._with_room(room)
            for name, old in _cut(self.arrays, first).items():
                _cut(grown, first)[name].copy_(old)
            self.arrays = grown
        begin = 0
        for block, count in zip(snapshot.blocks, snapshot.counts, strict=True):
            for low in range(max(first - begin, 0), count, CHUNK_ROWS):
                self._store(block, low, min(low + CHUNK_ROWS, count), begin + low)
            begin += count

    def _store(self, block: Any, low: int, high: int, at: int) -> None:
        to, arrays = slice(at, at + high - low), self.arrays
        x, head = arrays["vectors"][to], self.dims[0]
        tail = block.tail[low:high].to(self.device)
        x[:, self.dims[-1] - tail.shape[1] :] = tail
        if block.packed is not None:  # [tiles, head, TILE]
            x[:, :head] = self._of_tiles(block.packed, low, high).to(x.dtype)
        arrays["ids"][to] = block.ids[low:high].to(self.device)
        inverse = []
        for g, dim in enumerate(self.dims):
            norm = torch.linalg.vector_norm(x[:, :dim], dim=1, dtype=torch.float32)
            inverse.append(norm.reciprocal().where(norm > 0, 0.0))
            if self.metric != "ip":
                arrays["factors"][g, to] = -0.5 * norm * norm if self.metric == "l2" else inverse[g]
            self.largest[g] = torch.maximum(self.largest[g], upper(norm.max(), dim))
            some = torch.where(norm > 0, norm, torch.inf).min()
            self.smallest[g] = torch.minimum(self.smallest[g], some)
        norm = torch.linalg.vector_norm(x[:, head:], dim=1, dtype=torch.float32)
        norm = upper(norm, self.dims[-1])
        cosine = self.metric == "cosine"
        arrays["tails"][to] = norm * inverse[-1] * (1 + 1e-6) if cosine else norm
        if block.codes is not None:  # [tiles, quads, TILE, 4], plus 128
            codes = self._of_tiles(block.codes, low, high)[:, :head]
            arrays["codes"][to] = (codes.to(torch.int16) - 128).to(torch.int8)
            units = block.stats[CODE_SCALE, low:high].to(self.device)
            arrays["units"][to] = units * inverse[0] if cosine else units

    def _of_tiles(self, array: Tensor, low: int, high: int) -> Tensor:
        """Rows [low, high) of tiles ``[.., TILE, ..]``, row by row, on the device."""
        tiles = array[low // TILE : -(-high // TILE)].to(self.device)
        rows = tiles.transpose(1, 2).reshape(len(tiles) * TILE, -1)
        return rows[low % TILE :][: high - low]

    def rows(self, count: int, alive: Tensor | None) -> DeviceRows:
        arrays: dict[str, Any] = {"codes": None, "units": None, **_cut(self.arrays, count)}
        rows = DeviceRows(
            dims=self.dims, largest=self.largest.clone(), smallest=self.smallest.clone(), **arrays
        )  # fmt: skip
        return rows.only(None if alive is None else flags_of(alive, count))


def _cut(arrays: dict[str, Tensor], rows: int) -> dict[str, Any]:
    return {name: x[:, :rows] if name == "factors" else x[:rows] for name, x in arrays.items()}


class Store(HostStore):
    """The host's rows; each state's snapshot has the device's in ``device_rows``, complete before
    it can be found."""

    def __init__(self, layout: Layout, dims: Sequence[int], metric: str, device: torch.device):
        self.device = device
        self._make: Callable[[], Arrays] = lambda: Arrays(dims, metric, layout, device)
        self._arrays = self._make()
        super().__init__(layout)
        self.snapshot.device_rows = self._arrays.rows(0, None)

    def _publish(
        self, blocks: Any, counts: Any, alive: Tensor | None, before: Snapshot | None = None
    ) -> None:
        now = self._state(blocks, counts, alive, before)
        arrays = self._arrays if before is not None else self._make()  # else rows have moved
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            arrays.append(now, 0 if before is None else before.count)
            now.device_rows = arrays.rows(now.count, alive)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # searches come on any stream
        self._arrays, self.snapshot = arrays, now
