"""Several indexes that answer as one, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mrl_fast.search.disk.sharded_manifest import MOST, ROUTES
from mrl_fast.search.index import MatryoshkaIndex, cost
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.answers import Asked, Found
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.graph import walks
from mrl_fast.search.index.searchable import Searchable
from mrl_fast.search.index.stages import checked_stages
from mrl_fast.search.sharded import merge
from mrl_fast.search.sharded.changes import Changes
from mrl_fast.search.sharded.explained import summed
from mrl_fast.search.sharded.local import LocalShards
from mrl_fast.search.sharded.persistence import Persistent
from mrl_fast.search.sharded.protocol import ShardInfo, Shards, T
from mrl_fast.search.sharded.routing import Placing
from mrl_fast.search.sharded.shard import IndexShard
from mrl_fast.shared import memory
from mrl_fast.shared.arrays import like
from mrl_fast.shared.checks import check_choice, check_int
from mrl_fast.shared.types import Stage


class Whole:
    """All shards together, as they are asked."""

    def __init__(self, shards: Shards):
        self._shards = shards

    @property
    def infos(self) -> list[ShardInfo]:
        return self._shards.ask("info", [()] * len(self._shards))

    @property
    def size(self) -> int:
        return sum(info.size for info in self.infos)

    @property
    def graph(self) -> bool | None:
        """Whether any shard has one; None: none has."""
        return any(info.has_graph for info in self.infos) or None


class ShardedIndex(Searchable, Changes, Persistent):
    """A MatryoshkaIndex whose vectors lie in several, its shards.

    Exact search, range search and filters return the bits that one index of all vectors would,
    whose vectors were added in the same order. By stages each shard keeps a shortlist of its own:
    together these hold what one index's would and more, so that two stages find no less than there;
    what both find has the same scores.

    What is in force of MatryoshkaIndex is in force here: any number of threads may search while
    others change it, which take turns, and a search sees it as one of them left it.

    Args:
        dims, metric, dtype, prefix_dtype, codes, rotation, device: As of a MatryoshkaIndex. A
            rotation, and what codes are less, are fitted on the first vectors that are added, and
            every shard uses them.
        shards: How many, at least 1. They cannot be more later: load, and add to an index of more.
        route: Which shard takes a new vector: ``"turn"``, one after the other, so that they are of
            one size; or ``"id"``, that of number ``id % shards``, so that the id says where it is.

    Raises:
        ValueError, TypeError: As MatryoshkaIndex; no such number of shards or route.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        shards: int,
        route: str = "turn",
        metric: str = "cosine",
        dtype: str = "float32",
        prefix_dtype: str | None = None,
        codes: str | None = None,
        rotation: str | None = None,
        device: str = "cpu",
    ):
        shards = check_int(shards, "shards", 1, MOST)
        check_choice(route, "route", ROUTES)
        options = {
            "metric": metric, "dtype": dtype, "prefix_dtype": prefix_dtype, "codes": codes,
            "rotation": rotation, "device": device,
        }  # fmt: skip
        made = [IndexShard(MatryoshkaIndex(dims, **options)) for _ in range(shards)]
        self._make(made[0].index.config, LocalShards(made), Placing(route))

    @classmethod
    def over(
        cls, shards: Shards, config: IndexConfig, placing: Placing, frame: Tensor | None = None
    ) -> ShardedIndex:
        """The index of shards that are there, wherever they are.

        Args:
            shards: The way to them, at least one.
            config: That all of them have.
            placing: How far rows were dealt to them.
            frame: What all of their vectors are given in, as of ``IndexRows.frame``.
        """
        index = cls.__new__(cls)
        index._make(config, shards, placing, frame)
        return index

    @classmethod
    def from_group(cls, index: MatryoshkaIndex, group: Any = None) -> ShardedIndex:
        """The index of all ranks of a torch.distributed group, each of which holds its own rows.

        Equals an index of all ranks' rows, those of rank 0 first. Every rank calls this and each
        method of the result, ``len`` and properties of vectors too, with the same arguments, and
        gets the whole answer. ``tune`` measures in rank 0. Other arguments in a rank, an error
        there, or a rank that is gone are an error in all of them, the last within the group's
        timeout. Each rank changes its own index, in any way; the group searches what they hold.

        Args:
            index: This rank's, of the same options in all ranks but for the device, and with a
                rotation fitted to the same samples. No id is in two ranks: give ids where vectors
                are added.
            group: A process group, gloo or nccl; None is the default one.

        Raises:
            TypeError: No MatryoshkaIndex.
            ValueError: Other options or another rotation in a rank; an id in two ranks.
            RuntimeError: A rank is gone.
        """
        from mrl_fast.search.sharded.group import checked_shards

        shards = checked_shards(index, group)
        return cls.over(shards, index.config, Placing(ROUTES[0]), index._rows.frame)

    @property
    def shards(self) -> int:
        """How many there are."""
        return len(self._shards)

    @property
    def shard_sizes(self) -> list[int]:
        """How many vectors each shard holds."""
        return [info.size for info in self._now().infos]

    @property
    def nbytes(self) -> int:
        """Of vectors, codes, norms, ids."""
        return sum(info.nbytes for info in self._now().infos)

    @property
    def removed(self) -> int:
        """Vectors that were removed or replaced and take room until ``compact``."""
        return sum(info.rows - info.size for info in self._now().infos)

    @property
    def on_disk(self) -> bool:
        return any(info.on_disk for info in self._now().infos)

    @property
    def ids(self) -> Tensor:
        """The vectors' ids in the order of adding, as of a MatryoshkaIndex, ``[N]`` int64."""
        ids, places = self._listed()
        return torch.cat(ids)[torch.cat(places).argsort()]

    @property
    def rotation(self) -> Tensor | None:
        """The rotation, ``[D, D]`` fp32, its rows the new axes; None where there is none yet."""
        rotated = self.config.rotation is not None and self._frame is not None
        return self._frame[: self.width] if rotated and self._frame is not None else None

    def __len__(self) -> int:
        return self._now().size

    def __repr__(self) -> str:
        infos = self._now().infos
        size, count = (sum(getattr(info, name) for info in infos) for name in ("size", "rows"))
        removed = f", {count - size:,} removed" if count > size else ""
        tuned = "" if self._tuned is None or not self._tuned.stages else ", tuned"
        tuned = f", graphs{tuned}" if any(info.has_graph for info in infos) else tuned
        return (
            f"ShardedIndex({self.config}): {size:,} vectors{removed} in {len(infos)} shards, "
            f"{sum(info.nbytes for info in infos) / 2**20:,.1f} MiB{tuned}"
        )

    def contains(self, ids: Any) -> Any:
        """Whether there is a vector of each id, as of a MatryoshkaIndex."""
        with self._together():
            owners = self._owners(inputs.ids(ids))
        return like(ids)(owners >= 0)

    def reconstruct(self, ids: Any) -> Any:
        """The vectors of these ids, ``[n, D]`` fp32, as of a MatryoshkaIndex.

        Raises:
            ValueError, TypeError: An unknown id; a wrong shape or dtype.
        """
        with self._together():
            wanted = inputs.ids(ids)
            parts = self._known_parts(wanted)
            vectors = memory.empty(len(wanted), self.width)
            answers = self._shards.ask("vectors", [(wanted[part],) for part in parts])
        for part, found in zip(parts, answers, strict=True):
            vectors[part] = found
        return like(ids)(vectors)

    def explain(self, stages: Sequence[Stage], *, batch: int = 1) -> cost.Explanation:
        if stages is None:
            cost.explained(self.config, None, stages)  # type: ignore[arg-type]
        checked = checked_stages(stages, self.config)
        batch = check_int(batch, "batch", 1)
        return summed(self._shards.ask("explain", [(checked, batch)] * len(self._shards)))

    def _together(self) -> AbstractContextManager[None]:
        return self._shards.together()

    def _lead(self, call: Callable[[], T], *asked: Any) -> T:
        return self._shards.lead(call, asked)

    def _now(self) -> Whole:
        return Whole(self._shards)

    def _nearest(self, now: Whole, asked: Asked, allowed: Any) -> Found:
        if asked.stages is not None and walks(asked.stages) and now.graph is None:
            raise ValueError("stages[0]: expected a graph: build_graph() first, got none")
        filters = self._filters(now, allowed)
        founds = self._shards.ask("search", [(asked, each) for each in filters])
        return merge.nearest(founds, asked.k)

    def _within(
        self, now: Whole, asked: Asked, threshold: float, allowed: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        filters = self._filters(now, allowed)
        asking = [(asked, threshold, each) for each in filters]
        return merge.within(self._shards.ask("range_search", asking))

    def _filters(self, now: Whole, allowed: Any) -> list[Tensor | None]:
        """What each shard may find: ids, or a bool for each of its vectors."""
        if allowed is None:
            return [None] * len(self._shards)
        checked = inputs.allowed(allowed, now.size)
        assert checked is not None
        if checked.dtype != torch.bool:
            return [checked] * len(self._shards)
        _, places = self._listed()
        rank = torch.cat(places).argsort().argsort()  # of a shard's vector in ``ids``
        mask = checked.cpu()
        return [mask[mine] for mine in rank.split([len(its) for its in places])]

    def _listed(self) -> tuple[list[Tensor], list[Tensor]]:
        """The ids of each shard, and their places."""
        ids, places = zip(*self._shards.ask("ids", [()] * len(self._shards)), strict=True)
        return list(ids), list(places)
