"""Where an index keeps its vectors: blocks of rows that are filled in place and never move."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mrl_fast.search.index import scaled
from mrl_fast.search.index.codes import TILED
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.shared import memory, native
from mrl_fast.shared.checks import check_finite
from mrl_fast.shared.memory import address
from mrl_fast.shared.native import _C, DTYPES, METRICS, TILE, Stat

VERSION = 4  # of an index's files; 1 to 3 can be read
F32, U8, I64 = torch.float32, torch.uint8, torch.int64

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape, by an array's name


class Layout:
    """Which of a vector's columns lie where.

    What is coded lies in tiles as its code says. The columns that these do not hold exactly, the
    suffix, lie row-major.

    Attributes:
        centre: ``[D]`` fp32, what codes of all columns are less; None is 0, or there are none.
        signs: ``[D]`` fp32 of 1 and -1, by which codes of all columns are rotated between the dims;
            None: they are not, or there are none.
    """

    def __init__(self, config: IndexConfig):
        self.coded, self.width, self.code = config.coded, config.width, config.code
        self.dtype, self.metric = config.stored_dtype, METRICS[config.metric]
        self.centre: Tensor | None = None
        self.signs: Tensor | None = None
        self._rotation = config.width * (config.rotation is not None)
        self.packed = self.coded if self.code.exact else 0  # the suffix's first column
        self.ladder = list(config.dims) if self.code.whole else []
        self.levels = []  # columns where a suffix's norm is known: the prefix, doubled and doubled
        level = self.coded
        while level < self.width:
            self.levels.append(level)
            level = max(2 * level, config.dims[0])

    @property
    def version(self) -> int:
        """The first version of the files whose arrays are as today's."""
        return 2 if not self.ladder else 3 if self.signs is None else 4

    def axes(self, version: int) -> int:
        """How many vectors a version's files say that rows are given in, as ``use`` takes them."""
        codes = (1 if version < 4 else 2) if self.ladder else 0
        return self._rotation + codes

    @property
    def stats(self) -> int:
        if not self.ladder:
            return Stat.TAIL_NORM + len(self.levels)
        return Stat.SIGN_FACTOR + len(self.ladder) * (3 if self.metric.normalized else 2)

    def parts(self, rows: int, version: int = VERSION) -> Parts:
        """The arrays that hold so many rows, whole tiles, in the order of a version's files."""
        tiles = {
            name: (array.dtype, (rows // TILE, *array.tile(self.coded)))
            for name, array in self.code.arrays.items()
        }
        stats = self.stats
        if version == 2 and self.ladder:  # other codes in as many bytes
            stats += 1
            del tiles["tile_stats"]
            tiles["lows"] = tiles["nibbles"]
        return {
            "ids": (I64, (rows,)),
            "stats": (F32, (stats, rows)),
            **tiles,
            "tail": (self.dtype, (rows, scaled.header(self.dtype) + self.width - self.packed)),
        }

    def reads(self, version: int) -> bool:
        """Whether arrays of that version of the files are as those of today."""
        return self.parts(0, version) == self.parts(0)

    def use(self, frame: Tensor | None) -> None:
        """Takes what vectors are given in: the rotation's axes, then the centre of the codes, and
        their signs where they are rotated."""
        if frame is not None and self.ladder:
            centre, *signs = frame[self._rotation :]
            self.centre = centre if bool(centre.any()) else None
            self.signs = signs[0] if signs else None

    def rows(self, spans: list[tuple[int, ...]]) -> _C.Rows:
        code_dim = 0 if self.code.exact or self.code.whole else self.coded
        ladder = (
            self.ladder, address(self.centre, F32), self.metric.number, address(self.signs, F32)
        )  # fmt: skip
        return _C.Rows(
            spans, self.packed, code_dim, DTYPES[self.dtype], self.levels, ladder, self.width
        )


class Block:
    """Rows in arrays as of ``Layout.parts``: its own, to be filled, or given ones, read only.

    Attributes:
        arrays: By their names in a file; some of them are attributes, too.
        suffix: The array named ``tail``.
    """

    def __init__(self, layout: Layout, capacity: int, arrays: dict[str, Tensor] | None = None):
        self.layout, self.capacity, self.fixed = layout, capacity, arrays is not None
        if arrays is None:
            arrays = {name: _empty(*part) for name, part in layout.parts(capacity).items()}
            arrays["stats"].zero_()  # the statistics of codes stay 0 where there are none
        self.arrays = arrays
        self.ids, self.stats, self.suffix = arrays["ids"], arrays["stats"], arrays["tail"]
        self.tiles = {name: arrays[name] for name in layout.code.arrays}

    @classmethod
    def of_version(
        cls, version: int, layout: Layout, arrays: dict[str, Tensor], used: int
    ) -> Block:
        """A read-only block of ``used`` rows that a version of the files holds. Where its codes
        are not today's, they are made again of the vectors."""
        ids, tail = arrays["ids"], arrays["tail"]
        if layout.reads(version):
            return cls(layout, len(ids), arrays)
        parts = layout.parts(len(ids))
        made = {name: _empty(*parts[name]) for name in parts if name not in ("ids", "tail")}
        block = cls(layout, len(ids), {"ids": ids, "tail": tail, **made})
        block._store(tail[:used], 0)
        return block

    def store(self, vectors: Tensor, ids: Tensor, begin: int) -> None:
        """Writes rows from ``begin`` on; ``vectors`` are as ``vectors`` returns them, or fp32 where
        those are codes."""
        self.ids[begin : begin + len(vectors)] = ids
        self._store(vectors, begin, self.suffix)

    def _store(self, vectors: Tensor, begin: int, suffix: Tensor | None = None) -> None:
        dtype, (rows, width) = vectors.dtype, (len(vectors), self.layout.width)
        problem = _C.store(
            self.layout.rows([]),
            (address(vectors, dtype), DTYPES[dtype], vectors.stride(0), rows, width),
            begin,
            native.run(),
            (
                *self._addresses(self.tiles, "packed", "codes"), address(self.stats, F32),
                self.capacity, address(suffix, self.layout.dtype), self.suffix.stride(0),
                *self._addresses(self.tiles, "signs", "nibbles", "lows", "tile_stats"),
            ),
        )  # fmt: skip
        if problem:
            check_finite(scaled.values(vectors), "vectors")
            raise ValueError(f"vectors: expected squares within float32, got {problem}")

    @staticmethod
    def _addresses(tiles: dict[str, Tensor], *names: str) -> Iterator[int]:
        for name in names:
            array = tiles.get(name)
            yield address(array, TILED[name].dtype)

    def spans(self, first: int, rows: int) -> tuple[list[tuple[int, ...]], list[Tensor]]:
        """The block's first ``rows`` rows, numbered from ``first`` on, as the kernels read them.

        Others may be writing rows to the last tile, so that it is copied: the second result holds
        the copies, which the spans point to.
        """
        whole = rows if self.fixed else rows - rows % TILE
        spans, copies = [], []
        for begin, end in ((0, whole), (whole, rows)):
            if begin == end:
                continue
            tiles = slice(begin // TILE, -(-end // TILE))
            arrays = {name: x[tiles] for name, x in self.tiles.items()}
            if end % TILE and not self.fixed:
                arrays = {name: x.clone() for name, x in arrays.items()}
                copies += arrays.values()
            spans.append((
                first + begin, end - begin, *self._addresses(arrays, "packed", "codes"),
                address(self.suffix[begin:], self.layout.dtype), self.suffix.stride(0),
                address(self.stats[:, begin:], F32), self.stats.stride(0),
                address(self.ids[begin:], I64),
                *self._addresses(arrays, "signs", "nibbles", "lows", "tile_stats"),
            ))  # fmt: skip
        return spans, copies

    def frozen(self, rows: int) -> list[tuple[int, dict[str, Tensor]]]:
        """The first ``rows`` rows as read-only parts, each with its number of rows: whole tiles
        over the same memory, and a copy of the last where others may be writing to it."""
        whole = rows - rows % TILE
        parts = [(whole, self._cut(0, whole))] if whole else []
        if rows > whole:
            last = {name: x.clone() for name, x in self._cut(whole, whole + TILE).items()}
            used = rows - whole
            paddings = [last["ids"][used:], last["stats"][:, used:], last["tail"][used:]]
            for padding in paddings:
                padding.zero_()  # nothing else of our memory goes out
            for name in self.tiles:
                TILED[name].clear(last[name][0], used)
            parts.append((used, last))
        return parts

    def _cut(self, begin: int, end: int) -> dict[str, Tensor]:
        """The arrays' part of rows [begin, end), whole tiles."""
        tiles = slice(begin // TILE, end // TILE)
        return {
            "ids": self.ids[begin:end],
            "stats": self.stats[:, begin:end],
            **{name: x[tiles] for name, x in self.tiles.items()},
            "tail": self.suffix[begin:end],
        }

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows of the block as they are stored, ``[n, D]`` of the layout's dtype; where those are
        codes, ``[n, D + 4]``, of which ``scaled.values`` is what they stand for."""
        suffix = self.suffix[rows]
        if "packed" not in self.tiles:
            return suffix
        head = self.tiles["packed"][rows // TILE, :, rows % TILE].to(suffix.dtype)
        return torch.cat([head, suffix], dim=1)

    def nbytes(self, rows: int) -> int:
        """Of ``rows`` rows, padding included."""
        bytes_a_row = sum(x.nbytes for x in self.arrays.values()) // self.capacity
        return bytes_a_row * (rows + -rows % TILE)


def _empty(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = memory.lasting(*shape, dtype=dtype)
    _C.advise_huge_pages(address(tensor, dtype), tensor.nbytes)
    return tensor
