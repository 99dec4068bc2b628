"""Nested vectors by id, as an index holds them: added, replaced, removed, while others read.

The first prefix lies in tiles for scanning, as its code says, and the other columns row-major for
reranking: no fp32 column is stored twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrl_fast.search.index import host_search, scaled
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.blocks import VERSION, Block, Layout
from mrl_fast.search.index.codes import FEWEST_ROWS, MEAN_ROWS, centre_of
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.graph import RowGraph
from mrl_fast.search.index.rotation import Rotation
from mrl_fast.search.index.snapshot import Snapshot
from mrl_fast.search.index.store import RowStore
from mrl_fast.shared import memory
from mrl_fast.shared.arrays import like
from mrl_fast.shared.checks import check_finite
from mrl_fast.shared.locks import Lock

LARGEST_ID = (1 << 63) - 2  # one more is an int64 too
GRAPH_ROWS = 1 << 31  # fewer can be numbered in a graph
# Of a rotation of codes: vectors read, and how many times less uneven it makes columns' squares.
SPREAD_ROWS, LEAST_GAIN = 1 << 9, 6


class Frozen(NamedTuple):
    """The rows of one moment, over memory that nobody writes to.

    Attributes:
        segments: Rows used and arrays of each read-only block.
        live: The live mask, as of a Snapshot.
        frame: What the vectors are given in, as of ``IndexRows.frame``.
        next_id: One more than the largest id so far.
        graph: Over the first rows; None: there is none.
    """

    segments: list[tuple[int, dict[str, Tensor]]]
    live: Tensor | None
    frame: Tensor | None
    next_id: int
    graph: RowGraph | None = None


class IndexRows:
    """Vectors by id in the order they were added; what MatryoshkaIndex searches."""

    def __init__(self, config: IndexConfig):
        self._lock = Lock()
        self.config, self.backend, self.next_id = config, backend_of(config), 0
        self.layout = Layout(config)
        self._added = scaled.values_dtype(config.stored_dtype)  # of vectors as they are stored
        self.rotation = None if config.rotation is None else Rotation(config.width)
        self.frame: Tensor | None = None  # [n, D] fp32, what vectors are given in: see Layout.use
        with self.changing():
            self.store: RowStore = self.backend.new_store(self.layout, config)
            # For a chunk that is converted: a new one each time would leave holes among the blocks.
            self._converted = memory.empty(0, config.width, dtype=self._added)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One thread at a time changes the rows, or saves them. What it makes outlives the call,
        so it is made outside ``torch.inference_mode``, where it could not be written to later."""
        with self._lock, torch.inference_mode(False):
            yield

    @property
    def snapshot(self) -> Snapshot:
        return self.store.snapshot

    def fit(self, samples: Any) -> None:
        """Fits the rotation, and codes' centre and whether they are rotated, to samples instead
        of to the first vectors that are added.

        Args:
            samples: ``[n, D]`` floating point; a few times D of them are enough.

        Raises:
            ValueError, TypeError: An index without rotation and codes, or one that held vectors
                already; samples of a wrong shape or dtype, NaN or infinite values, or none.
        """
        if self.rotation is None and not self.layout.ladder:
            raise ValueError("rotation: expected 'pca' or codes where samples are given, got None")
        x = inputs.vectors(samples, "samples", self.config.width)
        if not len(x):
            raise ValueError("samples: expected at least one vector, got none")
        with self.changing():
            if count := self.snapshot.count:
                raise ValueError(f"samples: expected an empty index, got {count} vectors in it")
            if self.rotation is not None:
                self.rotation = Rotation(self.config.width).fit(x)
            self._set_frame(x)
            self.store.adopt([], [], None)  # a search reads the centre that its rows name

    def add(self, vectors: Any, ids: Any = None) -> None:
        """Appends vectors; all of them or, where anything is wrong, none.

        Vectors that are stored never move: adding costs what the new vectors cost.

        Args:
            vectors: ``[n, D]`` floating point, any row stride: tensor, numpy array, DLPack object
                or pyarrow FixedSizeListArray.
            ids: ``[n]`` integers, at least 0, none of them in use: tensor, array, list, range or
                pandas Series; default: consecutive after the largest so far.

        Raises:
            ValueError, TypeError: A wrong shape or dtype, NaN or infinite values, an id that is
                taken.
        """
        x = inputs.vectors(vectors, "vectors", self.config.width)
        new = None if ids is None else inputs.new_ids(ids, len(x))
        with self.changing():
            if new is None:
                check_last(self.next_id + len(x) - 1)
                new = memory.arange(self.next_id, self.next_id + len(x))
            # Above the largest none can be taken.
            elif len(new) and int(new.min()) < self.next_id:
                taken = new[self.snapshot.find(new) >= 0]
                if len(taken):
                    raise ValueError(f"ids: expected ids that are not in use, got {int(taken[0])}")
            self._append(x, new)

    def update(self, ids: Any, vectors: Any) -> None:
        """Replaces the vectors of these ids; a search finds all the old ones or all the new.

        They come last in the order of rows, so that a mask made before is of other rows. What is
        replaced takes room until ``compact``.

        Args:
            ids: ``[n]`` integers, as in ``add``, each in use, none twice.
            vectors: ``[n, D]``, as in ``add``.

        Raises:
            ValueError, TypeError: As in ``add``; an unknown id.
        """
        inputs.check_order(ids, vectors)
        x = inputs.vectors(vectors, "vectors", self.config.width)
        new = inputs.new_ids(ids, len(x))
        with self.changing():
            self._append(x, new, self._known(new, self.snapshot))

    def remove(self, ids: Any) -> None:
        """Removes the vectors of these ids; all of them or, where one is unknown, none.

        They take room until ``compact``, and a little of each search's time.

        Args:
            ids: ``[n]`` integers, as in ``add``.

        Raises:
            ValueError, TypeError: An unknown id; a wrong shape or dtype.
        """
        gone = inputs.ids(ids)
        with self.changing():
            rows = self._known(gone, self.snapshot)
            if len(rows):
                self.store.remove(rows)

    def compact(self) -> None:
        """Frees the room of vectors that were removed or replaced, by moving those after the
        first of them; while it runs the index may need twice its memory."""
        with self.changing():
            self.store.compact()

    def build_graph(self, *, progress: bool = True) -> None:
        """Builds a graph over the vectors there are, which a search may follow instead of looking
        at every row: by stages that begin with ``("graph", beam, keep)``, which ``tune`` tries.

        Of each vector it keeps 32 edges, the signs of all columns and four bits of each: 320 bytes
        with 256 columns, 832 with 1024. Vectors that are added later are searched beside it, until
        it is built again; removed ones are passed through and not found. ``compact`` drops it where
        rows of it move. Searches go on meanwhile; changes wait. The same vectors get the same graph
        on any number of threads.

        Args:
            progress: Show a bar.

        Raises:
            ValueError: An index without vectors, or on a device.
        """
        if self.config.device != "cpu":
            raise ValueError(f"device: expected 'cpu' for a graph, got {self.config.device!r}")
        with self.changing():
            now = self.snapshot
            if not now.size or now.count >= GRAPH_ROWS:
                expected = f"1 to {GRAPH_ROWS - 1:,} vectors to build a graph over"
                raise ValueError(f"index: expected {expected}, got {now.size:,}")
            metric = self.config.metric
            self.store.use_graph(RowGraph.build(now, self.layout, metric, progress=progress))

    def contains(self, ids: Any) -> Any:
        """Whether there is a vector of each id, ``[n]`` bool, of the kind of the ids; these are
        ``[n]`` integers, as in ``add``."""
        return like(ids)(self.snapshot.find(inputs.ids(ids)) >= 0)

    def reconstruct(self, ids: Any) -> Any:
        """The vectors of these ids, ``[n, D]`` fp32, as stored; rotated back where they were
        rotated.

        Args:
            ids: ``[n]`` integers, as in ``add``.

        Raises:
            ValueError, TypeError: An unknown id; a wrong shape or dtype.
        """
        wanted, now = inputs.ids(ids), self.snapshot
        vectors = now.vectors(self._known(wanted, now), self.config.width)
        if self.rotation is not None and len(vectors):
            vectors = self.rotation.undo(vectors)
        return like(ids)(vectors)

    def frozen(self) -> Frozen:
        with self.changing():
            now = self.snapshot
            blocks = zip(now.blocks, now.counts, strict=True)
            segments = [part for block, count in blocks for part in block.frozen(count)]
            return Frozen(segments, now.live, self.frame, self.next_id, now.graph)

    def adopt(
        self, blocks: Sequence[Block], counts: Sequence[int], live: Tensor | None,
        frame: Tensor | None, next_id: int, graph: RowGraph | None = None,
    ) -> None:  # fmt: skip
        """Takes over read-only blocks, all but the last of whole tiles, where there are no rows."""
        with self.changing():
            if frame is not None and self.rotation is not None:
                self.rotation.axes = frame[: self.config.width]
            self._use_frame(frame)
            self.next_id = next_id
            self.store.adopt(blocks, counts, live, graph)

    def thaw(self, frozen: Frozen, version: int = VERSION) -> None:
        """As ``adopt``; the arrays are of a version of the files."""
        self.layout.use(frozen.frame)
        counts = [used for used, _ in frozen.segments]
        blocks = [
            Block.of_version(version, self.layout, its, used) for used, its in frozen.segments
        ]
        self.adopt(blocks, counts, frozen.live, frozen.frame, frozen.next_id, frozen.graph)

    def _known(self, ids: Tensor, now: Snapshot) -> Tensor:
        """The rows of these ids, all of which there must be."""
        rows = now.find(ids)
        if bool((rows < 0).any()):
            raise ValueError(f"ids: expected ids of the index, got {int(ids[rows < 0][0])}")
        return rows

    def _append(self, x: Tensor, ids: Tensor, replacing: Tensor | None = None) -> None:
        if not len(x):
            return
        last = int(ids.max())
        check_last(last)
        next_id, before = max(self.next_id, last + 1), self.snapshot
        rotation, frame = self.rotation, self.frame
        if rotation is not None and rotation.axes is None:
            # Before a search can find what it rotated.
            self.rotation = Rotation(self.config.width).fit(x)
        if frame is None:
            self._set_frame(x)
        try:
            self.store.append(x, ids, self._convert, replacing)
        finally:  # Ctrl-C may come once rows are appended; in here, where nothing is called, not
            if self.store.snapshot is before:
                self.rotation, self.frame = rotation, frame
            else:
                self.next_id = next_id

    def _set_frame(self, x: Tensor) -> None:
        """Sets the frame: the rotation's axes, the codes' centre, and signs where a few columns are
        so much larger about it than others that codes lose by it."""
        axes = None if self.rotation is None else self.rotation.axes
        frame = [] if axes is None else [axes]
        if self.layout.ladder:
            samples = x[:: -(-len(x) // MEAN_ROWS)].float()
            if self.rotation is not None:
                samples = self.rotation.apply(samples)
            frame.append(centre_of(samples))
            few = samples[:: -(-len(samples) // SPREAD_ROWS)].double()
            squares = (few - frame[-1].double()).square().mean(dim=0)  # of columns
            ends = self.layout.ladder[:-1]
            # A rotation gives the columns between two dims the same.
            rotated = [slab.mean().expand(len(slab)) for slab in squares.tensor_split(ends)]
            uneven = squares.square().sum() > LEAST_GAIN * torch.cat(rotated).square().sum()
            if uneven and len(few) >= FEWEST_ROWS:
                frame.append(_signs(self.config.width))
        self._use_frame(torch.cat(frame) if frame else None)

    def _use_frame(self, frame: Tensor | None) -> None:
        self.frame = frame
        self.layout.use(frame)

    def _convert(self, part: Tensor) -> Tensor:
        """Vectors rotated and in the dtype that blocks take; the next call overwrites them."""
        if self.rotation is not None:
            part = self.rotation.apply(part)
        if part.dtype == self._added:
            return part
        if len(self._converted) < len(part):
            self._converted = memory.empty(*part.shape, dtype=self._added)
        stored = self._converted[: len(part)].copy_(part)
        check_finite(stored, "vectors as " + str(self._added).removeprefix("torch."))
        return stored


def _signs(width: int) -> Tensor:
    """``[1, width]`` fp32 of 1 and -1 at random, the same ones always."""
    generator = torch.Generator(memory.HOST).manual_seed(0)
    signs = torch.randint(
        2, (1, width), generator=generator, dtype=torch.float32, device=memory.HOST
    )
    return 2 * signs - 1


def check_last(last: int) -> None:
    if last > LARGEST_ID:
        raise ValueError(f"ids: expected ids below {LARGEST_ID + 1}, got {last}")


def backend_of(config: IndexConfig) -> Any:
    """The module that stores and searches rows where the index is."""
    if config.device == "cpu":
        return host_search
    from mrl_fast.search.index import device_search

    return device_search
