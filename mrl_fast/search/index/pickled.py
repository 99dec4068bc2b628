"""An index for pickle and copy: the arrays that its files would hold, or where they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mrl_fast.search.disk.manifest import VERSIONS, completed
from mrl_fast.search.index.graph import RowGraph, parts
from mrl_fast.search.index.rows import Frozen
from mrl_fast.shared import memory
from mrl_fast.shared.arrays import as_tensor


class Copies:
    """An index's part in pickle and copy."""

    def __getstate__(self) -> dict[str, Any]:
        return state_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)

    def __copy__(self) -> Any:
        return copied(self)

    def __deepcopy__(self, memo: Any) -> Any:
        return copied(self)


def state_of(index: Any) -> dict[str, Any]:
    """What pickle keeps of a MatryoshkaIndex: the path and the checksum of the folder that it was
    loaded from, if it is still as that has it; else its arrays."""
    with index._rows.changing():
        state: dict[str, Any] = {"version": index._rows.layout.version, "device": index.device}
        if index._is_as_loaded():
            manifest = index._saved.manifest
            at = {name: manifest[name] for name in ("generation", "sha256")}
            return {**state, "path": str(index._saved.path), **at}
        frozen = index._rows.frozen()
        return {
            **state,
            "fields": index._fields(),
            "segments": [
                (used, {name: _bytes(x) for name, x in arrays.items()})
                for used, arrays in frozen.segments
            ],
            "live": _bytes(frozen.live),
            "axes": _bytes(frozen.frame),
            "graph": frozen.graph
            and (frozen.graph.rows, {n: _bytes(x) for n, x in frozen.graph.arrays.items()}),
        }


def restore(index: Any, state: dict[str, Any]) -> None:
    """Makes a bare object the index whose state this is.

    Raises:
        ValueError: The state is another version's; or the folder has been saved to since.
        FileNotFoundError: The folder is gone.
    """
    if state["version"] not in VERSIONS:
        versions = " or ".join(map(str, VERSIONS))
        raise ValueError(f"version: expected {versions}, got a pickle of {state['version']}")
    if "path" in state:
        loaded = type(index).load(state["path"], device=state["device"])
        there = loaded._saved.manifest
        if there["sha256"] != state["sha256"]:
            raise ValueError(
                f"path: expected {state['path']} as when the index was pickled (generation "
                f"{state['generation']}), got generation {there['generation']}, which another has "
                "saved: pickle it again, or send the path and load it where it is needed"
            )
        index.__dict__.update(loaded.__dict__)
        return
    fields = completed(state["fields"])
    made, layout = type(index)._from_fields(state["device"], fields)
    segments = []
    for used, data in state["segments"]:
        arrays = layout.parts(data["ids"].nbytes // 8, state["version"])
        segments.append((used, {name: _tensor(data[name], *arrays[name]) for name in arrays}))
    live, axes = state["live"], state["axes"]
    if live is not None:
        live = _tensor(live, torch.int64, (live.nbytes // 8,))
    if axes is not None:
        axes = _tensor(axes, torch.float32, (layout.axes(state["version"]), layout.width))
    graph = state.get("graph")
    if graph is not None:
        rows, data = graph
        kinds = parts(layout, rows, data["entries"].nbytes // 4)
        arrays = {name: _tensor(data[name], *kinds[name]) for name in kinds}
        graph = RowGraph(rows, layout, arrays)
    frozen = Frozen(segments, live, axes, fields["next_id"], graph)
    made._rows.thaw(frozen, state["version"])
    index.__dict__.update(made.__dict__)


def copied(index: Any) -> Any:
    """The same index, to be changed by itself: the two share what neither ever writes to."""
    copy: Any = object.__new__(type(index))
    copy.__dict__.update(index.__dict__)
    copy._make(index.config)
    with index._rows.changing():
        copy._rows.thaw(index._rows.frozen())
        copy._rows.store.saved_prefix_rows = index._rows.store.saved_prefix_rows
        copy._tuned, copy._saved, copy._left = index._tuned, index._saved, {**index._left}
        if index._is_as_loaded():
            copy._loaded_marks = copy._marks()
    return copy


def _bytes(x: Tensor | None) -> Any:
    """As a numpy array: of a tensor pickle would take the whole storage, or share it."""
    return None if x is None else x.reshape(-1).view(torch.uint8).numpy()


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    x = memory.lasting(*shape, dtype=dtype)
    return x.copy_(as_tensor(data, "state").view(dtype).view(shape))
