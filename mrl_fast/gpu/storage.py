"""Where an index on a device keeps its vectors: on the host as every index does, which is what is
changed, saved and loaded, and on the device a row-major copy, which is what is searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrl_fast._C import TILE
from mrl_fast.cpu import Layout, Snapshot, flags_of
from mrl_fast.cpu import Store as HostStore

CHUNK_ROWS = 1 << 16  # carried to the device at a time
CODE_SCALE = 1  # as enum Stat in csrc/cpu/search.h
UP = 1 + 1e-6  # norms of bounds are rounded up


class DeviceRows(NamedTuple):
    """The rows of one state on the device; a later state writes beyond them only.

    Attributes:
        vectors: ``[N, D]`` of the index's dtype.
        norms: ``[G, N]`` fp32, of every prefix in ``dims``.
        tails: ``[N]`` fp32, norms of the columns after the first prefix, rounded up.
        largest, smallest: ``[G]`` fp32, of the norms; of those that are not 0.
        codes, units: ``[N, dims[0]]`` int8 and ``[N]`` fp32: the prefix as ``unit · code``.
        ids: ``[N]`` int64.
        allowed: ``[N]`` uint8, 0 where a row was removed or is filtered out; None: all are.
    """

    dims: tuple[int, ...]
    vectors: Tensor
    norms: Tensor
    tails: Tensor
    largest: Tensor
    smallest: Tensor
    codes: Tensor | None
    units: Tensor | None
    ids: Tensor
    allowed: Tensor | None


class Arrays:
    """Room for rows on the device, doubled when it is full."""

    def __init__(self, dims: Sequence[int], layout: Layout, device: torch.device):
        self.dims, self.layout, self.device, self.count = tuple(dims), layout, device, 0
        width, coded = dims[-1], layout.coded
        self.columns = {  # by row first
            "vectors": (layout.dtype, (width,)),
            "norms": (torch.float32, (len(dims),)),
            "tails": (torch.float32, ()),
            "ids": (torch.int64, ()),
            **({"codes": (torch.int8, (dims[0],)), "units": (torch.float32, ())} if coded else {}),
        }
        self.arrays = {name: self._empty(name, 0) for name in self.columns}
        self.largest = torch.zeros(len(dims), device=device)
        self.smallest = torch.full((len(dims),), torch.inf, device=device)

    def _empty(self, name: str, rows: int) -> Tensor:
        dtype, shape = self.columns[name]
        if name == "norms":  # by prefix first: a scan reads those of one
            return torch.empty(*shape, rows, dtype=dtype, device=self.device)
        return torch.empty(rows, *shape, dtype=dtype, device=self.device)

    def append(self, snapshot: Snapshot) -> None:
        """The rows that the snapshot has and this has not."""
        first, last = self.count, snapshot.count
        room = len(self.arrays["ids"])
        if last > room:
            room = max(last, 2 * room, 1024)
            for name, old in self.arrays.items():
                new = self._empty(name, room)
                if name == "norms":
                    new[:, :first] = old[:, :first]
                else:
                    new[:first] = old[:first]
                self.arrays[name] = new
        begin = 0
        for block, count in zip(snapshot.blocks, snapshot.counts, strict=True):
            for low in range(max(first - begin, 0), count, CHUNK_ROWS):
                high = min(low + CHUNK_ROWS, count)
                self._store(block, low, high, begin + low)
            begin += count
        self.count = last

    def _store(self, block: Any, low: int, high: int, at: int) -> None:
        to, arrays = slice(at, at + high - low), self.arrays
        x, head = arrays["vectors"][to], self.dims[0]
        tail = block.tail[low:high].to(self.device)
        x[:, self.dims[-1] - tail.shape[1] :] = tail
        if block.packed is not None:  # [tiles, head, TILE]
            x[:, :head] = self._of_tiles(block.packed, low, high).to(x.dtype)
        if block.codes is not None:  # [tiles, quads, TILE, 4], plus 128
            codes = self._of_tiles(block.codes, low, high)[:, :head]
            arrays["codes"][to] = (codes.to(torch.int16) - 128).to(torch.int8)
            arrays["units"][to] = block.stats[CODE_SCALE, low:high].to(self.device)
        arrays["ids"][to] = block.ids[low:high].to(self.device)
        for g, dim in enumerate(self.dims):
            norm = torch.linalg.vector_norm(x[:, :dim], dim=1, dtype=torch.float32)
            arrays["norms"][g, to] = norm
            self.largest[g] = torch.maximum(self.largest[g], norm.max() * UP)
            some = torch.where(norm > 0, norm, torch.inf).min()
            self.smallest[g] = torch.minimum(self.smallest[g], some)
        norm = torch.linalg.vector_norm(x[:, head:], dim=1, dtype=torch.float32)
        arrays["tails"][to] = norm * UP

    def _of_tiles(self, array: Tensor, low: int, high: int) -> Tensor:
        """Rows [low, high) of tiles ``[.., TILE, ..]``, row by row, on the device."""
        tiles = array[low // TILE : -(-high // TILE)].to(self.device)
        rows = tiles.transpose(1, 2).reshape(len(tiles) * TILE, -1)
        return rows[low % TILE :][: high - low]

    def rows(self, alive: Tensor | None) -> DeviceRows:
        n = self.count
        mine = {name: x[:, :n] if name == "norms" else x[:n] for name, x in self.arrays.items()}
        allowed = None if alive is None else flags_of(alive, n).to(self.device, torch.uint8)
        return DeviceRows(
            dims=self.dims, allowed=allowed, largest=self.largest.clone(),
            smallest=self.smallest.clone(), codes=mine.get("codes"), units=mine.get("units"),
            **{name: mine[name] for name in ("vectors", "norms", "tails", "ids")},
        )  # fmt: skip


class Store(HostStore):
    """The host's rows; each state's snapshot has the device's in ``device_rows``, complete before
    it can be found."""

    def __init__(self, layout: Layout, dims: Sequence[int], device: torch.device):
        self.device = device
        self._make: Callable[[], Arrays] = lambda: Arrays(dims, layout, device)
        self._arrays = self._make()
        super().__init__(layout)
        self.snapshot.device_rows = self._arrays.rows(None)

    def _publish(
        self, blocks: Any, counts: Any, alive: Tensor | None, before: Snapshot | None = None
    ) -> None:
        now = self._state(blocks, counts, alive, before)
        arrays = self._arrays if before is not None else self._make()  # else rows have moved
        arrays.append(now)
        now.device_rows = arrays.rows(alive)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # searches come on any stream
        self._arrays, self.snapshot = arrays, now
