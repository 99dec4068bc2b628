"""``mrl-fast index graph``, and searches that begin with it."""

import numpy as np
import pytest

from mrl_fast import MatryoshkaIndex
from tests.helpers.cli_index import BASE, QUERIES, ROWS, WIDTH, in_memory, run, run_json, saved

STAGES = f"graph:128:40,{WIDTH}:10"


def test_graph(tmp_path, built, queries):
    assert run_json("info", built)["graph"] is None and "graph" in run("info", built)
    assert "a graph over 3,000 vectors" in run("graph", built)
    summary = run_json("graph", built)
    assert summary["rows"] == ROWS and summary["graph_bytes"] > 128 * ROWS
    assert run_json("info", built)["graph"] == ROWS and "of 3,000 rows" in run("info", built)

    expected = in_memory()
    expected.build_graph(progress=False)
    stages = [("graph", 128, 40), (WIDTH, 10)]
    out = tmp_path / "found.npz"
    said = run_json("search", built, queries, "--stages", STAGES, "--out", out)
    assert said["stages"] == [list(stage) for stage in stages]
    with np.load(out) as found:
        assert np.array_equal(found["ids"], expected.search(QUERIES, 10, stages=stages).ids)

    run("add", built, saved(tmp_path / "more.npy", BASE[:5] * 2))
    run("remove", built, 0)
    loaded = MatryoshkaIndex.load(built, verify=True)
    assert loaded.search(BASE[:1] * 2, 1, stages=stages).ids.tolist() == [[ROWS]]
    run("compact", built)
    assert run_json("info", built)["graph"] is None
    said = run("search", built, queries, "--stages", STAGES, code=2)
    assert "--stages: stage 1: expected a graph: mrl-fast index graph first" in said


@pytest.mark.parametrize(
    "stages", ["graph:64", "graph:a:b,32:10", "graph:64:20", "graph:5:20,32:10"]
)
def test_bad_stages(built, queries, stages):
    run("graph", built)
    assert "--stages" in run("search", built, queries, "--stages", stages, code=2)


@pytest.mark.parametrize("stages", ["8:1:20,32:10", "8:20,32:4:10", "graph:64:20,8:1:20,32:10"])
def test_codes_that_the_index_has_not(built, queries, stages):
    run("graph", built)
    assert "--stages: " in run("search", built, queries, "--stages", stages, code=2)
