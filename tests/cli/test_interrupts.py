"""Ctrl-C in every command of ``mrl-fast index``: code 130, one line that says what an index holds,
and nothing half-written."""

import os
import signal

import numpy as np
import pytest
from typer.testing import CliRunner

from mrl_fast import MatryoshkaIndex
from mrl_fast.cli.app import app
from mrl_fast.search.index.tuning import TuneReport
from tests.helpers.cli_index import BASE, QUERIES, run_json, same_as, saved

DONE = {
    "update": ("replaced in", "all vectors were replaced in"),
    "remove": ("removed from", "all of them were removed from"),
    "compact": ("changed in", "the room was freed in"),
}


def interrupting(monkeypatch, owner, name, *, when, call=1):
    """A method that meets Ctrl-C before or after it did its work, at the call-th call."""
    original, calls = getattr(owner, name), 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            signal.raise_signal(signal.SIGINT)
        result = original(*args, **kwargs)
        if calls == call and when == "after":
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, interrupted)


def stopped(*arguments):
    """What stderr says, after a line a checkpoint."""
    done = CliRunner().invoke(app, ["index", *map(str, arguments)], prog_name="mrl-fast")
    assert done.exit_code == 130 and done.stdout == "", (done.output, done.exception)
    *checkpoints, last = done.stderr.splitlines()
    assert all(line.startswith("mrl-fast: build: ") for line in checkpoints), done.stderr
    assert last.startswith("mrl-fast: interrupted")
    return last


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """No temporary file, whatever was stopped."""
    yield
    left = [name for _, _, names in os.walk(tmp_path) for name in names if ".new" in name]
    assert not left


@pytest.mark.parametrize("when", ["before", "after"])
def test_add(built, queries, monkeypatch, when):
    before = MatryoshkaIndex.load(built)
    interrupting(monkeypatch, MatryoshkaIndex, "save", when=when)
    said = stopped("add", built, queries)
    if when == "before":
        assert f"nothing was added to {built}" in said
        same_as(built, before)
    else:
        assert f"all rows were added to {built}" in said
        assert len(MatryoshkaIndex.load(built, verify=True)) == len(BASE) + len(QUERIES)


@pytest.mark.parametrize(
    ("name", "when"),
    [("change", "before"), ("change", "after"), ("save", "before"), ("save", "after")],
)
@pytest.mark.parametrize("command", ["update", "remove", "compact"])
def test_update_remove_and_compact(tmp_path, built, queries, monkeypatch, command, name, when):
    index = MatryoshkaIndex.load(built)
    index.remove([3])
    index.save(built)
    before = MatryoshkaIndex.load(built)
    ids = saved(tmp_path / "ids.npy", np.arange(len(QUERIES)) + 5)
    arguments = {"update": [queries, "--ids", ids], "remove": [7, 8], "compact": []}[command]
    interrupting(monkeypatch, MatryoshkaIndex, command if name == "change" else name, when=when)
    said = stopped(command, built, *arguments)
    monkeypatch.undo()
    if (name, when) != ("save", "after"):
        assert f"nothing was {DONE[command][0]} {built}" in said
        same_as(built, before)
        return
    assert f"{DONE[command][1]} {built}" in said
    change = {
        "update": lambda: index.update(np.arange(len(QUERIES)) + 5, QUERIES),
        "remove": lambda: index.remove([7, 8]),
        "compact": index.compact,
    }[command]
    change()
    assert same_as(built, index).removed == index.removed


@pytest.mark.parametrize(
    ("owner", "name", "call", "when"),
    [
        (MatryoshkaIndex, "search", 1, "before"),
        (MatryoshkaIndex, "search", 9, "after"),
        (MatryoshkaIndex, "save", 1, "before"),
        (MatryoshkaIndex, "save", 1, "after"),
        (TuneReport, "plot", 1, "before"),
        (TuneReport, "plot", 1, "after"),
    ],
)
def test_tune(tmp_path, built, queries, monkeypatch, owner, name, call, when):
    interrupting(monkeypatch, owner, name, call=call, when=when)
    said = stopped("tune", built, queries, "-k", 5, "--recall", 0.5, "--plot", tmp_path / "t.png")
    is_saved = name == "plot" or (name == "save" and when == "after")
    expected = "the stages are saved in" if is_saved else "nothing was saved in"
    assert f"{expected} {built}" in said
    tuned = run_json("info", built)["tuned"]
    assert tuned["k"] == 5 if is_saved else tuned is None
    MatryoshkaIndex.load(built, verify=True)
    assert not (tmp_path / "t.png").exists(), "it is there once it is whole"


@pytest.mark.parametrize("suffix", ["npz", "jsonl"])
@pytest.mark.parametrize("there", [False, True])
def test_search(tmp_path, built, queries, monkeypatch, suffix, there):
    monkeypatch.setattr("mrl_fast.cli.search_job.BATCH", 64)
    out = tmp_path / f"r.{suffix}"
    if there:
        out.write_bytes(b"of before")
    interrupting(monkeypatch, MatryoshkaIndex, "search", when="after", call=3)
    stopped("search", built, queries, "--out", out)
    assert out.read_bytes() == b"of before" if there else not out.exists()


@pytest.mark.parametrize(
    ("name", "when", "call"),
    [("fit", "after", 1), ("save", "before", 1), ("add", "before", 1), ("save", "before", 2)],
)
def test_a_build_that_saved_nothing(tmp_path, monkeypatch, name, when, call):
    source = saved(tmp_path / "base.npy", BASE)
    command = ["build", source, "--out", tmp_path / "out", "--dims", "8,32", "--rotation", "pca"]
    interrupting(monkeypatch, MatryoshkaIndex, name, when=when, call=call)
    stopped(*command)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    monkeypatch.undo()
    assert run_json(*command)["added"] == len(BASE)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_build_that_was_saving(tmp_path, monkeypatch, when):
    source = saved(tmp_path / "base.npy", BASE)
    command = ["build", source, "--out", tmp_path / "out", "--dims", "8,32", "--checkpoint", 1000]
    interrupting(monkeypatch, MatryoshkaIndex, "save", when=when, call=3)  # the second checkpoint
    rows = 1000 if when == "before" else 2000
    said = stopped(*command)
    assert f"{rows:,} of 3,000 rows are in {tmp_path / 'out'}; the same command goes on" in said
    monkeypatch.undo()
    assert run_json(*command)["added"] == 3000 - rows
    index = MatryoshkaIndex.load(tmp_path / "out", verify=True)
    assert np.array_equal(index.reconstruct(index.ids), BASE)
