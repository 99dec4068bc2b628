"""The rows of an index on a device: a row-major copy, which is what is searched there. What is
changed, saved and loaded lies on the host, as with every index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrl_fast.kernels.search.coarse import ALIGNMENT, Codes
from mrl_fast.kernels.search.metrics import upper
from mrl_fast.search.index import scaled
from mrl_fast.search.index.blocks import Block, Layout
from mrl_fast.search.index.device_metrics import DEVICE_METRICS, inverse
from mrl_fast.search.index.snapshot import Snapshot, flags_of
from mrl_fast.shared.native import TILE, Stat

CHUNK_ROWS = 1 << 16  # carried to the device at a time
CODED_BYTES = 256 << 20  # of fp32 columns coded at a time
BY_COLUMN = "factors", "outers"  # arrays [.., N], of which a scan reads whole columns


class DeviceRows(NamedTuple):
    """The rows of one state on the device; a later state writes beyond them only.

    Attributes:
        vectors: ``[N, D]`` of the index's dtype; fp32 where it holds codes.
        factors: ``[G, N]`` fp32, of every prefix in ``dims`` the metric's factor; ``[0, N]`` where
            it has none.
        suffixes: ``[N]`` fp32, norms of the columns after the first prefix, over the whole vector's
            where the metric counts rows as unit vectors; rounded up. Of fewer columns both the norm
            and its share are no larger.
        norms: ``[G]`` fp32, the norms that scans' margins have to hold for.
        codes, scales: ``[N, coded]`` int8 and ``[N]`` fp32: the first columns, or all, are about
            ``scale · code``, over their norm where the metric counts rows as unit vectors.
        outers: As of ``coarse.Codes``, where all columns are coded.
        ids: ``[N]`` int64.
        allowed: ``[N]`` uint8, 0 where a row was removed or is filtered out; None: all are.
        out: ``[N]`` fp32, −inf there, else 0.
        captured: What the index keeps for CUDA graphs, by address: a replay reads the arrays that
            were there when it was captured.
    """

    dims: tuple[int, ...]
    vectors: Tensor
    factors: Tensor
    suffixes: Tensor
    norms: Tensor
    codes: Tensor | None
    scales: Tensor | None
    outers: Tensor | None
    ids: Tensor
    captured: dict[int, Tensor]
    allowed: Tensor | None = None
    out: Tensor | None = None

    def only(self, allowed: Tensor | None) -> DeviceRows:
        """Those that are allowed, ``[N]`` bool."""
        if allowed is None:
            return self
        allowed = allowed.to(self.vectors.device, torch.uint8)
        out = torch.zeros(len(allowed), dtype=torch.float32, device=allowed.device)
        return self._replace(allowed=allowed, out=out.masked_fill_(allowed == 0, -torch.inf))


class DeviceCopy:
    """The rows of a store on the device. Each snapshot has those of its state in ``device_rows``.

    Attributes:
        arrays: Room for rows, doubled when it is full.
        captured: Arrays that CUDA graphs read, these or earlier ones.
    """

    def __init__(self, dims: Sequence[int], metric: str, layout: Layout, device: torch.device):
        self.dims, self.name, self.device = tuple(dims), metric, device
        self.metric = DEVICE_METRICS[metric]
        self.code = layout.code
        self.columns = {
            "vectors": (scaled.values_dtype(layout.dtype), (dims[-1],)),
            "factors": (torch.float32, (0 if self.metric.factor is None else len(dims),)),
            "suffixes": (torch.float32, ()),
            "ids": (torch.int64, ()),
        }
        if not self.code.exact:
            columns = layout.coded + (-layout.coded % ALIGNMENT if self.code.whole else 0)
            self.columns |= {"codes": (torch.int8, (columns,)), "scales": (torch.float32, ())}
        if self.code.whole:
            outers = 2 + (self.metric.added is not None)
            self.columns["outers"] = torch.float32, (outers,)
        self.captured: dict[int, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        self.followed: Snapshot | None = None  # whose rows the arrays hold
        self.arrays = self._with_room(0)
        self.largest = torch.zeros(len(self.dims), dtype=torch.float32, device=self.device)
        self.smallest = torch.full_like(self.largest, torch.inf)

    def follow(self, now: Snapshot, before: Snapshot | None) -> None:
        """Brings the copy to this state; ``before``: the state that rows were appended to or
        removed from since, None where they have moved."""
        state = self.followed, self.arrays, self.largest.clone(), self.smallest.clone()
        try:
            with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
                if before is None or before is not self.followed:
                    self.clear()
                self.append(now, self.followed.count if self.followed else 0)
                now.device_rows = self.rows(now.count, now.live)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # searches come on any stream
            self.followed = now
        except BaseException:
            self.followed, self.arrays, self.largest, self.smallest = state
            raise

    def _with_room(self, rows: int) -> dict[str, Tensor]:
        arrays = {}
        for name, (dtype, shape) in self.columns.items():
            shape = (*shape, rows) if name in BY_COLUMN else (rows, *shape)
            arrays[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return arrays

    def append(self, snapshot: Snapshot, first: int) -> None:
        """The snapshot's rows from ``first`` on; those before it are here."""
        if snapshot.count > len(self.arrays["ids"]):
            room = max(snapshot.count, 2 * len(self.arrays["ids"]), 1024)
            room += -room % TILE  # so that what lies by column is aligned
            grown = self._with_room(room)
            for name, old in _cut(self.arrays, first).items():
                _cut(grown, first)[name].copy_(old)
            self.arrays = grown
        begin = 0
        for block, count in zip(snapshot.blocks, snapshot.counts, strict=True):
            for low in range(max(first - begin, 0), count, CHUNK_ROWS):
                self._store(block, low, min(low + CHUNK_ROWS, count), begin + low)
            begin += count

    def _store(self, block: Block, low: int, high: int, at: int) -> None:
        to, arrays = slice(at, at + high - low), self.arrays
        x, head = arrays["vectors"][to], self.dims[0]
        suffix = scaled.values(block.suffix[low:high].to(self.device))
        x[:, self.dims[-1] - suffix.shape[1] :] = suffix
        if "packed" in block.tiles:  # [tiles, head, TILE]
            x[:, :head] = self._of_tiles(block.tiles["packed"], low, high).to(x.dtype)
        arrays["ids"][to] = block.ids[low:high].to(self.device)
        norms = []
        for g, dim in enumerate(self.dims):
            norm = torch.linalg.vector_norm(x[:, :dim], dim=1, dtype=torch.float32)
            norms.append(norm)
            if self.metric.factor is not None:
                arrays["factors"][g, to] = self.metric.factor(norm)
            self.largest[g] = torch.maximum(self.largest[g], upper(norm.max(), dim))
            some = torch.where(norm > 0, norm, torch.inf).min()
            self.smallest[g] = torch.minimum(self.smallest[g], some)
        norm = torch.linalg.vector_norm(x[:, head:], dim=1, dtype=torch.float32)
        norm, unit = upper(norm, self.dims[-1]), self.metric.unit
        arrays["suffixes"][to] = norm * inverse(norms[-1]) * (1 + 1e-6) if unit else norm
        if self.code.signed is not None:
            tiles = block.tiles["codes"]  # [tiles, groups, TILE, columns]
            arrays["codes"][to] = self.code.signed(self._of_tiles(tiles, low, high)[:, :head])
            scales = block.stats[Stat.CODE_SCALE, low:high].to(self.device)
            arrays["scales"][to] = scales * inverse(norms[0]) if unit else scales
        elif self.code.whole:
            for part in x.split(max(1, CODED_BYTES // (4 * self.dims[-1]))):
                to = slice(at, at + len(part))
                coded = Codes.of(part, self.name)
                arrays["codes"][to], arrays["scales"][to] = coded.x, coded.scale
                assert coded.outers is not None
                arrays["outers"][:, to] = coded.outers
                at = to.stop

    def _of_tiles(self, array: Tensor, low: int, high: int) -> Tensor:
        """Rows [low, high) of tiles ``[.., TILE, ..]``, row by row, on the device."""
        tiles = array[low // TILE : -(-high // TILE)].to(self.device)
        rows = tiles.transpose(1, 2).reshape(len(tiles) * TILE, -1)
        return rows[low % TILE :][: high - low]

    def rows(self, count: int, live: Tensor | None) -> DeviceRows:
        arrays: dict[str, Any] = {
            "codes": None, "scales": None, "outers": None, **_cut(self.arrays, count)
        }  # fmt: skip
        rows = DeviceRows(
            dims=self.dims, norms=self.metric.largest(self.largest, self.smallest).clone(),
            captured=self.captured, **arrays,
        )  # fmt: skip
        return rows.only(None if live is None else flags_of(live, count))


def _cut(arrays: dict[str, Tensor], rows: int) -> dict[str, Any]:
    return {name: x[:, :rows] if name in BY_COLUMN else x[:rows] for name, x in arrays.items()}
