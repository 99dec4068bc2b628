"""``mrl-fast index`` over several files: parts are one source, in an order that does not surprise;
ids that a file has are used or named; what a build was told holds for what is added."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrl_fast import MatryoshkaIndex
from mrl_fast.cli.sources import files_of
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
    same_as,
    saved,
)

BOUNDS = 0, 900, 907, 2000, ROWS  # of the parts 1, 2, 10 and 11, none of which is a whole chunk


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, begin, end in zip((1, 2, 10, 11), BOUNDS, BOUNDS[1:], strict=False):
        np.save(folder / f"part-{name}.npy", BASE[begin:end])
    return folder


@pytest.mark.parametrize("options", [[], ["--codes", "bits"]])
def test_parts_are_the_index_of_one_file(tmp_path, parts, options):
    """As a folder, as patterns and one by one, with the hidden files that Spark leaves."""
    for name in ("_SUCCESS", ".part-1.npy.crc", "Thumbs.db"):
        (parts / name).write_text("not vectors")
    expected = in_memory(codes="bits" if options else None)
    files = [parts / f"part-{i}.npy" for i in (1, 2, 10, 11)]
    for name, given in {
        "folder": [parts],
        "pattern": [f"{parts}/part-*.npy"],
        "patterns": [parts / "part-?.npy", f"{tmp_path}/**/part-??.npy"],
        "files": files,
    }.items():
        run(
            "build",
            *given,
            "--out",
            tmp_path / name,
            "--dims",
            DIMS,
            "--checkpoint",
            1400,
            *options,
        )
        same_as(tmp_path / name, expected)


def test_order_of_names(tmp_path):
    names = ["10.npy", "a-2b-1.npy", "a-2b-10.npy", "a-02b-9.npy", "a-10.npy", "a.npy", "9.npy"]
    for name in names:
        (tmp_path / name).touch()
    found = [path.name for path in files_of([tmp_path])[0]]
    assert found == [
        "9.npy", "10.npy", "a-2b-1.npy", "a-02b-9.npy", "a-2b-10.npy", "a-10.npy", "a.npy"
    ]  # fmt: skip
    assert files_of([tmp_path / "*.npy"]) == files_of([tmp_path])
    given = [tmp_path / name for name in names]
    assert files_of(given) == (given, [])
    (tmp_path / "[1].npy").touch()
    assert files_of([tmp_path / "[1].npy"])[0] == [tmp_path / "[1].npy"], "a name before a pattern"


def test_what_a_shell_sorts_is_pointed_out(tmp_path, parts):
    files = [parts / f"part-{i}.npy" for i in (1, 10, 11, 2)]
    command = ["build", *files, "--out", tmp_path / "i", "--dims", DIMS]
    assert "part-11.npy is read before part-2.npy, as given" in said(*command)
    assert said(*command, "--quiet") == ""


def test_a_build_of_parts_that_was_stopped_goes_on(tmp_path, parts, monkeypatch):
    out, save = tmp_path / "index", MatryoshkaIndex.save
    command = ["build", parts, "--out", out, "--dims", DIMS, "--checkpoint", 200]

    def of_a_full_disk(index, path):
        if len(index) > 1500:
            raise OSError("no space left")
        save(index, path)

    monkeypatch.setattr(MatryoshkaIndex, "save", of_a_full_disk)
    assert "no space left" in run(*command, code=2)
    monkeypatch.undo()
    described = run_json("info", out)
    assert 907 < described["rows"] <= 1500
    assert described["unfinished"] == {"source": str(parts), "rows": ROWS}
    np.save(parts / "part-3.npy", BASE[:5])  # which moves all rows behind it
    assert "got another vector or id" in run(*command, code=2)
    (parts / "part-3.npy").unlink()
    assert run_json(*command)["added"] == ROWS - described["rows"]
    same_as(out, in_memory())


def test_a_part_more_is_added(tmp_path, parts):
    last = parts / "part-11.npy"
    last.rename(tmp_path / "part-11.npy")
    command = ["build", parts, "--out", tmp_path / "i", "--dims", DIMS]
    assert run_json(*command)["rows"] == 2000
    (tmp_path / "part-11.npy").rename(last)
    assert run_json(*command)["added"] == 1000
    same_as(tmp_path / "i", in_memory())


def test_add_parts(tmp_path, parts):
    index = build(tmp_path / "i", saved(tmp_path / "q.npy", QUERIES))
    summary = run_json("add", index, parts, "--skip", 905, "--limit", 1100)
    assert summary["added"] == 1100
    expected = MatryoshkaIndex((8, 32))
    expected.add(np.concatenate([QUERIES, BASE[905:2005]]))
    same_as(index, expected)


@pytest.mark.parametrize("what", ["folder", "pattern"])
def test_what_holds_no_vectors_is_passed_over(tmp_path, parts, what):
    for name in ("README.md", "ids.txt"):
        (parts / name).write_text("1")
    given = parts if what == "folder" else f"{parts}/*"
    noted = said("build", given, "--out", tmp_path / "i", "--dims", DIMS)
    names = f"{parts / 'README.md'}, {parts / 'ids.txt'}"
    assert noted.count(f"passed over, as they hold no vectors: {names}\n") == 1
    same_as(tmp_path / "i", in_memory())
    assert "passed over" in said("search", tmp_path / "i", given, "--limit", 2)
    files = [parts / "README.md", parts / "part-1.npy"]
    error = run("build", *files, "--out", tmp_path / "j", code=2)
    assert "README.md: expected a file of vectors as" in error and f"'{parts}/*.npy'" in error


@pytest.mark.parametrize("row", [0, 1001, 1092])
def test_errors_name_the_part_and_its_row(tmp_path, parts, row):
    broken = BASE[907:2000].copy()
    broken[row, 3] = np.inf
    np.save(parts / "part-10.npy", broken)
    for options in ([], ["--codes", "bits"]):
        error = run("build", parts, "--out", tmp_path / "i", "--dims", DIMS, *options, code=2)
        assert "part-10.npy: expected finite values" in error and f"in row {row:,}\n" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda p: np.save(p / "part-3.npy", BASE[:5, :31]), "part-3.npy: expected vectors of wid"),
        (lambda p: np.save(p / "part-3.npy", BASE[0]), "part-3.npy: expected [n, D]"),
        (lambda p: (p / "z.parquet").touch(), "z.parquet: expected a .npy file as"),
        (lambda p: (p / "part-3.npy").mkdir(), "expected a folder of files, got the folder"),
        (lambda p: [f.unlink() for f in p.iterdir()], "expected a folder of files, got none"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, parts, more, message):
    """Nothing is written, and the part is named."""
    more(parts)
    error = run("build", parts, "--out", tmp_path / "i", "--dims", DIMS, code=2)
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "i").exists()


def test_bad_lists_of_files(tmp_path, parts):
    out = ["--out", tmp_path / "i"]
    assert "got none that match" in run("build", parts / "x*.npy", *out, code=2)
    error = run("build", parts, parts / "part-2.npy", *out, code=2)
    assert "part-2.npy: expected each file once, got it again" in error
    assert "expected a file, got nothing" in run("build", parts, parts / "none.npy", *out, code=2)
    np.save(tmp_path / "ids.npy", np.arange(ROWS - 1))
    error = run("build", parts, *out, "--ids", tmp_path / "ids.npy", code=2)
    assert f"an id for each of the 3,000 rows of {parts}, got 2,999" in error


# --- ids of a file, and what a build was told


def parquet(path, rows, ids, **columns):
    lists = pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(rows).ravel(), WIDTH)
    pq.write_table(pa.table({"id": ids, "vector": lists, **columns}), path)
    return path


@pytest.fixture
def tables(tmp_path):
    """Two, of two columns of vectors each."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for i, (begin, end) in enumerate([(0, 100), (100, 250)]):
        zeros = pa.FixedSizeListArray.from_arrays(np.ones((end - begin) * 4, np.float32), 4)
        ids = np.arange(begin, end) * 7
        parquet(folder / f"{i}.parquet", BASE[begin:end], ids, other=zeros)
    return folder


def test_an_id_column_is_used_or_named_once(tmp_path, tables):
    command = ["build", tables, "--column", "vector", "--dims", DIMS, "--out"]
    noted = said(*command, tmp_path / "a")
    assert noted.count("has a column of integers 'id', which is not used; --id-column id") == 1
    assert "--id-column" not in said(*command, tmp_path / "a", "--quiet")
    assert MatryoshkaIndex.load(tmp_path / "a").ids.tolist() == list(range(250))
    assert "'id'" not in said(*command, tmp_path / "b", "--id-column", "id")
    same_as(tmp_path / "b", in_memory(250, np.arange(250) * 7))
    ids = saved(tmp_path / "ids.npy", np.arange(250))
    assert "'id'" not in said(*command, tmp_path / "c", "--ids", ids)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_a_column_of_string_ids_is_named(tmp_path, kind):
    ids = pa.array(["a", "b", "c"]).cast(kind)
    source = parquet(tmp_path / "s.parquet", BASE[:3], ids)
    noted = said("build", source, "--out", tmp_path / "i", "--dims", DIMS)
    assert "s.parquet has a column of strings 'id', which is not used; ids are int64: keep" in noted
    assert "'id'" not in said("search", tmp_path / "i", source)


def test_add_reads_what_build_was_told(tmp_path, tables):
    out, told = tmp_path / "i", ["--column", "vector", "--id-column", "id"]
    run("build", tables / "0.parquet", "--out", out, "--dims", DIMS, *told)
    assert run_json("info", out)["columns"] == {"column": "vector", "id_column": "id"}
    assert "column vector, id_column id" in run("info", out)
    noted = said("add", out, tables / "1.parquet")
    assert "mrl-fast: --column vector --id-column id, as the index was built\n" in noted
    expected = in_memory(250, np.arange(250) * 7)
    same_as(out, expected)
    ids = saved(tmp_path / "ids.npy", np.arange(2) + 9000)
    run("add", out, saved(tmp_path / "x.npy", QUERIES[:2]), "--ids", ids)  # .npy has no columns
    expected.add(QUERIES[:2], np.arange(2) + 9000)
    same_as(out, expected)
    strange = parquet(tmp_path / "n.parquet", QUERIES[:3], pa.array(["a", "b", "c"]))
    error = run("add", out, strange, code=2)
    assert "'id' of string; ids are int64: keep a table of your own" in error
    assert "(--column vector --id-column id as the index was built)" in error
    ids = saved(tmp_path / "ids.npy", np.arange(3) + 9900)
    run("add", out, strange, "--ids", ids)
    expected.add(QUERIES[:3], np.arange(3) + 9900)
    same_as(out, expected)
    run("build", saved(tmp_path / "b.npy", BASE), "--out", out, "--dims", DIMS, "--overwrite")
    assert run_json("info", out)["columns"] == {}


def test_what_is_beside_an_index_is_checked(tmp_path):
    index = build(tmp_path / "i", saved(tmp_path / "b.npy", BASE))
    for text in ("{", "[1]", '{"column": 3}', '{"columns": "a"}'):
        (index / "columns.json").write_text(text)
        for command in (["add", index, tmp_path / "b.npy"], ["info", index]):
            assert "columns.json: expected" in run(*command, code=2)
    for text in ("[", "{}", '{"source": "a", "rows": "many"}'):
        (index / "unfinished.json").write_text(text)
        assert "unfinished.json: expected" in run("search", index, tmp_path / "b.npy", code=2)


def test_blank_lines_among_ids(tmp_path):
    (tmp_path / "ids.txt").write_text("7\n\n9\n \n")
    base = saved(tmp_path / "b.npy", BASE[:2])
    run("build", base, "--out", tmp_path / "i", "--ids", tmp_path / "ids.txt")
    assert MatryoshkaIndex.load(tmp_path / "i").ids.tolist() == [7, 9]


def test_string_ids_are_refused_in_words(tmp_path):
    base = saved(tmp_path / "b.npy", BASE[:2])
    (tmp_path / "ids.txt").write_text("doc-1\ndoc-2\n")
    np.save(tmp_path / "ids.npy", np.array(["doc-1", "doc-2"]))
    np.save(tmp_path / "objects.npy", np.array(["doc-1", "doc-2"], object))
    for name in ("ids.txt", "ids.npy", "objects.npy"):
        error = run("build", base, "--out", tmp_path / "i", "--ids", tmp_path / name, code=2)
        assert re.search(f"{name}: expected .*keep a table of your own from its strings", error)
    assert not (tmp_path / "i").exists()


# --- what is said where stderr is no terminal


def test_a_line_a_checkpoint(tmp_path, parts):
    command = ["build", parts, "--dims", DIMS, "--checkpoint", 1000, "--out"]
    lines = said(*command, tmp_path / "i", "--limit", 2500).splitlines()
    pattern = r"mrl-fast: build: ([\d,]+) of 2,500 rows, [\d,]+ a second"
    rows = [int(n.replace(",", "")) for line in lines for n in re.findall(pattern, line)]
    assert len(rows) == len(lines)
    assert rows[-1] == 2500 and 3 <= len(rows) <= 4, lines
    assert min(np.diff([0, *rows[:-1]])) > 700, "a part's end is no checkpoint"
    assert said(*command, tmp_path / "i", "--quiet") == ""
    assert json.loads(run(*command, tmp_path / "j", "--json"))["rows"] == ROWS
