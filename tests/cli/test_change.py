"""``mrl-fast index remove``, ``update`` and ``compact`` as a user meets them, and which rows the
masks and ids of a file select."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrl_fast import MatryoshkaIndex
from tests.helpers.cli_index import (
    BASE,
    DIMS,
    QUERIES,
    ROWS,
    WIDTH,
    in_memory,
    run,
    run_json,
    same_as,
    saved,
)


def test_remove(tmp_path, built):
    assert "2 removed, 2,998 rows left" in run("remove", built, 17, 42)
    gone = np.array([5, 2999, 5])
    (tmp_path / "gone.txt").write_text("5\n2999\n5\n")
    summary = run_json("remove", built, "--ids", tmp_path / "gone.txt")
    assert summary["removed"] == 2 and summary["rows"] == ROWS - 4
    expected = in_memory()
    expected.remove([17, 42, *gone])
    same_as(built, expected)
    run("remove", built, "--ids", saved(tmp_path / "most.npy", expected.ids[:-3]))
    expected.remove(expected.ids[:-3])
    same_as(built, expected)
    pq.write_table(pa.table({"doc": expected.ids[-3:].numpy()}), tmp_path / "x.parquet")
    run("remove", built, "--ids", tmp_path / "x.parquet", "--id-column", "doc")
    assert run_json("info", built)["rows"] == 0


def test_update(tmp_path, built, monkeypatch):
    monkeypatch.setattr("mrl_fast.cli.inputs.CHUNK_BYTES", 64 * 4 * WIDTH)  # 64 rows at a time
    ids = np.random.default_rng(3).permutation(ROWS)[:300]
    options = ["--ids", saved(tmp_path / "ids.npy", ids)]
    assert "300 of 3,000 vectors replaced" in run(
        "update", built, saved(tmp_path / "new.npy", QUERIES), *options
    )
    expected = in_memory()
    expected.update(ids, QUERIES)
    same_as(built, expected)
    assert run_json("info", built)["removed"] == 300


def test_update_by_the_column_that_build_was_told(tmp_path):
    def table(name, rows, ids):
        lists = pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(rows).ravel(), WIDTH)
        pq.write_table(pa.table({"key": ids, "vector": lists}), tmp_path / name)
        return tmp_path / name

    source = table("a.parquet", BASE[:500], np.arange(500) + 40)
    run("build", source, "--id-column", "key", "--out", tmp_path / "i", "--dims", DIMS)
    run("update", tmp_path / "i", table("b.parquet", QUERIES[:9], np.arange(9) * 3 + 40))
    expected = in_memory(500, np.arange(500) + 40)
    expected.update(np.arange(9) * 3 + 40, QUERIES[:9])
    same_as(tmp_path / "i", expected)
    pq.write_table(pa.table({"key": [40, 41]}), tmp_path / "gone.parquet")
    run("remove", tmp_path / "i", "--ids", tmp_path / "gone.parquet")
    expected.remove([40, 41])
    same_as(tmp_path / "i", expected)


def test_compact(built):
    run("remove", built, *range(100, 900))
    before = sum(file.stat().st_size for file in built.iterdir())
    text = run("compact", built)
    assert "800 removed or replaced rows freed" in text
    expected = in_memory()
    expected.remove(np.arange(100, 900))
    same_as(built, expected)
    after = sum(file.stat().st_size for file in built.iterdir())
    assert before - after > 700 * 4 * WIDTH
    summary = run_json("compact", built)
    assert summary["freed_rows"] == 0 and summary["bytes"] == summary["bytes_before"] == after


@pytest.mark.parametrize("order", ["remove", "compact"])
def test_a_build_again_after_rows_were_removed(built, base, order):
    """It says so, or, where no trace is left, brings the last rows back under their ids."""
    run("remove", built, ROWS - 2, ROWS - 1)
    command = ["build", base, "--out", built, "--dims", DIMS]
    if order == "remove":
        assert "as it was built, got 2 rows removed since" in run(*command, code=2)
        return
    run("compact", built)
    assert run_json(*command)["added"] == 2
    same_as(built, in_memory())


@pytest.mark.parametrize("wrong", ["unknown", "twice", "nan", "width", "none", "few"])
def test_update_is_all_or_nothing(tmp_path, built, wrong, monkeypatch):
    monkeypatch.setattr("mrl_fast.cli.inputs.CHUNK_BYTES", 64 * 4 * WIDTH)
    rows, ids = QUERIES.copy(), np.arange(300)
    if wrong == "unknown":
        ids[-1] = ROWS
    if wrong == "twice":
        ids[-1] = 0  # of another chunk
    if wrong == "nan":
        rows[-1, 0] = np.nan
    if wrong == "width":
        rows = rows[:, :31]
    if wrong == "few":
        ids = ids[:-1]
    options = [] if wrong == "none" else ["--ids", saved(tmp_path / "ids.npy", ids)]
    message = {
        "unknown": "ids: expected ids of the index, got 3000",
        "twice": "ids.npy: expected none twice, got 0 again\n",
        "nan": "new.npy: expected finite values as float32, got NaN or infinity in row 299",
        "width": "new.npy: expected vectors of the index's width 32, got 31",
        "none": "--ids: expected the ids whose vectors are replaced",
        "few": "ids.npy: expected an id for each of the 300 rows",
    }[wrong]
    command = ["update", built, saved(tmp_path / "new.npy", rows), *options]
    assert message in run(*command, code=2)
    same_as(built, in_memory())


@pytest.mark.parametrize("kind", [bool, np.uint8])
def test_a_mask_is_not_removed_by(tmp_path, built, kind):
    """Rows move as vectors are updated: a mask made before would mean others."""
    mask = saved(tmp_path / "mask.npy", (np.arange(ROWS) == 1).astype(kind))
    error = run("remove", built, "--ids", mask, code=2)
    assert "mask.npy: expected ids, got what may be a mask" in error and '"info --ids"' in error
    same_as(built, in_memory())


@pytest.mark.parametrize("suffix", [".npy", ".txt"])
def test_ids_in_the_order_of_masks(tmp_path, built, suffix):
    file = tmp_path / f"ids{suffix}"
    new = saved(tmp_path / "new.npy", QUERIES[:2])
    run("update", built, new, "--ids", saved(tmp_path / "i.npy", np.array([5, 2])))
    run("info", built, "--ids", file)
    ids = np.load(file) if suffix == ".npy" else np.loadtxt(file, dtype=np.int64)
    assert ids.tolist() == MatryoshkaIndex.load(built).ids.tolist() != list(range(ROWS))
    mask = saved(tmp_path / "mask.npy", np.isin(ids, [5, 7]))
    queries = saved(tmp_path / "q.npy", QUERIES[:3])
    for found in run_json("search", built, queries, "--allowed", mask)["results"]:
        assert sorted(found["ids"]) == [5, 7]
    assert "--ids: expected a file ending in" in run("info", built, "--ids", "x.csv", code=2)


def test_bad_ids_to_remove(tmp_path, built):
    (tmp_path / "some.txt").write_text("1\n7777\n8888\n")
    for arguments, message in [
        ([1, 7777], "ID: expected ids of the index, got 7777\n"),
        ([1, 1 << 63], f"ID: expected an int64, got '{1 << 63}'\n"),
        (["--ids", tmp_path / "some.txt"], "some.txt: expected .*, got 7777 and 1 more that are"),
        (["doc-1"], "ID: expected an int64, got 'doc-1'; ids are int64: keep a table of your own"),
        ([], "ID: expected ids, or a file of them by --ids, got none"),
        (
            [3, "--ids", tmp_path / "some.txt"],
            "ID: expected ids, or a file .*, got 1 of",
        ),
        (["--ids", tmp_path / "x.txt"], "x.txt: expected a file, got nothing"),
    ]:
        error = run("remove", built, *arguments, code=2)
        assert error.startswith("mrl-fast: ") and error.count("\n") == 1
        assert re.search(message, error), error
    same_as(built, in_memory())


def test_an_unfinished_build_is_not_changed(tmp_path, base, built):
    (built / "unfinished.json").write_text('{"source": "x.npy", "rows": 9999}')
    new = ["--ids", saved(tmp_path / "ids.npy", np.arange(3)), "--limit", 3]
    for command in (["remove", built, 1], ["update", built, base, *new], ["compact", built]):
        if command[0] == "update":
            np.save(tmp_path / "base.npy", BASE[:3])
        assert "got an unfinished build: run it again" in run(*command, code=2)
    same_as(built, in_memory())


# --- masks and ids of search --allowed


def test_masks_and_ids_that_search_is_allowed(tmp_path, built):
    run("remove", built, 0, 7)  # rows are no longer ids
    index = MatryoshkaIndex.load(built)
    queries = saved(tmp_path / "q.npy", QUERIES[:20])
    mask = np.arange(len(index)) % 3 == 0
    expected = index.search(QUERIES[:20], 4, allowed=mask).ids.tolist()
    ids = index.ids.numpy()[mask]
    (tmp_path / "a.txt").write_text("\n".join(map(str, ids)) + "\n")
    for file in (
        saved(tmp_path / "bool.npy", mask),
        saved(tmp_path / "bytes.npy", mask.astype(np.uint8)),
        saved(tmp_path / "ids.npy", ids.astype(np.uint16)),
        tmp_path / "a.txt",
    ):
        found = run_json("search", built, queries, "-k", 4, "--allowed", file)["results"]
        assert [each["ids"] for each in found] == expected, file


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.ones(ROWS - 1, bool),
            r"expected a mask of the index's 3,000 rows.* shape \[2999\]; ids",
        ),
        (
            np.ones(ROWS + 1, np.uint8),
            r"expected a mask .* of uint8, got shape \[3001\]; ids are of",
        ),
        (np.full(ROWS, 2, np.uint8), "expected a mask of 0 and 1, as it is of uint8, got 2; ids"),
        (np.ones((ROWS, 1), bool), r"expected a mask .* shape \[3000, 1\]"),
        (np.ones(ROWS), "expected integers"),
    ],
)
def test_bad_masks(tmp_path, built, base, array, message):
    file = saved(tmp_path / "mask.npy", array)
    error = run("search", built, base, "--allowed", file, code=2)
    assert re.search(f"mask.npy: {message}", error)
    run("remove", built, "--ids", file, code=2)
    same_as(built, in_memory())
