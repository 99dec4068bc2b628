"""``mrl-fast index build`` and ``add`` as a user meets them; a build that was killed goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mrl_fast import MatryoshkaIndex
from mrl_fast.cli.app import app
from mrl_fast.shared import native
from tests.helpers.cli_index import (
    BASE,
    DIMS,
    QUERIES,
    ROWS,
    WIDTH,
    in_memory,
    run,
    run_json,
    said,
    same_as,
    saved,
)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"metric": "ip", "dtype": "float16", "prefix_dtype": "int8"},
        {"codes": "bits"},
        {"metric": "l2", "dtype": "bfloat16"},
        {"dtype": "int8"},
        {"rotation": "pca"},
    ],
)
def test_build_is_the_index_of_python(tmp_path, base, settings):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = ["build", base, "--out", tmp_path / "i", "--dims", DIMS, *options]
    assert "3,000 rows × 32, 3,000 of them new" in run(*command, "--checkpoint", 700)
    loaded = same_as(tmp_path / "i", in_memory(**settings))
    assert sorted(os.listdir(tmp_path / "i"))[-1].startswith("rows-"), "no marker is left"
    described = run_json("info", tmp_path / "i")
    assert described["dims"] == list(loaded.dims) and described["rows"] == ROWS
    for name in ("metric", "dtype", "prefix_dtype"):
        assert described[name] == getattr(loaded, name) == settings.get(name, described[name])
    assert described["rotation"] == settings.get("rotation")

    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "i").iterdir()}
    assert "nothing to do, all 3,000 rows" in run(*command)
    assert run_json(*command)["added"] == 0
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "i").iterdir()}


def test_dims_in_any_order(tmp_path, base):
    for dims in ("32,8", "8,32"):
        command = ["build", base, "--out", tmp_path / "i", "--dims", dims]
        assert run_json(*command)["dims"] == [8, 32]


def test_a_build_that_goes_on_says_after_what(tmp_path, base):
    command = ["build", base, "--out", tmp_path / "i", "--dims", DIMS]
    assert "going on" not in said(*command, "--limit", 1200)
    assert "mrl-fast: going on after 1,200 rows\n" in said(*command)
    assert "going on" not in said(*command)


def test_default_dims(tmp_path):
    for width, dims in [(256, [64, 128, 256]), (300, [75, 150, 300]), (100, [100])]:
        np.save(tmp_path / "x.npy", np.ones((5, width), np.float32))
        assert run_json("build", tmp_path / "x.npy", "--out", tmp_path / f"{width}")["dims"] == dims


def test_ids_of_a_file_and_of_a_column(tmp_path, base, queries):
    ids = np.random.default_rng(2).permutation(10 * ROWS)[:ROWS]
    np.save(tmp_path / "ids.npy", ids)
    lists = pa.FixedSizeListArray.from_arrays(BASE.ravel(), WIDTH)
    table = pa.table({"id": ids, "vector": lists})
    pq.write_table(table, tmp_path / "base.parquet", row_group_size=1100)
    expected = in_memory(ids=ids)
    for name, source, options in [
        ("file", base, ["--ids", tmp_path / "ids.npy"]),
        ("column", tmp_path / "base.parquet", ["--id-column", "id"]),
        ("other", base, ["--ids", tmp_path / "base.parquet", "--id-column", "id"]),
    ]:
        command = ["build", source, "--out", tmp_path / name, "--dims", DIMS, *options]
        run(*command, "--limit", 1500, "--checkpoint", 400)
        run(*command)
        same_as(tmp_path / name, expected)
    error = run("build", base, "--out", tmp_path / "file", "--dims", DIMS, code=2)
    assert "got another vector or id than in row 0" in error


def test_killed_build_goes_on(tmp_path, base, queries):
    out = tmp_path / "index"
    command = ["build", base, "--out", out, "--dims", DIMS, "--checkpoint", 8, "--rotation", "pca"]
    code, _, _ = stopped_after(64, command, out, signal.SIGKILL)
    assert code == -signal.SIGKILL

    described = run_json("info", out)
    assert 64 <= described["rows"] < ROWS
    assert described["unfinished"] == {"source": str(base), "rows": ROWS}
    assert "of 3,000 of" in run("info", out)
    run("verify", out)
    assert "got an unfinished build" in run("add", out, queries, code=2)
    done = CliRunner().invoke(app, ["index", "search", str(out), str(queries), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["queries"] == len(QUERIES)
    assert "warning" in done.stderr and "its build was interrupted" in done.stderr

    summary = run_json(*command[:-4], "--rotation", "pca")
    assert summary["rows"] == ROWS and summary["added"] == ROWS - described["rows"]
    assert run_json("info", out)["unfinished"] is None
    same_as(out, in_memory(rotation="pca"))


def test_interrupted_build_says_how_far_it_came(tmp_path, base):
    out = tmp_path / "index"
    command = ["build", base, "--out", out, "--dims", DIMS, "--checkpoint", 8]
    code, stdout, stderr = stopped_after(16, command, out, signal.SIGINT)
    assert code == 130 and stdout == "" and "Traceback" not in stderr, stderr
    rows = run_json("info", out)["rows"]
    assert f"interrupted: {rows:,} of 3,000 rows are in {out}; the same command goes on" in stderr
    run(*command[:-2])
    same_as(out, in_memory())


def started(*arguments):
    """A process of its own, on the same instruction set: rotated vectors have its bits."""
    code = "from mrl_fast.cli import main; from mrl_fast.shared import native; "
    code += f"native.ISA = {native.ISA!r}; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "index", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell's background jobs ignore interrupts, and so would theirs
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize(("checkpoint", "code"), [("4096", 0), ("100000", "no memory")])
def test_memory_is_bounded_by_the_checkpoint(tmp_path, checkpoint, code):
    """160 MiB of vectors in 96 MiB beside what is there at the start; not without checkpoints."""
    shape = (40 << 10, 1024)
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape)  # a sparse file
    limited = """
import re, resource, sys, torch
from mrl_fast.cli.app import app
from mrl_fast.cli import inputs
from mrl_fast.search.index import store
torch.set_num_threads(1)  # a thread's stack counts too
inputs.CHUNK_BYTES, store.BLOCK_ROWS = 1 << 22, (1 << 12, 1 << 10)
used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (96 << 20),) * 2)
try:
    app(["index", "build", "x.npy", "--out", "i", "--checkpoint", sys.argv[1], "-q"])
except RuntimeError as error:
    sys.exit("no memory" if "memory" in str(error) else str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", limited, checkpoint], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stderr.strip() or done.returncode) == code, done.stderr


def stopped_after(rows, command, out, how):
    """Exit code and output of a build that was sent a signal once it had saved so many rows."""
    process = started(*command)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if len(MatryoshkaIndex.load(out)) >= rows:
                break
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "l2"], "--metric: expected cosine as in"),
        (["--dtype", "float16"], "--dtype: expected float32 as in"),
        (["--prefix-dtype", "int8"], "--prefix-dtype: expected float32 as in"),
        (["--rotation", "pca"], "--rotation: expected none as in"),
        (["--dims", "16,32"], "--dims: expected 8,32 as in"),
        (["--limit", "2999"], "--out: expected at most the 2,999 rows"),
    ],
)
def test_other_settings_than_the_index_has(base, built, options, message):
    error = run("build", base, "--out", built, "--dims", DIMS, *options, code=2)
    assert re.match(f"mrl-fast: {message}.*--overwrite builds anew", error), error
    same_as(built, in_memory())
    run("build", base, "--out", built, "--dims", DIMS, *options, "--overwrite")
    assert run_json("info", built)["rows"] == (2999 if "--limit" in options else ROWS)


@pytest.mark.parametrize("row", [0, 1999])
def test_rows_that_are_not_the_sources(tmp_path, base, row):
    out = tmp_path / "index"
    command = ["build", base, "--out", out, "--dims", DIMS, "--dtype", "bfloat16"]
    run(*command, "--limit", 2000)
    changed = BASE.copy()
    changed[row] *= 1.02  # rounding moves a bfloat16 by less
    np.save(base, changed)
    assert f"got another vector or id than in row {row:,};" in run(*command, code=2)
    assert len(MatryoshkaIndex.load(out)) == 2000
    run(*command, "--overwrite")
    assert len(MatryoshkaIndex.load(out)) == ROWS


def test_nan_stops_a_build_until_it_is_mended(tmp_path, base):
    for bad, options, dtype in [(np.nan, [], "float32"), (1e6, ["--dtype=float16"], "float16")]:
        out = tmp_path / dtype
        broken = BASE.copy()
        broken[2345, 7] = bad
        np.save(base, broken)
        command = ["build", base, "--out", out, "--dims", DIMS, "--checkpoint", 500, *options]
        expected = f"base.npy: expected finite values as {dtype}, got NaN or infinity in row 2,345"
        assert expected in run(*command, code=2)
        assert run_json("info", out)["rows"] == 2000
        np.save(base, BASE)
        run(*command)
        same_as(out, in_memory(dtype=dtype))


# --- add


def test_add(tmp_path, built):
    np.save(tmp_path / "more.npy", QUERIES)
    np.save(tmp_path / "ids.npy", np.arange(300)[::-1] + 9000)
    assert "3,100 rows × 32, 100 of them new" in run(
        "add", built, tmp_path / "more.npy", "--limit", 100
    )
    summary = run_json(
        "add", built, tmp_path / "more.npy", "--skip", 250, "--ids", tmp_path / "ids.npy"
    )
    assert summary["added"] == 50 and summary["rows"] == 3150
    index = in_memory()
    index.add(QUERIES[:100])
    index.add(QUERIES[250:], np.arange(50)[::-1] + 9000)
    same_as(built, index)


@pytest.mark.parametrize("wrong", ["nan", "taken", "width", "ids"])
def test_add_is_all_or_nothing(tmp_path, built, wrong, monkeypatch):
    monkeypatch.setattr("mrl_fast.cli.inputs.CHUNK_BYTES", 64 * 4 * WIDTH)  # 64 rows at a time
    more, ids = QUERIES.copy(), np.arange(300) + ROWS
    if wrong == "nan":
        more[-1, -1] = np.nan
    if wrong == "taken":
        ids[-1] = 17
    if wrong == "width":
        more = more[:, :31]
    np.save(tmp_path / "more.npy", more)
    np.save(tmp_path / "ids.npy", ids[: 299 if wrong == "ids" else 300])
    message = {
        "nan": "more.npy: expected finite values as float32, got NaN or infinity in row 299",
        "taken": "ids.npy: expected ids that are not in use, got 17\n",
        "width": "more.npy: expected vectors of the index's width 32, got 31",
        "ids": "ids.npy: expected an id for each of the 300 rows",
    }[wrong]
    command = ["add", built, tmp_path / "more.npy", "--ids", tmp_path / "ids.npy"]
    assert message in run(*command, code=2)
    same_as(built, in_memory())


def test_add_says_which_ids_came_out(tmp_path, built):
    more = saved(tmp_path / "more.npy", QUERIES)
    assert "300 of them new with ids 3000 to 3299, " in run("add", built, more)
    assert run_json("add", built, more, "--limit", 2)["ids"] == [3300, 3301]
    ids = saved(tmp_path / "ids.npy", np.arange(300) + 9000)
    assert run_json("add", built, more, "--ids", ids)["ids"] is None


def test_ids_that_are_in_use_or_come_twice_are_counted(tmp_path, built, base, monkeypatch):
    monkeypatch.setattr("mrl_fast.cli.inputs.CHUNK_BYTES", 64 * 4 * WIDTH)  # 64 rows at a time
    more, file = saved(tmp_path / "more.npy", QUERIES), tmp_path / "ids.npy"
    ids, in_use = np.arange(300) + 9000, "expected ids that are not in use"
    for changed, message in (
        (
            {10: 17, 200: 18, 299: 19},
            f"{in_use}, got 17 and 2 more that are",
        ),
        ({299: 9000}, "expected none twice, got 9000 again"),
        ({250: 9000, 299: 9001}, "expected none twice, got 9000 and 1 more again"),
    ):
        given = ids.copy()
        given[list(changed)] = list(changed.values())
        error = run("add", built, more, "--ids", saved(file, given), code=2)
        assert error == f"mrl-fast: {file}: {message}\n"
    lists = pa.FixedSizeListArray.from_arrays(QUERIES.ravel(), WIDTH)
    pq.write_table(pa.table({"id": given, "vector": lists}), tmp_path / "more.parquet")
    for command in (["add", built], ["build", "--out", tmp_path / "new", "--dims", DIMS]):
        error = run(*command, tmp_path / "more.parquet", "--id-column", "id", code=2)
        assert "more.parquet: expected none twice, got 9000 and 1 more again" in error
    same_as(built, in_memory())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [".DS_Store", ".gitkeep", "Thumbs.db"])
def test_what_desktops_and_git_leave_in_a_folder(tmp_path, base, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"theirs")
    run("build", base, "--out", tmp_path / "out", "--dims", DIMS)
    same_as(tmp_path / "out", in_memory())
    assert (tmp_path / "out" / name).read_bytes() == b"theirs"


def spoiled(path):
    """The base with a NaN in its last row."""
    array = BASE.copy()
    array[-1, 0] = np.nan
    return saved(path, array)


@pytest.mark.parametrize("checkpoint", [[], ["--checkpoint", "100"]])
def test_a_first_build_that_fails_leaves_what_there_is_to_go_on_with(tmp_path, checkpoint):
    bad, out = spoiled(tmp_path / "bad.npy"), tmp_path / "out"
    error = run("build", bad, "--out", out, "--dims", DIMS, *checkpoint, code=2)
    assert f"row {ROWS - 1:,}" in error
    if checkpoint:
        assert len(MatryoshkaIndex.load(out)) >= ROWS - 200
    else:
        assert not out.exists()


def test_what_is_overwritten_is_there_until_a_checkpoint(tmp_path, built):
    before = MatryoshkaIndex.load(built).ids
    bad = spoiled(tmp_path / "bad.npy")
    run("build", bad, "--out", built, "--dims", DIMS, "--overwrite", code=2)
    assert run_json("info", built)["unfinished"] is None
    assert MatryoshkaIndex.load(built, verify=True).ids.equal(before)
