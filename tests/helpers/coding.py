"""The options of an index that codes its rows in one way or another, by the code's name."""

from mrl_fast.search.index.codes import CODES
from mrl_fast.shared.native import TILE

CODINGS = tuple(CODES)


def coding(name):
    return {"codes": name} if CODES[name].whole else {"prefix_dtype": name}


def whole_tiles(index, tiles=3):
    """The statistics and codes of an index's first rows, so many tiles that are full."""
    arrays = index._rows.snapshot.blocks[0].arrays
    names = ("signs", "nibbles", "lows", "tile_stats")
    return [arrays["stats"][:, : tiles * TILE], *(arrays[name][:tiles] for name in names)]
