"""``mrl-fast index info`` and ``verify``: what they take and print."""

import typer

from mrl_fast.cli import build_job
from mrl_fast.cli.options import Folder, Json
from mrl_fast.cli.output import failing, say, show_fields, show_json, shown_stages
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.index import MatryoshkaIndex


def info(index: Folder, json: Json = False) -> None:
    """Say what an index holds: rows, settings, files, tuned stages.

    \b
    Example:
      mrl-fast index info my-index
    """
    with failing():
        loaded = MatryoshkaIndex.load(index)
        manifest = manifests.read(index)
        names = sorted({*manifests.files_of(manifest), manifests.FILE})
        files = {name: (index / name).stat().st_size for name in names}
        tuned = None if loaded.tuned is None else loaded.tuned._asdict()
        fields = {
            "index": index,
            "rows": len(loaded),
            "removed": loaded.removed,
            "dims": loaded.dims,
            "metric": loaded.metric,
            "dtype": loaded.dtype,
            "prefix_dtype": loaded.prefix_dtype,
            "rotation": manifest["rotation"],
        }
        building_of = build_job.unfinished(index)
        if json:
            show_json({
                **fields, "files": files, "bytes": sum(files.values()), "tuned": tuned,
                "unfinished": building_of,
            })  # fmt: skip
            return
        fields["rows"] = f"{fields['rows']:,}"
        if building_of:
            fields["rows"] += f" of {building_of['rows']:,} of {building_of['source']}: unfinished"
        fields["rotation"] = fields["rotation"] or "none"
        fields["removed"] = f"{fields['removed']:,}"
        fields["dims"] = ", ".join(map(str, loaded.dims))
        fields["files"] = f"{len(files)}, {sum(files.values()) / 2**20:,.1f} MiB"
        fields["tuned"] = "no"
        if tuned:
            fields["tuned"] = (
                f"{shown_stages(tuned['stages'])}, for k up to {tuned['k']}, with "
                f"{tuned['rows']:,} rows"
            )
            if tuned["stages"] and loaded._tuned_stages(1, loaded._rows.snapshot) is None:
                fields["tuned"] += "; out of date, searches are exact"
        show_fields(fields)


def verify(index: Folder, json: Json = False) -> None:
    """Read every file of an index and compare its checksum.

    No other command does: they check what files there are, their sizes and their headers. Vectors
    that are damaged have to be built again.

    Ends with code 0 where all is well, and with 1 where anything is damaged; then stderr names
    the file and the field.

    \b
    Example:
      mrl-fast index verify my-index
    """
    with failing():
        if not index.is_dir():
            raise ValueError(f"INDEX: expected a folder that holds an index, got {index}")
        try:
            loaded = MatryoshkaIndex.load(index, verify=True)
        except ValueError as error:
            if json:
                show_json({"index": index, "ok": False, "error": str(error)})
            say(str(error))
            raise typer.Exit(1) from None
        if json:
            show_json({"index": index, "ok": True, "error": None, "rows": len(loaded)})
        else:
            print(f"{index}: {len(loaded):,} rows, every checksum as it was written")
