"""Vectors and ids in files: every format gives the same rows however it is read, and whatever is
wrong with a file is said with the file's name."""

import struct
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from mrl_fast.search.readers import open_vectors, read_ids, read_neighbours

ROWS, WIDTH = 250, 6
IDS = np.random.default_rng(1).permutation(ROWS)
SMALL = np.random.default_rng(0).integers(0, 256, (ROWS, WIDTH)).astype(np.float32)  # in any dtype


def vecs(path, rows, dtype):
    """.fvecs, .bvecs or .ivecs."""
    rows = np.asarray(rows)
    path.write_bytes(
        b"".join(struct.pack("<i", len(row)) + row.astype(dtype).tobytes() for row in rows)
    )


def parquet(path, kind, rows=SMALL, group=70, **columns):
    table = pa.table({**columns, "vector": pa.array([*rows], kind)})
    pq.write_table(table, path, row_group_size=group)


FORMATS = {
    "float16.npy": lambda path: np.save(path, SMALL.astype(np.float16)),
    "float64.npy": lambda path: np.save(path, SMALL.astype(np.float64)),
    "uint8.npy": lambda path: np.save(path, SMALL.astype(np.uint8)),
    "x.fvecs": lambda path: vecs(path, SMALL, "<f4"),
    "x.bvecs": lambda path: vecs(path, SMALL, "u1"),
    "bf16.safetensors": lambda path: save_file(
        {"x": torch.from_numpy(SMALL).bfloat16(), "bias": torch.zeros(WIDTH)}, path
    ),
    "f32.safetensors": lambda path: save_file({"x": torch.from_numpy(SMALL)}, path),
    "list.parquet": lambda path: parquet(path, pa.list_(pa.float32()), id=IDS),
    "large.parquet": lambda path: parquet(path, pa.large_list(pa.float64()), id=IDS),
    "fixed.parquet": lambda path: parquet(path, pa.list_(pa.float32(), WIDTH), id=IDS),
    "half.pq": lambda path: parquet(
        path, pa.list_(pa.float16()), SMALL.astype(np.float16), id=IDS
    ),
}  # fmt: skip


def read(source, *args):
    """All vectors, fp32, and all ids; each chunk within the size that was asked for."""
    chunks = list(source.chunks(*args))
    assert all(0 < len(vectors) <= args[0] for vectors, _ in chunks)
    vectors = [torch.tensor(np.asarray(v) if isinstance(v, np.ndarray) else v) for v, _ in chunks]
    return torch.cat(vectors).float().numpy(), [ids for _, ids in chunks]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_every_format(tmp_path, name):
    FORMATS[name](tmp_path / name)
    source = open_vectors(tmp_path / name)
    assert (source.rows, source.width) == (ROWS, WIDTH)
    # row groups of Parquet end at 70, 140, 210
    for rows, start, stop in [(7, 0, None), (1000, 0, None), (64, 69, None), (3, 70, 72),
                              (100, 60, 215), (10, 249, 250), (1, 139, 141)]:  # fmt: skip
        vectors, ids = read(source, rows, start, stop)
        assert np.array_equal(vectors, SMALL[start:stop]), (rows, start, stop)
        assert ids == [None] * len(ids)
    assert list(source.chunks(10, ROWS)) == []


def test_fvecs_by_hand(tmp_path):
    path = tmp_path / "x.fvecs"
    path.write_bytes(bytes.fromhex("02000000 0000803f 000000c0  02000000 0000003f 00000000"))
    ((vectors, ids),) = open_vectors(path).chunks(5)
    assert vectors.tolist() == [[1, -2], [0.5, 0]] and ids is None


@pytest.mark.parametrize("name", ["list.parquet", "fixed.parquet"])
def test_parquet_ids_stay_with_their_vectors(tmp_path, name):
    FORMATS[name](tmp_path / name)
    source = open_vectors(tmp_path / name, id_column="id")
    for vectors, ids in source.chunks(33, 65):
        at = np.argsort(IDS)[ids]
        assert np.array_equal(vectors, SMALL[at])
    assert np.array_equal(read_ids(tmp_path / name, "id"), IDS)


def test_which_column_and_which_tensor(tmp_path):
    path = tmp_path / "x.parquet"
    lists = pa.array([*SMALL], pa.list_(pa.float32()))
    pq.write_table(pa.table({"a": lists, "b": pa.array([*-SMALL], pa.list_(pa.float32()))}), path)
    with pytest.raises(ValueError, match="column: expected one of 'a', 'b', got None"):
        open_vectors(path)
    assert np.array_equal(read(open_vectors(path, column="b"), 99)[0], -SMALL)

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3, 2), "b": torch.ones(4, 5), "c": torch.zeros(2, 2).int()}, path)
    with pytest.raises(ValueError, match="key: expected one of 'a', 'b', got None"):
        open_vectors(path)
    with pytest.raises(ValueError, match="key: expected one of 'a', 'b', got 'c'"):
        open_vectors(path, key="c")
    assert open_vectors(path, key="b").rows == 4


def test_ids(tmp_path):
    wanted = [5, 0, 1 << 40]
    np.save(tmp_path / "x.npy", np.array(wanted))
    np.save(tmp_path / "u.npy", np.array(wanted, np.uint64))
    (tmp_path / "x.txt").write_text("5\n0\n1099511627776\n")
    for name in ("x.npy", "u.npy", "x.txt"):
        ids = read_ids(tmp_path / name)
        assert ids.dtype == np.int64 and ids.tolist() == wanted, name
    vecs(tmp_path / "x.ivecs", [[7], [3]], "<i4")
    assert read_ids(tmp_path / "x.ivecs").tolist() == [7, 3]
    vecs(tmp_path / "k.ivecs", [[7, 1, 2], [3, 0, 9]], "<i4")
    assert read_neighbours(tmp_path / "k.ivecs").tolist() == [[7, 1, 2], [3, 0, 9]]


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else content(path)


def rows(*widths):
    return b"".join(struct.pack("<i", width) + bytes(4 * 3) for width in widths)


def column(values, kind=None):
    kind = kind or pa.list_(pa.float32())
    return lambda path: pq.write_table(pa.table({"v": pa.array(values, kind)}), path)


BROKEN = [
    ("empty.npy", b"", "something in it, got 0 bytes"),
    ("empty.fvecs", b"", "something in it, got 0 bytes"),
    ("empty.parquet", b"", "something in it, got 0 bytes"),
    ("x.csv", b"1,2", r"expected one of \.npy, .*, got '\.csv'"),
    ("x", b"1,2", "got 'no'"),
    ("pickle.npy", b"\x80\x04K\x01.", "expected a .npy file"),
    ("head.npy", b"\x93NUMPY\x01\x00\xff\xff{'descr'", "an undamaged .npy file"),
    ("objects.npy", lambda p: np.save(p, np.array([[{}]]), allow_pickle=True), "undamaged .npy"),
    ("flat.npy", lambda p: np.save(p, np.zeros(3)), r"expected \[n, D\] .*, got shape \[3\]"),
    ("ints.npy", lambda p: np.save(p, np.zeros((3, 2), int)), "got shape .* of int64"),
    ("order.npy", lambda p: np.save(p, np.zeros((3, 2), order="F")), "got Fortran order"),
    ("endian.npy", lambda p: np.save(p, np.zeros((3, 2), ">f4")), "byte order, got >f4"),
    ("none.npy", lambda p: np.save(p, np.zeros((0, 2))), r"at least one vector, got shape \[0, 2"),
    ("two.npy", lambda p: p.write_bytes(2 * npy_bytes(p)), "expected 224 bytes, got 448"),
    ("short.fvecs", b"\x03\x00", "got 2 bytes"),
    ("cut.fvecs", rows(3, 3)[:-1], "a positive multiple of 16 bytes, got 3 in .* and 31 bytes"),
    ("negative.fvecs", rows(-3), "at least 1 column, got -3"),
    ("huge.fvecs", rows(2**31 - 1), "a positive multiple of 8589934592 bytes"),
    ("ragged.fvecs", rows(3, 3, 2, 3), "3 columns in every row, got 2 in row 2"),
    ("ragged.bvecs", b"\3\0\0\0abc" + b"\4\0\0\0abc", "3 columns in every row, got 4 in row 1"),
    ("text.safetensors", b"hello, this is no such file", "expected a safetensors file"),
    ("flat.safetensors", lambda p: save_file({"x": torch.zeros(3)}, p), "a tensor .* of floats"),
    ("text.parquet", b"PAR1 is all that it has of PAR1", "expected an undamaged Parquet file"),
    ("ints.parquet", column([[1, 2]], pa.list_(pa.int32())), "a column of lists of floats"),
    ("ragged.parquet", column([[1, 2], [1]]), "lists of 2, got 1 in row 1"),
    ("null.parquet", column([[1, 2], None]), "v: expected no nulls, got one in row 1"),
    ("first.parquet", column([None, [1, 2]]), "v: expected no nulls, got one in row 0"),
    ("inner.parquet", column([[1, 2], [None, 3]]), "expected floats, got a null in row 1"),
    ("none.parquet", column([]), r"at least one vector, got shape \[0, 0\]"),
]  # fmt: skip


def npy_bytes(path):
    np.save(path, np.zeros((6, 2), np.float64))
    return path.read_bytes()


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[row[0] for row in BROKEN])
def test_broken(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        list(open_vectors(tmp_path / name).chunks(2))
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("name", FORMATS)
def test_cut_anywhere(tmp_path, name):
    """At open or while reading, never as fewer rows; also where the file is cut in between."""
    path = tmp_path / name
    FORMATS[name](path)
    whole = path.read_bytes()
    source = open_vectors(path)
    sizes = {1, 3, 40, len(whole) // 2, len(whole) - 29, len(whole) - 8, len(whole) - 1}
    for size in sizes:
        path.write_bytes(whole[:size])
        if not (name.endswith("vecs") and size % (len(whole) // ROWS) == 0):  # then it is whole
            with pytest.raises(ValueError, match=name):
                list(open_vectors(path).chunks(100))
        with pytest.raises(ValueError, match=name):
            list(source.chunks(100))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"1\n2.5\n", "an int64 in line 2, got '2.5'"),
        ("blank.txt", b"1\n\n2\n", "an int64 in line 2, got ''"),
        ("big.txt", b"9223372036854775808\n", "an int64 in line 1"),
        ("binary.txt", b"1\n\xff\xfe\n", "an int64 in line 2"),
        ("floats.npy", lambda p: np.save(p, np.zeros(3)), "expected integers, got float64"),
        ("big.npy", lambda p: np.save(p, np.array([1 << 63], np.uint64)), "ids below"),
        ("wide.npy", lambda p: np.save(p, np.zeros((3, 1), int)), r"ids \[n\], got shape \[3, 1\]"),
        ("wide.ivecs", rows(3), r"ids \[n\], got shape \[1, 3\]"),
        ("x.fvecs", rows(3), "ids in .npy, .ivecs, .txt or .parquet, got '.fvecs'"),
        ("x.parquet", column([1]), "id_column: expected the name of one, got None"),
    ],
)
def test_bad_ids(tmp_path, name, content, message):
    if name == "x.parquet":
        content = column([1], pa.int64())
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_ids(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (["a", "b"], pa.string(), "id_column: expected a column of integers, got 'v'"),
        ([1, None], pa.int64(), "id_column: expected no nulls, got one in row 1"),
        ([1, 1 << 63], pa.uint64(), "9223372036854775808"),
    ],
)
def test_bad_id_columns(tmp_path, values, kind, message):
    path = tmp_path / "x.parquet"
    column(values, kind)(path)
    with pytest.raises(ValueError, match=message):
        read_ids(path, "v")


def test_options_of_other_formats(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, SMALL)
    for option in ("column", "key", "id_column"):
        with pytest.raises(ValueError, match=f"{option}: expected none for .npy, got 'v'"):
            open_vectors(path, **{option: "v"})
    with pytest.raises(ValueError, match="id_column: expected none for .npy"):
        read_ids(path, "v")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.npy: expected a file, got nothing"):
        open_vectors(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        open_vectors(tmp_path)


@pytest.mark.parametrize(
    ("name", "package"), [("x.parquet", "pyarrow"), ("x.safetensors", "safetensors")]
)
def test_without_the_extra(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "mrl_fast.search.readers.parquet", raising=False)
    with pytest.raises(ModuleNotFoundError) as error:
        open_vectors(tmp_path / name)
    assert error.value.name == package
