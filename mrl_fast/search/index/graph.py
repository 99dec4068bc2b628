"""A graph over an index's rows: from each a few edges to near ones, which a search follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mrl_fast.search.index.blocks import Layout, Parts
from mrl_fast.search.index.codes import MEAN_ROWS, centre_of
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.shared import memory, native
from mrl_fast.shared.memory import address
from mrl_fast.shared.native import _C, METRICS

U8, F32 = torch.uint8, torch.float32
DEGREE = _C.DEGREE  # edges of a row, at most
ENTRIES = _C.ENTRIES  # rows that a search begins at, at most
LEAST_SHARE = 1 / 8  # of the rows that may be found: where fewer may, all of them are searched


class RowGraph:
    """A graph over the first ``rows`` rows of an index; nothing of it ever changes.

    Attributes:
        arrays: By their names in a file: ``edges`` ``[rows, 4 · DEGREE]``, ``signs`` and
            ``nibbles`` ``[rows, bytes]``, ``entries`` ``[entries, 4]``, uint8; and ``centre``
            ``[1, D]``, fp32, what codes are less.
        native: What the kernels read.
    """

    def __init__(self, rows: int, layout: Layout, arrays: Mapping[str, Tensor]):
        self.rows, self.arrays = rows, dict(arrays)
        edges, signs, nibbles, entries = (
            address(arrays[name], U8) for name in ("edges", "signs", "nibbles", "entries")
        )
        self.entries, self.width = len(arrays["entries"]), layout.width
        self.native = _C.Graph(
            (
                rows, layout.width, address(arrays["centre"], F32),
                signs, nibbles, entries, self.entries, edges,
            )
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def reads(self, beam: int) -> tuple[int, int]:
        """Rows that a search of a beam scores, and the bytes that it reads, at most."""
        rows = min(self.rows, ENTRIES + beam * DEGREE)
        edges, signs, nibbles = (self.arrays[name].shape[1] for name in PER_ROW)
        return rows, rows * signs + min(beam, self.rows) * (edges + nibbles)

    @classmethod
    def build(cls, now: Snapshot, layout: Layout, metric: str, *, progress: bool) -> RowGraph:
        """Builds the graph of a snapshot's rows; the same on any number of threads."""
        arrays = {
            name: memory.lasting(*shape, dtype=dtype)
            for name, (dtype, shape) in parts(layout, now.count, ENTRIES).items()
        }
        for name in PER_ROW:
            _C.advise_huge_pages(address(arrays[name], U8), arrays[name].nbytes)
            arrays[name].zero_()
        live = now.live_rows(0, now.count)
        sample = now.vectors(live[:: -(-len(live) // MEAN_ROWS)].contiguous(), layout.width)
        arrays["centre"].copy_(centre_of(sample))
        builder = _C.GraphBuilder(
            now.rows, METRICS[metric].number, address(arrays["centre"], F32), layout.width,
            native.run(),
            tuple(address(arrays[name], U8) for name in (*PER_ROW, "entries")),
        )  # fmt: skip
        with tqdm(total=builder.count, desc="build graph", disable=not progress) as bar:
            while builder.add():
                bar.update(builder.added - bar.n)
            entries = builder.finish()
        arrays["entries"] = arrays["entries"][:entries]
        return cls(now.count, layout, arrays)


PER_ROW = "edges", "signs", "nibbles"


def parts(layout: Layout, rows: int, entries: int) -> Parts:
    """The arrays of a graph, in the order of a file and of the kernels."""
    signs, nibbles = _C.node_bytes(layout.width)
    bytes_of = dict(zip(PER_ROW, (4 * DEGREE, signs, nibbles), strict=True))
    return {
        **{name: (U8, (rows, size)) for name, size in bytes_of.items()},
        "entries": (U8, (entries, 4)),
        "centre": (F32, (1, layout.width)),
    }


def walks(stages: Any) -> bool:
    """Whether stages begin with a graph's."""
    return bool(stages) and stages[0][0] == "graph"
