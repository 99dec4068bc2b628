"""``mrl-fast index verify``."""

import typer

from mrl_fast.cli.options import Folder, Json
from mrl_fast.cli.output import failing, say, show_json
from mrl_fast.search.index import MatryoshkaIndex


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
