"""What of a sharded index lasts beyond it: its folder, a pickle, a copy."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.disk import sharded_manifest as whole
from mrl_fast.search.disk.remote import fetched, is_remote
from mrl_fast.search.index import MatryoshkaIndex, persistence
from mrl_fast.search.index import validate as inputs
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.graph import walks
from mrl_fast.search.index.stages import checked_tuned
from mrl_fast.search.sharded import folder
from mrl_fast.search.sharded.local import LocalShards
from mrl_fast.search.sharded.protocol import Shards
from mrl_fast.search.sharded.routing import Placing
from mrl_fast.search.sharded.shard import IndexShard
from mrl_fast.shared.locks import Lock
from mrl_fast.shared.types import Tuned

Index = TypeVar("Index", bound="Persistent")


class Persistent:
    """A sharded index's state, and how it is saved and loaded."""

    config: IndexConfig
    _tuned: Tuned | None
    _shards: Shards
    _placing: Placing
    _frame: Tensor | None
    _lock: Lock
    _begin: Callable[[IndexConfig], None]  # of Searchable
    _hold: Callable[[Shards, Placing, Tensor | None], None]  # of Changes

    def _make(
        self, config: IndexConfig, shards: Shards, placing: Placing, frame: Tensor | None = None
    ) -> None:
        self._begin(config)
        self._hold(shards, placing, frame)
        self._left: dict[Path, folder.Entry] = {}  # the manifest of every folder, as it was left

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the folder does not have yet: a folder for each shard, which is a whole
        index's, and one manifest, which is replaced last. Until that is done, it holds what it
        held. A shard's folder may be opened by itself, and is not to be changed by itself.

        Args:
            path: A folder: new, empty, or with a sharded index, which is replaced.

        Raises:
            ValueError: A folder with other files, or with an index that is damaged or of another
                version; one that this index was saved to or loaded from, where another has saved
                since. Shards of other processes.
            OSError: The folder cannot be written to, or the disk is full.
        """
        shards = self._local("save").shards
        with self._lock:
            tuned = None if self._tuned is None else self._tuned.fields
            fields = {**self._placing._asdict(), "tuned": tuned}
            contents = folder.Contents(fields, [shard.state.order for shard in shards])

            def replaced(to: Path, manifest: folder.Entry) -> None:
                self._left[to] = manifest

            saves = [shard.save for shard in shards]
            known = [shard.index._saved and shard.index._saved.manifest for shard in shards]
            folder.save(Path(path), contents, saves, known, self._left, replaced)

    @classmethod
    def load(
        cls: type[Index], path: str | os.PathLike[str], *, device: str = "cpu", verify: bool = False
    ) -> Index:
        """Opens what ``save`` wrote, as of a MatryoshkaIndex; ``MatryoshkaIndex.load`` does, too.

        Args:
            path: The folder.
            device: As for a new index.
            verify: Read every file and compare its checksum.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: Another version, or damage: names the file and the field.
        """
        root, device = Path(os.path.realpath(_local(path))), inputs.device(device)

        def opened(manifest: folder.Entry) -> Index:
            shards = [
                IndexShard(MatryoshkaIndex._load(root / whole.folder_of(i), device, verify, each))
                for i, each in enumerate(manifest["shards"])
            ]
            orders = folder.orders_of(root, manifest, verify=verify)
            return cls._opened(root, manifest, [s.index for s in shards], orders)

        with torch.inference_mode(False):
            return manifests.settled(root, opened, whole.read)

    @classmethod
    def _opened(
        cls: type[Index],
        root: Path,
        manifest: folder.Entry,
        indexes: list[MatryoshkaIndex],
        orders: list[Any],
    ) -> Index:
        config, frame = indexes[0].config, indexes[0]._rows.frame
        for i, each in enumerate(indexes):
            own = each._rows.frame
            same = own is frame or (own is not None and frame is not None and own.equal(frame))
            if not same:
                raise ValueError(
                    f"{root / whole.folder_of(i)}: axes: expected those of the first shard, got "
                    "others"
                )
        shards = [IndexShard(*pair) for pair in zip(indexes, orders, strict=True)]
        placing = Placing(*(manifest[name] for name in Placing._fields))
        index = cls.__new__(cls)
        index._make(config, LocalShards(shards), placing, frame)
        index._left[root] = manifest
        if manifest["tuned"] is not None:
            try:
                tuned = checked_tuned(manifest["tuned"], replace(config, device="cpu"))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{root / whole.FILE}: {error}") from error
            bits = tuned.stages[0][1:-1] if tuned.stages else ()
            ranks = set(bits) <= set(config.ranking) and not walks(tuned.stages)
            index._tuned = tuned if config.device == "cpu" or ranks else None
        return index

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            shards = [(each.index, each.state.order) for each in self._local("pickle").shards]
            return {
                "config": self.config, "tuned": self._tuned, "placing": self._placing,
                "shards": shards, "left": self._left,
            }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        shards = [IndexShard(index, order) for index, order in state["shards"]]
        frame = shards[0].index._rows.frame
        self._make(state["config"], LocalShards(shards), state["placing"], frame)
        self._tuned, self._left = state["tuned"], dict(state["left"])

    def __copy__(self: Index) -> Index:
        state = self.__getstate__()
        state["shards"] = [(copy.copy(index), order) for index, order in state["shards"]]
        made = type(self).__new__(type(self))
        made.__setstate__(state)
        return made

    def __deepcopy__(self: Index, memo: Any) -> Index:
        return self.__copy__()

    def _local(self, what: str) -> LocalShards:
        if not isinstance(self._shards, LocalShards):
            kind = type(self._shards).__name__
            raise ValueError(f"{what}: expected shards in this process, got {kind}")
        return self._shards


def _local(path: Any) -> Any:
    return fetched(path) if is_remote(path) else path


def register(load: Callable[..., Any]) -> None:
    """Has ``MatryoshkaIndex.load`` open folders of shards by this."""
    persistence.LOADERS[whole.FORMAT] = load
