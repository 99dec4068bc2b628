"""What ``mrl-fast index`` says in the words of the shell: of prefixes, of stages that lapsed, of a
tune that ran out of time, of what cannot be written."""

import os
import re

import numpy as np
import pytest

from mrl_fast import MatryoshkaIndex
from mrl_fast.cli.output import in_options
from mrl_fast.search.index import tuning
from mrl_fast.search.index.tune_report import TuneReport, TuneRow, Untried
from mrl_fast.shared.types import Tuned
from tests.helpers.cli_index import BASE, QUERIES, ROWS, build, run, run_json, said, saved

STAGES = [(8, 40), (32, 5)]


@pytest.fixture
def tuned(tmp_path):
    folder = build(tmp_path / "index", saved(tmp_path / "base.npy", BASE))
    index = MatryoshkaIndex.load(folder)
    index._tuned = Tuned(STAGES, 5, ROWS)
    index.save(folder)
    return folder


def test_a_prefix_is_named(tmp_path, tuned, queries):
    narrow = saved(tmp_path / "narrow.npy", np.ascontiguousarray(QUERIES[:, :8]))
    assert "k=10, by exact search, by the first 8 columns: " in run("search", tuned, narrow)
    assert "columns" not in run("search", tuned, queries)
    for file, dim in ((narrow, 8), (queries, 32)):
        found = run_json("search", tuned, file, "-k", 9)
        assert found["dim"] == dim and (found["lapsed"] is None) == (dim == 8)


def test_how_much_is_shown_is_said(tuned, queries):
    assert "shown: 3 of 300 queries, 10 of 800 neighbours\n" in run(
        "search", tuned, queries, "-k", 800
    )
    assert "shown: 3 of 300 queries, 4 of 4 neighbours\n" in run("search", tuned, queries, "-k", 4)
    assert "shown:" not in run("search", tuned, queries, "-k", 4, "--limit", 3)


def test_lapsed_stages_speak_shell(tuned, queries):
    noted = said("search", tuned, queries, "-k", 7)
    again = r"\(mrl-fast index tune INDEX samples -k 7\), or give --stages or --exact\n"
    assert re.fullmatch(rf"mrl-fast: warning: the index is searched exactly, .*{again}", noted)
    document = run_json("search", tuned, queries, "-k", 7)
    assert document["lapsed"] == "it is tuned for k up to 5 and -k 7 was asked for"
    for options in (["-k", 5], ["-k", 7, "--exact"], ["-k", 7, "--stages", "8:40,32:7"]):
        assert run_json("search", tuned, queries, *options)["lapsed"] is None
        assert said("search", tuned, queries, *options) == ""
    run("add", tuned, queries)
    run("add", tuned, queries, "--limit", 1)
    document = run_json("search", tuned, queries, "-k", 5)
    assert document["lapsed"] == "it was tuned with 3,000 vectors and now holds 3,301"
    assert "samples -k 5)" in said("search", tuned, queries, "-k", 2)


def test_a_filter_is_searched_exactly_in_shell_words(tmp_path, tuned, queries):
    command = (
        "search",
        tuned,
        queries,
        "-k",
        5,
        "--allowed",
        saved(tmp_path / "i.npy", np.arange(9)),
    )
    why = "what tune showed holds for all vectors, not for those of --allowed"
    assert said(*command).endswith(f", as {why}: give --stages or --exact\n")
    assert said(*command).count("\n") == 1 and run_json(*command)["lapsed"] == why
    assert said(*command, "--exact") == "" == said(*command, "--stages", "8:40,32:5")


def test_stages_stay_where_no_list_could_be_tried(tuned, queries):
    command = "tune", tuned, queries, "-k", 5, "--seconds", 1e-6
    noted = said(*command)
    assert f"{tuned} stays tuned to 8:40 32:5, and " in noted and "give more --seconds" in noted
    assert "nothing was saved" in run(*command) and "(--seconds 1e-06)" in run(*command)
    assert run_json(*command)["saved"] is False
    assert MatryoshkaIndex.load(tuned).tuned.stages == STAGES


@pytest.mark.parametrize("why", [tuning.PASSED, tuning.SLOW])
def test_stages_that_exact_search_replaces(tuned, queries, monkeypatch, why):
    """They are named where the time did not do, and not where the lists were too slow."""
    command = "tune", tuned, queries, "-k", 5

    def late(index, *_, **__):
        index._tuned = Tuned(None, 5, len(index), 0.99)
        refused = TuneRow(STAGES, 0.5, 0.4, 1.0, 9, 9, accepted=False, pareto=False)
        left = (Untried(4, why),)
        return TuneReport(None, 1.0, 1.0, 2.0, 5, 0.99, 300, "a note", (refused,), left)

    monkeypatch.setattr(MatryoshkaIndex, "tune", late)
    noted = said(*command)
    words = "exact search replaces 8:40 32:5, and 4 stage lists were not tried for want of time"
    assert (words in noted) == (why == tuning.PASSED)
    assert MatryoshkaIndex.load(tuned).tuned.stages is None
    assert "ms is of a call of 300 queries" in run(*command)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("path: expected a folder", "INDEX: expected a folder"),
        (
            "x.parquet: id_column: expected one of 'v'",
            "x.parquet: --id-column: expected one of 'v'",
        ),
        ("stages[1] dim: expected 8", "--stages: stage 2, dim: expected 8"),
        ("prefix_dtype: with codes='bits', which", "--prefix-dtype: with --codes bits, which"),
        ("i/manifest.json: dims: expected x", "i/manifest.json: dims: expected x"),
        ("recall=1/key=2/x.npy: expected a file", "recall=1/key=2/x.npy: expected a file"),
    ],
)
def test_arguments_are_named_as_options(message, expected):
    assert in_options(message) == expected


def test_settings_that_differ_are_named_in_words(tmp_path, tuned):
    error = run(
        "build", tmp_path / "base.npy", "--out", tuned, "--codes", "bits", "--dims", "8,32", code=2
    )
    assert "--codes: expected none as in " in error and ", got bits;" in error


def test_where_nothing_can_be_written(tmp_path, tuned, queries, monkeypatch):
    error = run("build", queries, "--out", queries / "i", code=2)
    assert re.fullmatch(
        rf"mrl-fast: {queries}.*: expected a place .*, got Not a directory\n", error
    )
    (tmp_path / "r.npz").mkdir()
    error = run("search", tuned, queries, "--out", tmp_path / "r.npz", code=2)
    assert "--out: expected a file to write in a folder, got the folder" in error
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    error = run("search", tuned, queries, "--out", tmp_path / "s.npz", code=2)
    assert f"got {tmp_path}, which is not to be written to" in error
