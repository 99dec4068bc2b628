"""``mrl-fast index info``."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from mrl_fast.cli import folders, sidecars
from mrl_fast.cli.options import Folder, Json
from mrl_fast.cli.output import check_out, failing, replacing, show_fields, show_json
from mrl_fast.search.index import MatryoshkaIndex
from mrl_fast.search.sharded import ShardedIndex
from mrl_fast.shared.types import Tuned

IDS = (".npy", ".txt")
SHOWN = 8  # shards whose sizes are printed
WriteIds = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the ids in the order of rows, which is that of masks: .npy, or .txt with one a "
        "line.",
    ),
]


def info(index: Folder, ids: WriteIds = None, json: Json = False) -> None:
    """Say what an index holds: rows, settings, files, tuned stages.

    \b
    Examples:
      mrl-fast index info my-index
      mrl-fast index info my-index --ids ids.npy
    """
    with failing():
        loaded = MatryoshkaIndex.load(index)
        if ids is not None:
            check_out(ids, "--ids", IDS)
            with replacing(ids) as new:
                write = np.save if ids.suffix == ".npy" else partial(np.savetxt, fmt="%d")
                write(new, loaded.ids.numpy())
        parts, files = folders.parts_of(index), folders.files_of(index)
        graphs = sum(part["graph"]["rows"] for part in parts if part["graph"])
        sharded = isinstance(loaded, ShardedIndex)
        fields: dict[str, Any] = {
            "index": index,
            "rows": len(loaded),
            "shards": loaded.shard_sizes if sharded else None,
            "removed": loaded.removed,
            "dims": loaded.dims,
            "metric": loaded.metric,
            "dtype": loaded.dtype,
            "prefix_dtype": loaded.prefix_dtype,
            "codes": loaded.codes,
            "graph": graphs or None,
            "rotation": parts[0]["rotation"],
            "files": files,
            "bytes": sum(files.values()),
            "tuned": None if loaded.tuned is None else loaded.tuned._asdict(),
            "unfinished": sidecars.unfinished(index),
            "columns": sidecars.columns(index),
        }
        if json:
            show_json(fields)
        else:
            show_fields(_in_words(fields))


def _in_words(fields: dict[str, Any]) -> dict[str, Any]:
    words = dict(fields)
    files, size, tuned, source = (
        words.pop(name) for name in ("files", "bytes", "tuned", "unfinished")
    )
    words["rows"] = f"{fields['rows']:,}"
    if source:
        words["rows"] += f" of {source['rows']:,} of {source['source']}: unfinished"
    words["columns"] = ", ".join(f"{n} {value}" for n, value in fields["columns"].items()) or "none"
    words["rotation"] = fields["rotation"] or "none"
    words["codes"] = fields["codes"] or "none"
    sizes = words.pop("shards")
    if sizes:
        shown = ", ".join(f"{size:,}" for size in sizes[:SHOWN])
        words["shards"] = f"{len(sizes)}, of {shown}{' …' if len(sizes) > SHOWN else ''} rows"
    words["graph"] = f"of {fields['graph']:,} rows" if fields["graph"] else "none"
    words["removed"] = f"{fields['removed']:,}"
    words["dims"] = ", ".join(map(str, fields["dims"]))
    words["files"] = f"{len(files)}, {size / 2**20:,.1f} MiB"
    words["tuned"] = str(Tuned(**tuned)) if tuned else "no"
    return words
