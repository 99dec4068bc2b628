"""A small file of vectors, ``mrl-fast index`` commands run on it, and what they should give."""

import json

import numpy as np
from typer.testing import CliRunner

from mrl_fast import MatryoshkaIndex
from mrl_fast.cli.app import app

ROWS, WIDTH = 3000, 32
DIMS = "8,32"


def vectors(rows, seed):
    """Random vectors whose first columns are the largest."""
    noise = np.random.default_rng(seed).standard_normal((rows, WIDTH), np.float32)
    return noise / np.sqrt(1 + np.arange(WIDTH, dtype=np.float32))


BASE, QUERIES = vectors(ROWS, 0), vectors(300, 1)


def run(*arguments, code=0):
    """stdout of a command that ends with this code; stderr where it does not end with 0."""
    done = CliRunner().invoke(app, ["index", *map(str, arguments)], prog_name="mrl-fast")
    assert done.exit_code == code, (done.output, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.stdout if code == 0 else done.stderr


def said(*arguments):
    """stderr of a command that ends well."""
    done = CliRunner().invoke(app, ["index", *map(str, arguments)], prog_name="mrl-fast")
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stderr


def run_json(*arguments):
    return json.loads(run(*arguments, "--json"))


def saved(path, array):
    np.save(path, array)
    return path


def build(folder, source):
    """Builds an index of a file of vectors."""
    run("build", source, "--out", folder, "--dims", DIMS)
    return folder


def same_as(folder, index):
    """Checks that the folder holds the index's vectors and ids, and gives the same results."""
    loaded = MatryoshkaIndex.load(folder, verify=True)
    assert loaded.ids.tolist() == index.ids.tolist()
    assert loaded.reconstruct(loaded.ids).equal(index.reconstruct(index.ids))
    for ours, theirs in zip(loaded.search(QUERIES, 5), index.search(QUERIES, 5), strict=True):
        assert np.array_equal(ours, theirs)
    return loaded


def in_memory(rows=ROWS, ids=None, **settings):
    index = MatryoshkaIndex((8, 32), **settings)
    index.add(BASE[:rows], ids)
    return index
