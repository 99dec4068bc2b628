"""What a folder holds of an index, and the files that hold it: the same objects are saved and
loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrl_fast.search.disk.tensorfile import Parts, TensorFile
from mrl_fast.search.index.blocks import VERSION, Block, Layout
from mrl_fast.search.index.codes import TILED
from mrl_fast.search.index.graph import RowGraph
from mrl_fast.search.index.graph import parts as graph_parts
from mrl_fast.shared import memory
from mrl_fast.shared.native import TILE


class Contents(NamedTuple):
    """The state of an index that a folder holds.

    Attributes:
        fields: The manifest's fields of the index itself, as JSON.
        blocks, counts: Blocks of rows and how many rows each has: whole tiles in all but the last.
        alive: ``[tiles]`` int64, the live mask; None: no row was removed.
        axes: ``[n, D]`` fp32, as ``Layout.use`` takes them.
        graph: Over the first rows; None: there is none.
    """

    fields: dict[str, Any]
    layout: Layout
    blocks: Sequence[Block]
    counts: Sequence[int]
    alive: Tensor | None
    axes: Tensor | None
    graph: RowGraph | None = None

    def pieces(self, begin: int) -> dict[str, Iterator[Tensor]]:
        """The tensors of ``rows_file``, in pieces, for the rows from ``begin`` on, where a tile
        begins."""
        ranges, first = [], 0  # blocks with their rows [first, last)
        for block, count in zip(self.blocks, self.counts, strict=True):
            if first + count > begin:
                ranges.append((block, max(begin - first, 0), count))
            first += count
        return {name: _pieces(name, part, ranges) for name, part in self.layout.parts(0).items()}


def _pieces(
    name: str, part: tuple[torch.dtype, tuple[int, ...]], ranges: list[tuple[Block, int, int]]
) -> Iterator[Tensor]:
    """One array of the rows of some blocks, padded with zeros to whole tiles."""
    dtype, shape = part
    padding = -ranges[-1][2] % TILE
    arrays = [(block.arrays[name], first, last) for block, first, last in ranges]
    if name == "stats":  # [stats, rows]
        for stat in range(shape[0]):
            yield from (array[stat, first:last] for array, first, last in arrays)
            yield memory.zeros(padding)
    elif name in TILED:  # [tiles, ...]
        for array, first, last in arrays:
            yield array[first // TILE : last // TILE]
            if last % TILE:
                tile = array[last // TILE].clone()
                TILED[name].clear(tile, last % TILE)
                yield tile
    else:  # [rows, ...]
        yield from (array[first:last] for array, first, last in arrays)
        yield memory.zeros(padding, *shape[1:], dtype=dtype)


class IndexFile(NamedTuple):
    """A kind of file and the tensors in it."""

    kind: str
    parts: Parts
    scattered: str | None = None  # the tensor of which single rows are read

    def open(self, folder: Path, entry: dict[str, Any]) -> TensorFile:
        """Opens the file that an entry of the manifest names."""
        return TensorFile(folder / entry["file"], self.parts, entry["sha256"], self.scattered)


def rows_file(layout: Layout, rows: int, version: int = VERSION) -> IndexFile:
    """The arrays of so many rows, which are whole tiles, in a version of the files."""
    return IndexFile("rows", layout.parts(rows, version), scattered="tail")


def alive_file(count: int) -> IndexFile:
    """The live mask of so many rows."""
    return IndexFile("alive", {"alive": (torch.int64, (-(-count // TILE),))})


def axes_file(layout: Layout, version: int) -> IndexFile:
    """What vectors are given in, in a version of the files."""
    return IndexFile("axes", {"axes": (torch.float32, (layout.axes(version), layout.width))})


def graph_file(layout: Layout, rows: int, entries: int) -> IndexFile:
    """A graph over so many rows."""
    return IndexFile("graph", graph_parts(layout, rows, entries))


class Files(NamedTuple):
    """The files that a manifest names, opened."""

    rows: list[TensorFile]
    alive: TensorFile | None
    axes: TensorFile | None
    graph: TensorFile | None

    @classmethod
    def opened(cls, folder: Path, manifest: dict[str, Any], layout: Layout) -> Files:
        """Opens all of them.

        Raises:
            ValueError: Another size or header than the manifest says, or no file; names it.
        """
        segments, alive, axes, graph = (
            manifest[name] for name in ("segments", "alive", "axes", "graph")
        )
        count = sum(segment["used"] for segment in segments)
        return cls(
            [
                rows_file(layout, segment["rows"], manifest["version"]).open(folder, segment)
                for segment in segments
            ],
            alive and alive_file(count).open(folder, alive),
            axes and axes_file(layout, manifest["version"]).open(folder, axes),
            graph and graph_file(layout, graph["rows"], graph["entries"]).open(folder, graph),
        )

    def verify(self) -> None:
        """Reads all of them and compares their checksums."""
        for file in (*self.rows, self.alive, self.axes, self.graph):
            if file is not None:
                file.verify()
