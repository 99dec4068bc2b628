"""The options of an index that codes its rows in one way or another, by the code's name."""

from mrl_fast.search.index.codes import CODES

CODINGS = tuple(CODES)


def coding(name):
    return {"codes": name} if CODES[name].whole else {"prefix_dtype": name}
