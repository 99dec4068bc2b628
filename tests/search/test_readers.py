"""Vectors and ids in files: every format gives the same rows however it is read, and whatever is
wrong with a file is said with the file's name."""

import struct
import sys
import tracemalloc

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


def documents(ids, rows):
    """Structs of an id, and of a struct that holds a vector."""
    lists = pa.array([*rows], pa.list_(pa.float32()))
    meta = pa.StructArray.from_arrays([pa.array(["a"] * len(ids)), lists], ["text", "emb"])
    return pa.StructArray.from_arrays([pa.array(ids), meta], ["id", "meta"])


FORMATS = {
    "float16.npy": lambda path: np.save(path, SMALL.astype(np.float16)),
    "float64.npy": lambda path: np.save(path, SMALL.astype(np.float64)),
    "uint8.npy": lambda path: np.save(path, SMALL.astype(np.uint8)),
    "fortran.npy": lambda path: np.save(path, np.asfortranarray(SMALL)),
    "big-endian.npy": lambda path: np.save(path, SMALL.astype(">f8")),
    "both.npy": lambda path: np.save(path, np.asfortranarray(SMALL.astype(">f2"))),
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
    "view.parquet": lambda path: parquet(path, pa.list_view(pa.float32()), id=IDS),
    "large-view.parquet": lambda path: parquet(path, pa.large_list_view(pa.float32()), id=IDS),
    "tensor.parquet": lambda path: pq.write_table(
        pa.table({"id": IDS, "vector": pa.FixedShapeTensorArray.from_numpy_ndarray(SMALL)}),
        path,
        row_group_size=70,
    ),
    "nested.parquet": lambda path: pq.write_table(
        pa.table({"doc": documents(IDS, SMALL)}), path, row_group_size=70
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


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("list.parquet", "id"),
        ("fixed.parquet", "id"),
        ("view.parquet", "id"),
        ("tensor.parquet", "id"),
        ("nested.parquet", "doc.id"),
    ],
)
def test_parquet_ids_stay_with_their_vectors(tmp_path, name, column):
    FORMATS[name](tmp_path / name)
    source = open_vectors(tmp_path / name, id_column=column)
    for vectors, ids in source.chunks(33, 65):
        at = np.argsort(IDS)[ids]
        assert np.array_equal(vectors, SMALL[at])
    assert np.array_equal(read_ids(tmp_path / name, column), IDS)


def test_nested_columns_by_dotted_names(tmp_path):
    path = tmp_path / "x.parquet"
    lists = pa.array([*SMALL], pa.list_(pa.float32()))
    docs = documents(IDS, -SMALL)
    pq.write_table(pa.table({"doc": docs, "top": lists}), path)
    assert np.array_equal(read(open_vectors(path), 99)[0], SMALL)  # the only one at the top
    source = open_vectors(path, "doc.meta.emb", id_column="doc.id")
    vectors, ids = read(source, 99)
    assert np.array_equal(vectors, -SMALL) and np.array_equal(np.concatenate(ids), IDS)
    for name, got in [("doc.emb", "'doc.emb'"), ("doc.meta", "'doc.meta' of struct<")]:
        message = f"column: expected one of 'doc.meta.emb', 'top', got {got}"
        with pytest.raises(ValueError, match=message):
            open_vectors(path, name)
    pq.write_table(pa.table({"doc": docs, "doc.meta.emb": lists}), path)
    with pytest.raises(ValueError, match="got 'doc.meta.emb', which 2 columns are called"):
        open_vectors(path, "doc.meta.emb")


def test_fortran_order_is_read_in_bounded_memory(tmp_path):
    whole = np.asfortranarray(np.random.default_rng(0).random((50_000, 40)))  # 16 MB
    np.save(tmp_path / "x.npy", whole)
    source = open_vectors(tmp_path / "x.npy")
    tracemalloc.start()
    try:
        for begin in (0, 49_900):
            ((vectors, _),) = source.chunks(100, begin, begin + 100)
            assert np.array_equal(vectors, whole[begin : begin + 100])
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["meta", "inference"])
def test_whatever_torch_makes_by_default(tmp_path, kind):
    FORMATS["bf16.safetensors"](tmp_path / "x.safetensors")
    with torch.device("meta") if kind == "meta" else torch.inference_mode():
        ((vectors, _),) = open_vectors(tmp_path / "x.safetensors").chunks(ROWS)
    assert vectors.dtype == torch.bfloat16 and vectors.device.type == "cpu"
    assert np.array_equal(vectors.float().numpy(), SMALL)


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
    np.save(tmp_path / "big-endian.npy", np.array(wanted, ">i8"))
    np.save(tmp_path / "column.npy", np.array(wanted)[:, None])
    for name in ("x.npy", "u.npy", "x.txt", "big-endian.npy", "column.npy"):
        ids = read_ids(tmp_path / name)
        assert ids.dtype == np.int64 and ids.tolist() == wanted, name
    vecs(tmp_path / "x.ivecs", [[7], [3]], "<i4")
    assert read_ids(tmp_path / "x.ivecs").tolist() == [7, 3]
    vecs(tmp_path / "k.ivecs", [[7, 1, 2], [3, 0, 9]], "<i4")
    np.save(tmp_path / "k.npy", np.array([[7, 1, 2], [3, 0, 9]], order="F", dtype=">u4"))
    for name in ("k.ivecs", "k.npy"):
        assert read_neighbours(tmp_path / name).tolist() == [[7, 1, 2], [3, 0, 9]]


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
    ("x.csv", b"1,2", r"expected vectors in one of \.npy, .*, got '\.csv'"),
    ("x.ivecs", b"1,2", r"expected vectors in one of \.npy, .*, got '\.ivecs'"),
    ("x", b"1,2", "got 'no'"),
    ("pickle.npy", b"\x80\x04K\x01.", "a .npy file, got one that begins with"),
    ("later.npy", b"\x93NUMPY\x03\x00", "undamaged .npy file, got version"),
    ("head.npy", b"\x93NUMPY\x01\x00\xff\xff{'descr'", "an undamaged .npy file"),
    ("objects.npy", lambda p: np.save(p, np.array([[{}]]), allow_pickle=True), "of object"),
    ("flat.npy", lambda p: np.save(p, np.zeros(3)), r"expected \[n, D\] .*, got shape \[3\]"),
    ("ints.npy", lambda p: np.save(p, np.zeros((3, 2), int)), "got shape .* of int64"),
    ("complex.npy", lambda p: np.save(p, np.zeros((3, 2), complex)), "got .* of complex128"),
    ("negative.npy", lambda p: p.write_bytes(header(p, b"(6, 2)", b"(-6, -2)")), "shape .-6, -2"),
    ("longer.npy", lambda p: p.write_bytes(header(p, b"(6, 2)", b"(7, 2)")), "got 224 for shape"),
    ("none.npy", lambda p: np.save(p, np.zeros((0, 2))), r"at least one vector, got shape \[0, 2"),
    ("two.npy", lambda p: p.write_bytes(2 * npy_bytes(p)), "expected 224 bytes, got 448"),
    ("short.fvecs", b"\x03\x00", "got 2 bytes"),
    ("cut.fvecs", rows(3, 3)[:-1], "a positive multiple of 16 bytes, got 3 in .* and 31 bytes"),
    ("negative.fvecs", rows(-3), "at least 1 column, got -3"),
    ("huge.fvecs", rows(2**31 - 1), "a positive multiple of 8589934592 bytes"),
    ("ragged.fvecs", rows(3, 3, 2, 3), "3 columns in every row, got 2 in row 2"),
    ("ragged.bvecs", b"\3\0\0\0abc" + b"\4\0\0\0abc", "3 columns in every row, got 4 in row 1"),
    ("text.safetensors", b"hello, this is no such file", "expected a safetensors file"),
    ("flat.safetensors", lambda p: save_file({"x": torch.zeros(3)}, p), "got None of 'x' .3. of"),
    ("float8.safetensors", lambda p: save_file(
        {"x": torch.zeros(3, 2).to(torch.float8_e4m3fn)}, p
    ), r"expected a tensor \[n, D\] of F16, BF16, F32, F64, got .* \[3, 2\] of F8_E4M3"),
    ("text.parquet", b"PAR1 is all that it has of PAR1", "expected an undamaged Parquet file"),
    ("ints.parquet", column([[1, 2]], pa.list_(pa.int32())), "a column of lists of floats"),
    ("empty-first.parquet", column([[], [1, 2]]), "at least one float, got an empty one in row 0"),
    ("empty-later.parquet", column([[1, 2], [3, 4], []]), "lists of 2, got 0 in row 2"),
    ("fixed.parquet", column([[1, 2], [3, 4], None], pa.list_(pa.float32(), 2)), "one in row 2"),
    ("fixed-inner.parquet", column([[1, 2], [3, 4], [5, None]], pa.list_(pa.float64(), 2)),
     "a null in row 2"),
    ("view.parquet", column([[1, 2], [3, 4], None], pa.list_view(pa.float32())), "one in row 2"),
    ("struct.parquet", column([{"e": [1.0]}, None], pa.struct({"e": pa.list_(pa.float32())})),
     "v.e: expected no nulls, got one in row 1"),
    ("ragged.parquet", column([[1, 2], [1]]), "lists of 2, got 1 in row 1"),
    ("null.parquet", column([[1, 2], None]), "v: expected no nulls, got one in row 1"),
    ("first.parquet", column([None, [1, 2]]), "v: expected no nulls, got one in row 0"),
    ("inner.parquet", column([[1, 2], [None, 3]]), "expected floats, got a null in row 1"),
    ("none.parquet", column([]), r"at least one vector, got shape \[0, 0\]"),
]  # fmt: skip


def npy_bytes(path):
    np.save(path, np.zeros((6, 2), np.float64))
    return path.read_bytes()


def header(path, old, new):
    """A .npy file whose header, as long as before, has something else in place of ``old``."""
    more = len(new) - len(old)
    return npy_bytes(path).replace(old, new, 1).replace(b" " * more + b"\n", b"\n", 1)


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
        ("row.txt", b"1,2,3\n", "in line 1, got '1,2,3', which are several: each takes a line"),
        ("big.txt", b"9223372036854775808\n", "an int64 in line 1"),
        ("binary.txt", b"1\n\xff\xfe\n", "an int64 in line 2"),
        (
            "floats.npy",
            lambda p: np.save(p, np.zeros(3)),
            "expected integers .*, got shape .* of float64",
        ),
        ("big.npy", lambda p: np.save(p, np.array([1 << 63], np.uint64)), "ids below"),
        ("wide.npy", lambda p: np.save(p, np.zeros((3, 2), int)), r"ids \[n\], got shape \[3, 2\]"),
        ("deep.npy", lambda p: np.save(p, np.zeros((3, 1, 1), int)), "integers .*, got shape"),
        ("wide.ivecs", rows(3), r"ids \[n\], got shape \[1, 3\]"),
        ("x.fvecs", rows(3), "integers in one of .npy, .ivecs, .txt, .parquet, .pq, got '.fvecs'"),
        ("x.parquet", column([1]), "id_column: expected one of 'v', got None"),
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
        (
            ["a", "b"],
            pa.string(),
            "id_column: expected a column of integers, got 'v' of string; ids are int64: keep",
        ),
        ([1, None], pa.int64(), "id_column: expected no nulls, got one in row 1"),
        ([1, 1 << 63], pa.uint64(), f"ids below {1 << 63}, got {1 << 63}"),
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
    reader = f"mrl_fast.search.readers.{package.replace('pyarrow', 'parquet')}"
    monkeypatch.delitem(sys.modules, reader, raising=False)
    with pytest.raises(ModuleNotFoundError) as error:
        open_vectors(tmp_path / name)
    assert error.value.name == package
