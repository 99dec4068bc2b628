"""``mrl-fast index search``, ``tune``, ``info`` and ``verify`` as a user meets them; what every
command says to bad input."""

import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

from mrl_fast import MatryoshkaIndex
from mrl_fast.cli.app import app
from mrl_fast.shared.types import Tuned
from tests.helpers.cli_index import (
    BASE,
    DIMS,
    QUERIES,
    ROWS,
    WIDTH,
    build,
    in_memory,
    run,
    run_json,
    said,
    saved,
)
from tests.helpers.search import METRICS

COMMANDS = (
    "build", "add", "update", "remove", "compact", "search", "tune", "info", "verify"
)  # fmt: skip


def test_search_writes_what_python_finds(tmp_path, built, queries, monkeypatch):
    monkeypatch.setattr("mrl_fast.cli.search_job.BATCH", 64)
    scores, ids = MatryoshkaIndex.load(built).search(QUERIES, 7)
    assert "wrote" in run("search", built, queries, "-k", 7, "--out", tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as found:
        assert np.array_equal(found["scores"], scores) and np.array_equal(found["ids"], ids)
    run("search", built, queries, "-k", 7, "--out", tmp_path / "r.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    document = run_json("search", built, queries, "-k", 7)
    assert document["results"] == lines and document["stages"] is None
    assert [line["query"] for line in lines] == list(range(300))
    assert [line["ids"] for line in lines] == ids.tolist()
    assert np.array_equal(np.float32([line["scores"] for line in lines]), scores)
    summary = run_json("search", built, queries, "--out", tmp_path / "r.jsonl", "--limit", 4)
    assert "results" not in summary and summary["queries"] == 4 and summary["k"] == 10
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4
    assert sorted(os.listdir(tmp_path)) == ["base.npy", "index", "queries.npy", "r.jsonl", "r.npz"]


def test_search_prints_the_first_queries(built, queries, monkeypatch):
    monkeypatch.setattr("mrl_fast.cli.search_job.BATCH", 2)
    table = run("search", built, queries, "-k", 2)
    scores, ids = MatryoshkaIndex.load(built).search(QUERIES, 2)
    rows = [re.findall(r"-?[\d.]+", line) for line in table.splitlines() if "│" in line]
    shown = [[float(cell) for cell in row] for row in rows]
    assert len(shown) == 3 * 2
    for query, rank, i, score in shown:
        at = int(query), int(rank) - 1
        assert i == ids[at] and score == pytest.approx(scores[at], rel=1e-5)
    assert "300 queries, k=2, by exact search" in table


def test_stages_exact_and_allowed(tmp_path, built, queries):
    index = MatryoshkaIndex.load(built)

    def ids_of(*options):
        document = run_json("search", built, queries, "-k", 3, *options)
        return [found["ids"] for found in document["results"]], document["stages"]

    found, stages = ids_of("--stages", "8:5,32:3")
    assert stages == [[8, 5], [32, 3]]
    assert found == index.search(QUERIES, 3, stages=[(8, 5), (32, 3)]).ids.tolist()
    exact, stages = ids_of("--exact")
    assert stages is None and exact == index.search(QUERIES, 3).ids.tolist() != found
    (tmp_path / "allowed.txt").write_text("11\n2\n77777\n")
    found, _ = ids_of("--allowed", tmp_path / "allowed.txt")
    assert all(sorted(ids) == [2, 11] for ids in found), "missing neighbours are left out"
    run(
        "search", built, queries, "--allowed", tmp_path / "allowed.txt", "--out", tmp_path / "r.npz"
    )
    with np.load(tmp_path / "r.npz") as arrays:
        assert (arrays["ids"][:, 2:] == -1).all() and np.isneginf(arrays["scores"][:, 2:]).all()


def test_queries_of_a_prefix(tmp_path, built):
    narrow = saved(tmp_path / "narrow.npy", np.ascontiguousarray(QUERIES[:, :8]))
    expected = in_memory().search(QUERIES[:, :8], 3)
    truth = saved(tmp_path / "truth.npy", expected.ids)
    found = run_json("search", built, narrow, "-k", 3, "--truth", truth)
    assert [each["ids"] for each in found["results"]] == expected.ids.tolist()
    assert found["recall"] == 1 and found["stages"] is None
    found = run_json("search", built, narrow, "-k", 3, "--stages", "8:3", "--truth", truth)
    assert found["recall"] == 1 and found["stages"] == [[8, 3]]
    error = run("search", built, narrow, "--stages", "8:40,32:10", code=2)
    assert "dim: expected at most 8, the queries' width, got 32" in error


def test_recall_of_truth(tmp_path, built, queries):
    truth = in_memory().search(QUERIES, 20).ids
    np.save(tmp_path / "truth.npy", truth)
    text = run("search", built, queries, "-k", 10, "--truth", tmp_path / "truth.npy")
    assert "recall@10 1.0000" in text
    truth = truth.astype(np.int32)
    truth[:, 0] = -5  # of the first ten nine are left to be found
    truth[:100, 1] = 99999
    words = np.concatenate([np.full((300, 1), 20, np.int32), truth], axis=1)
    words.tofile(tmp_path / "truth.ivecs")
    summary = run_json("search", built, queries, "-k", 10, "--truth", tmp_path / "truth.ivecs")
    assert summary["recall"] == pytest.approx((300 * 9 - 100) / (300 * 9))


def copies(tmp_path, metric="cosine"):
    """An index of four vectors, each there five times: ids i, i + 4, i + 8, …"""
    rows = np.tile(np.eye(4, WIDTH, dtype=np.float32) + BASE[:4] / 9, (5, 1))
    source = saved(tmp_path / "copies.npy", rows)
    run("build", source, "--out", tmp_path / metric, "--dims", DIMS, "--metric", metric)
    return tmp_path / metric, rows


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("stages", [[], ["--stages", "8:20,32:3"], ["--stages", "8:3"]])
def test_what_ties_with_the_true_ones_is_found(tmp_path, metric, stages):
    folder, rows = copies(tmp_path, metric)
    queries = saved(tmp_path / "q.npy", rows[:4])
    # Each finds i, i + 4, i + 8; as true ids: the others that equal it, some of these, none.
    for true, expected in (
        ([16, 12, 8], 1),
        ([4, 0, 8], 1),
        ([8, 4, 1], 2 / 3),  # the worst is another vector, and missed
        ([1, 2, 3], 0),
        ([12, 16, 777], 2 / 3),  # 777 is not in the index
        ([16, -1, -1], 1),
        ([777, 888, 999], 0),
    ):
        truth = saved(tmp_path / "truth.npy", np.array([true]))
        command = "search", folder, queries, "-k", 3, "--limit", 1, "--truth", truth, *stages
        assert run_json(*command)["recall"] == pytest.approx(expected), true


def test_search_on_a_device(built, queries, monkeypatch):
    load, devices = MatryoshkaIndex.load, []

    def recorded(path, *, device="cpu"):
        devices.append(device)
        return load(path, device=device)

    monkeypatch.setattr(MatryoshkaIndex, "load", recorded)
    options = "search", built, queries, "--limit", 2, "-k", 3, "--stages", "8:40,32:3"
    mine, theirs = run_json(*options, "--device", "cuda"), run_json(*options)
    for found, expected in zip(mine["results"], theirs["results"], strict=True):
        assert found["ids"] == expected["ids"]
        assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5)
    assert devices == ["cuda", "cpu"]


# --- tune


def test_tune_is_kept(tmp_path, built, queries):
    report = run_json(
        "tune", built, queries, "-k", 5, "--recall", 0.9, "--plot", tmp_path / "t.png",
        "--seconds", 30,
    )  # fmt: skip
    assert report["seconds"] > 0
    assert all(set(left) == {"lists", "why"} for left in report["untried"])
    assert report["recall_bound"] >= 0.9 and report["k"] == 5
    assert any(row["stages"] == report["stages"] for row in report["rows"])
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    described = run_json("info", built)
    tuned = {"stages": report["stages"], "k": 5, "rows": ROWS, "recall": 0.9, "in_force": True}
    assert described["tuned"] == tuned
    assert "for k up to 5 at recall 0.9" in run("info", built)
    stages = run_json("search", built, queries, "-k", 4)["stages"]
    assert stages == (report["stages"] and [*report["stages"][:-1], [32, 4]])
    assert "For recall@5 of 0.9" in run("tune", built, queries, "-k", 5, "--recall", 0.9)


def test_stages_that_are_out_of_date(built, queries):
    index = MatryoshkaIndex.load(built)
    index._tuned = Tuned([(8, 40), (32, 5)], 5, ROWS)
    index.save(built)
    for _ in range(2):
        assert "3,000 vectors" in (text := run("info", built)) and "lapsed" not in text
        run("add", built, queries, "--limit", ROWS // 20)
    assert run_json("search", built, queries, "-k", 5)["stages"] == [[8, 40], [32, 5]]
    run("add", built, queries, "--limit", 1)
    assert "lapsed" in run("info", built)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run_json("search", built, queries, "-k", 5)["stages"] is None
        noted = said("search", built, queries, "-k", 5)
        assert re.match("mrl-fast: warning: .*exactly, .* it was tuned with 3,000 vectors", noted)
        assert said("search", built, queries, "-k", 5, "--quiet") == ""
        assert "-k 6 was asked for" in said("search", built, queries, "-k", 6)


def test_no_matplotlib_is_said_before_the_work(built, queries, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = run("tune", built, queries, "--plot", "t.png", code=2)
    assert error == "mrl-fast: needs matplotlib: pip install 'mrl-fast[demo]'\n"
    assert run_json("info", built)["tuned"] is None


# --- info, verify


def test_info_counts_files_and_what_was_removed(built):
    index = MatryoshkaIndex.load(built)
    index.remove(index.ids[:7])
    index.save(built)
    described = run_json("info", built)
    assert (described["rows"], described["removed"]) == (ROWS - 7, 7)
    assert described["files"] == {file.name: file.stat().st_size for file in built.iterdir()}
    assert described["bytes"] == sum(described["files"].values())
    assert re.search(r"removed\s+│ 7 ", run("info", built))


def test_verify(built):
    assert "3,000 rows" in run("verify", built)
    assert run_json("verify", built) == {
        "index": str(built), "ok": True, "error": None, "rows": ROWS
    }  # fmt: skip
    (file,) = built.glob("rows-*")
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    error = run("verify", built, code=1)
    assert error.startswith(f"mrl-fast: {file}: sha256: expected ")
    done = CliRunner().invoke(app, ["index", "verify", str(built), "--json"])
    document = json.loads(done.stdout)
    assert done.exit_code == 1 and document["ok"] is False and document["error"] in error

    file.write_bytes(content[:-1])
    for command in (["search", built, built], ["info", built]):
        assert run(*command, code=2).startswith("mrl-fast: ")
    assert "size: expected" in run("verify", built, code=1)
    file.unlink()
    assert str(file) in run("verify", built, code=1)


# --- what is wrong


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """An index, and files that are each wrong in their way."""
    folder = tmp_path_factory.mktemp("scene")
    (folder / "folder").mkdir()
    (folder / "folder" / "precious").write_text("a file")
    (folder / "text.npy").write_text("not an array")
    np.save(folder / "narrow.npy", BASE[:, :31])
    np.save(folder / "nan.npy", np.where(np.arange(3)[:, None] == 1, np.nan, BASE[:3]))
    build(folder / "index", saved(folder / "base.npy", BASE))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "{none}", "--out", "{new}"], "none.npy: expected a file, got nothing"),
        (["build", "{text}", "--out", "{new}"], "text.npy: expected a .npy file"),
        (["build", "{base}", "--out", "{base}"], "--out: expected a folder, got"),
        (["build", "{base}", "--out", "{folder}"], "--out: expected an index or an empty"),
        (["build", "{base}", "--out", "{new}", "--dims", "8,16"], "the vectors' width 32"),
        (["build", "{base}", "--out", "{new}", "--dims", "8,8,32"], "no width twice"),
        (["build", "{base}", "--out", "{new}", "--dims", "8;32"], "--dims: expected numbers"),
        (
            ["build", "{base}", "--out", "{new}", "--column", "v"],
            "npy: --column: expected none for .npy",
        ),
        (["build", "{base}", "--out", "{new}", "--id-column", "v"], "--id-column: expected none"),
        (["build", "{base}", "--out", "{new}", "--ids", "{text}"], "text.npy: expected a .npy"),
        (["add", "{none}", "{base}"], "INDEX: expected a folder that holds an index"),
        (["add", "{index}", "{base}", "--skip", "3000"], "--skip: expected less than 3,000"),
        (["search", "{folder}", "{base}"], "expected a folder that holds an index"),
        (["search", "{index}", "{narrow}"], "narrow.npy: expected .*, got 31"),
        (["search", "{index}", "{nan}"], "nan.npy: expected finite values as float32, got .* 1"),
        (["search", "{index}", "{base}", "--stages", "8"], "--stages: expected dim:keep"),
        (
            ["search", "{index}", "{base}", "--stages", "9:50,32:10"],
            "--stages: stage 1, dim: exp",
        ),
        (["search", "{index}", "{base}", "--stages", "8:5", "--exact"], "--exact: expected no"),
        (["search", "{index}", "{base}", "--stages", "8:50,32:5"], "at least -k 10, got 5"),
        (["search", "{index}", "{base}", "--out", "r.csv"], "ending in .npz or .jsonl, got r.csv"),
        (["search", "{index}", "{base}", "--out", "{none}/r.npz"], "--out: expected a folder that"),
        (["search", "{index}", "{base}", "--truth", "{text}"], "text.npy: expected a .npy file"),
        (["search", "{index}", "{base}", "--allowed", "{base}"], "base.npy: expected integers"),
        (["search", "{index}", "{base}", "--device", "tpu"], "device: expected 'cpu', 'cuda'"),
        (["tune", "{index}", "{base}", "--device", "cuda:x"], "device: expected 'cpu', 'cuda'"),
        (["tune", "{index}", "{narrow}"], "narrow.npy: expected vectors of the index's width"),
        (["tune", "{index}", "{base}", "--limit", "255"], "at least 256 sample queries, got 255"),
        (["tune", "{index}", "{base}", "--recall", "1.5"], "--recall: expected a number in"),
        (
            ["tune", "{index}", "{base}", "--seconds", "0"],
            "--seconds: expected a number above 0, got 0",
        ),
        (
            ["tune", "{index}", "{base}", "--plot", "t.xyz"],
            "--plot: expected a file ending in .png",
        ),
        (["tune", "{index}", "{base}", "--plot", "{none}/t.png"], "--plot: expected a folder that"),
        (["info", "{none}"], "expected a folder that holds an index"),
        (["verify", "{none}"], "INDEX: expected a folder that holds an index"),
        (["verify", "{folder}"], "expected a folder that holds an index"),
    ],
)
def test_bad_input(scene, arguments, message):
    names = ("base", "none", "text", "narrow", "nan")
    paths = {name: scene / name for name in ("index", "new", "folder")}
    paths |= {name: scene / f"{name}.npy" for name in names}
    before = (scene / "index" / "manifest.json").read_bytes()
    for options in ([], ["--json"]):
        done = CliRunner().invoke(
            app, ["index", *(argument.format(**paths) for argument in arguments), *options]
        )
        assert done.exit_code == 2 and done.stdout == "", done.output
        assert re.fullmatch(f"mrl-fast: .*{message}.*\n", done.stderr), done.stderr
    assert not (scene / "new").exists()
    assert os.listdir(scene / "folder") == ["precious"]
    assert (scene / "index" / "manifest.json").read_bytes() == before


def test_usage_and_help():
    for command in COMMANDS:
        text = CliRunner().invoke(app, ["index", command, "--help"]).stdout
        assert re.search(rf"Examples?:\n    mrl-fast index {command} ", text), text
        assert "--json" in text
        assert CliRunner().invoke(app, ["index", command]).exit_code == 2
    assert "Exit codes:" in CliRunner().invoke(app, ["index", "--help"]).stdout
    assert CliRunner().invoke(app, ["index", "search", "i", "q", "-k", "0"]).exit_code == 2


@pytest.mark.parametrize("package", ["typer", "rich", "pyarrow", "safetensors"])
def test_without_the_extra(tmp_path, package):
    suffix = {"safetensors": "safetensors"}.get(package, "parquet")
    (tmp_path / f"x.{suffix}").write_bytes(b"anything")
    code = (
        f"import sys; sys.modules[{package!r}] = None; from mrl_fast.cli import main; main()"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "index", "build", f"x.{suffix}", "--out", "i"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"mrl-fast: needs {package}: pip install 'mrl-fast[cli]'\n"
