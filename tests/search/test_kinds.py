"""What ids and vectors may be: integers of any kind, lists, Series, pyarrow; and what not."""

import numpy as np
import pytest
import torch

from mrl_fast import (
    MatryoshkaIndex,
    SearchResult,
    approx_topk,
    funnel_search,
    prefix_topk,
    rerank,
    semantic_search,
)
from tests.helpers.index_model import one_thread  # noqa: F401

X = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


MASK = ("uint8", "torch.uint8")  # which `allowed` takes for a mask


def of_tensor(dtype):
    return lambda ids: torch.tensor(list(ids)).to(getattr(torch, dtype))


def of_pandas(ids):
    pandas = pytest.importorskip("pandas")
    return pandas.Series(list(ids), index=list("abcdefghij")[: len(ids)], dtype="int64")


def of_pyarrow(ids):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.array(list(ids), pyarrow.int64())


KINDS = {
    **{dtype: lambda ids, dtype=dtype: np.array(list(ids), dtype) for dtype in INTEGERS},
    **{f"torch.{dtype}": of_tensor(dtype) for dtype in INTEGERS},
    "list": list,
    "tuple": tuple,
    "objects": lambda ids: np.array(list(ids), object),
    "Series of objects": lambda ids: of_pandas(ids).astype(object),
    "dict_values": lambda ids: dict(enumerate(ids)).values(),
    "range": lambda ids: ids,
    "of numpy scalars": lambda ids: list(np.array(list(ids), np.uint16)),
    "Series": of_pandas,
    "strided": lambda ids: np.repeat(np.array(list(ids), np.int64), 2)[::2],
    "pyarrow": of_pyarrow,
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_any_kind(kind):
    make, index, plain = KINDS[kind], MatryoshkaIndex((5, 20)), MatryoshkaIndex((5, 20))
    index.add(X[:8], make(range(20, 28)))
    plain.add(X[:8], torch.arange(20, 28))
    index.update(make(range(22, 24)), X[8:10])
    plain.update(torch.arange(22, 24), X[8:10])
    index.remove(make(range(25, 27)))
    plain.remove(torch.arange(25, 27))
    assert index.ids.tolist() == plain.ids.tolist() == [20, 21, 24, 27, 22, 23]
    asked = make(range(21, 28, 2))
    assert list(index.contains(asked)) == [True, True, False, True]
    known = make(range(21, 24))
    if kind in MASK:
        with pytest.raises(ValueError, match="allowed: expected a 0 or 1, as uint8 is a mask, for"):
            index.search(X[:2], 3, allowed=known)
        make = KINDS["int16"]
    assert np.array_equal(index.reconstruct(known), plain.reconstruct(torch.arange(21, 24)))
    known, asked = make(range(21, 24)), make(range(21, 28, 2))
    for result in (index.search(X[:2], 3, allowed=known), index.search(X[:2], 9, allowed=asked)):
        assert set(result.ids.ravel().tolist()) <= {21, 22, 23, 27, -1}
    assert index.search(X[8:9], 1, allowed=known).ids.tolist() == [[22]]
    assert (index.search(X[:2], 3, allowed=make(range(0))).ids == -1).all()


@pytest.mark.parametrize("one", [7, np.int32(7), np.uint64(7), np.array(7), torch.tensor(7)])
def test_a_single_id(one):
    index = MatryoshkaIndex((5, 20))
    index.add(X[:1], one)
    assert index.ids.tolist() == [7] and index.contains(one).tolist() == [True]
    assert index.reconstruct(one).shape == (1, 20)
    index.remove(one)
    assert len(index) == 0


WRONG = [
    (np.array([2.0], np.float32), TypeError, "expected integers, got numpy.float32"),
    (torch.tensor([2.0]), TypeError, "expected integers, got torch.float32"),
    ([2.0], TypeError, r"\[0\]: expected an integer, got float"),
    (["2"], TypeError, "got list of str: ids are integers: keep a table of your own"),
    (np.array(["2"], object), TypeError, "got numpy.object: ids are integers: keep a table"),
    (np.array([2.5], object), TypeError, r"\[0\]: expected an integer, got float"),
    ([2, True], TypeError, r"\[1\]: expected an integer, got bool"),
    ([2, np.True_], TypeError, r"\[1\]: expected an integer, got bool"),
    ([1 << 63], ValueError, r"\[0\]: expected an integer in .*, got 9223372036854775808"),
    (np.array([5, 1 << 63], np.uint64), ValueError, r"got 9223372036854775808 \(numpy.uint64\)"),
    (np.array([(1 << 64) - 1], np.uint64), ValueError, r"got 18446744073709551615 \(numpy"),
    (torch.tensor([1 << 63], dtype=torch.uint64), ValueError, r"got 922.*08 \(torch.uint64\)"),
    ([[2], [3]], ValueError, r"expected shape \[n\], got \[2, 1\]"),
    ([[2], [3, 4]], ValueError, r"expected rows of one shape, got \[1\] and \[2\]"),
    ([[2], [3.0]], TypeError, r"\[1\]\[0\]: expected an integer, got float"),
    (np.array([[2]]), ValueError, r"expected shape \[n\], got \[1, 1\]"),
    (np.array(["2"]), TypeError, "got numpy.<U1: ids are integers: keep a table of your own"),
    (np.array([2j]), TypeError, "expected integers, got numpy.complex128"),
    ({2: 3}, TypeError, "expected a tensor, a numpy array, .* or a list of numbers, got dict"),
    ("2", TypeError, "got str: ids are integers: keep a table of your own from strings to them"),
]
NO_MASK = [
    (True, TypeError, "expected integers, got bool"),
    ([True], TypeError, "expected integers, got list of bool"),
    (np.array([True]), TypeError, "expected integers, got numpy.bool"),
    (np.bool_(True), TypeError, "expected integers, got numpy.bool"),
    (torch.tensor([True]), TypeError, "expected integers, got torch.bool"),
]
OF_IDS = {
    "add": lambda i, ids: i.add(X[:2], ids),
    "update": lambda i, ids: i.update(ids, X[:2]),
    "remove": lambda i, ids: i.remove(ids),
    "contains": lambda i, ids: i.contains(ids),
    "reconstruct": lambda i, ids: i.reconstruct(ids),
    "allowed": lambda i, ids: i.search(X[:2], 1, allowed=ids),
}


@pytest.mark.parametrize("call", OF_IDS)
@pytest.mark.parametrize(("ids", "error", "message"), [*WRONG, *NO_MASK], ids=str)
def test_what_is_no_id(call, ids, error, message):
    index = MatryoshkaIndex((5, 20))
    index.add(X[:8])
    if call == "allowed" and any(ids is of for of, _, _ in NO_MASK):
        error, message = ValueError, "expected a bool for each of 8 ids, got shape"
    with pytest.raises(error, match=("allowed" if call == "allowed" else "ids") + ".*" + message):
        OF_IDS[call](index, ids)
    assert index.ids.tolist() == list(range(8))


def test_ids_below_zero_say_what_they_are():
    index = MatryoshkaIndex((5, 20))
    with pytest.raises(ValueError, match=r"ids: .* of at least 0, got -3 \(numpy.int16\)"):
        index.add(X[:2], np.array([4, -3], np.int16))
    with pytest.raises(ValueError, match=r"ids: .* of at least 0, got -3 \(list of int\)"):
        index.add(X[:2], [4, -3])


MASKS = {
    "list": list,
    "numpy": lambda mask: np.array(mask),
    "numpy.uint8": lambda mask: np.array(mask, np.uint8),
    "torch.uint8": lambda mask: torch.tensor(mask, dtype=torch.uint8),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_masks_of_any_kind(kind, device):
    index = MatryoshkaIndex((5, 20), device=device)
    index.add(X[:4], [0, 1, 2, 3])
    index.remove([1])
    found = index.search(X[:2], 3, allowed=MASKS[kind]([False, True, True])).ids
    assert [set(row) for row in found.tolist()] == [{2, 3, -1}] * 2  # neither ids 0 and 1, nor 0


def test_sets_and_empty_arrays_of_ids():
    index = MatryoshkaIndex((5, 20))
    index.add(X[:8])
    assert set(index.search(X[:1], 3, allowed={2, 5}).ids[0].tolist()) == {2, 5, -1}
    assert set(index.search(X[:1], 3, allowed={2: 0, 5: 0}.keys()).ids[0].tolist()) == {2, 5, -1}
    assert all(index.contains({2, 5})) and not len(index.contains(np.array([])))
    assert (index.search(X[:1], 3, allowed=np.array([])).ids == -1).all()
    index.remove({2, 5})
    index.remove(np.array([]))
    assert index.ids.tolist() == [0, 1, 3, 4, 6, 7]
    for call in (lambda: index.add(X[:2], {8, 9}), lambda: index.update({0, 1}, X[:2])):
        with pytest.raises(TypeError, match="ids: expected them in the order of .*, got set"):
            call()
    with pytest.raises(TypeError, match=r"ids: expected update\(ids, vectors\), got the vectors"):
        index.update(X[:2], [0, 1])


ZERO_ONE = [
    np.ones(5, int), np.array([0, 1, 0, 1, 1], np.int8), [1, 0, 0, 1, 1], torch.zeros(5).long(),
    torch.ones(5, dtype=torch.int32), torch.tensor([0, 1, 1, 0, 0], dtype=torch.int8),
]  # fmt: skip


@pytest.mark.parametrize("mask", ZERO_ONE, ids=str)
def test_a_mask_of_integers_is_not_taken_for_ids(mask):
    index = MatryoshkaIndex((5, 20))
    index.add(X[:5])
    with pytest.raises(ValueError, match="allowed: .* looks like a mask: give it as bool or uint8"):
        index.search(X[:1], 1, allowed=mask)
    for some in ([0, 1, 0, 1], [0, 1, 2, 1, 0], [0, 0, 1, 1, 0, 1]):
        assert set(index.search(X[:1], 3, allowed=some).ids[0].tolist()) <= {*some, -1}
    index.remove([2, 3, 4])
    assert index.search(X[:1], 2, allowed=[0, 1]).ids.sort().values.tolist() == [[0, 1]]


def test_what_is_no_mask():
    index = MatryoshkaIndex((5, 20))
    index.add(X[:3])
    for mask, message in (
        (np.array([0, 1, 2], np.uint8), "expected 0 or 1 in a mask of numpy.uint8, got 2"),
        (torch.tensor([1, 255, 1], dtype=torch.uint8), "mask of torch.uint8, got 255"),
        (np.array([1], np.uint8), r"expected a 0 or 1, .* for each of 3 ids, got shape \[1\]"),
    ):
        with pytest.raises(ValueError, match=f"allowed: .*{message}"):
            index.search(X[:1], 1, allowed=mask)


# --- vectors


LISTS = {
    "lists": lambda x: x.tolist(),
    "tuple of lists": lambda x: tuple(x.tolist()),
    "arrays": lambda x: [*x.numpy()],
    "tensors": lambda x: [*x],
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_rows(kind):
    make, index = LISTS[kind], MatryoshkaIndex((5, 20), metric="ip")
    index.add(make(X))
    assert torch.equal(index.reconstruct(range(12)), X)
    expected = prefix_topk(X[:2], X, 3)
    out = SearchResult(torch.zeros(2, 3), torch.zeros(2, 3).long())
    for found in (
        index.search(make(X[:2]), 3),
        prefix_topk(make(X[:2]), make(X), 3, out=out),
        funnel_search(make(X[:2]), X, [(5, 12), (20, 3)]),
        rerank(make(X[:2]), X, [list(range(12))] * 2, 3),
        rerank(X[:2], X, np.tile(np.arange(12, dtype=np.int32), (2, 1)), 3),
    ):
        assert isinstance(found.ids, torch.Tensor) and torch.equal(found.ids, expected.ids)


@pytest.mark.parametrize("make", [torch.Tensor.clone, torch.Tensor.numpy, torch.Tensor.tolist])
def test_a_single_query_is_one_row(make):
    index, one = MatryoshkaIndex((5, 20), metric="ip"), X[3]
    index.add(X)
    expected = prefix_topk(one[None], X, 4)
    for found in (
        index.search(make(one), 4),
        index.search(make(one), 4, stages=[(5, 12), (20, 4)]),
        prefix_topk(make(one), X if make is not torch.Tensor.numpy else X.numpy(), 4),
        approx_topk(make(one), X, 4),
        funnel_search(make(one), X, [(5, 12), (20, 4)]),
        rerank(make(one), X, range(12), 4),
        rerank(make(one), X, [range(12)], 4),
    ):
        assert found.ids.shape == (1, 4) and found.ids.tolist() == expected.ids.tolist()
    assert index.range_search(make(one), -1e9).lims.tolist() == [0, 12]
    (hits,) = semantic_search(make(one), index)
    assert hits[0]["corpus_id"] == expected.ids[0, 0]


def test_float64_is_searched_as_float32():
    expected = prefix_topk(X[:2], X, 3)
    for q, x in ((X[:2].double(), X), (X[:2], X.double().numpy()), (X[:2].double(), X.double())):
        assert torch.equal(prefix_topk(q, x, 3).scores, expected.scores)
    with pytest.raises(TypeError, match="queries: expected torch.float32 as database, got numpy.f"):
        prefix_topk(X[:2].half().numpy(), X, 3)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([1, 1 << 24 | 1], ValueError, "expected integers that float32 holds"),
        ([1j], TypeError, "expected numbers, got list of complex"),
        ([[0.5, "a"]], TypeError, "expected numbers, got list of float and str"),
        ([True], TypeError, "expected numbers, got list of bool"),
        ([1.0, None], TypeError, "expected numbers, got list of float and NoneType"),
        (np.array([1], np.int32), TypeError, "expected a floating-point.*, got numpy.int32"),
    ],
    ids=str,
)
def test_what_is_no_query(wrong, error, message):
    with pytest.raises(error, match=f"queries: {message}"):
        MatryoshkaIndex((1, 2)).search(wrong)


def test_what_is_no_candidate():
    for rows, error, message in (
        (np.zeros((1, 2), np.float32), TypeError, "expected integers, got numpy.float32"),
        ([["0"]], TypeError, r"\[0\]\[0\]: expected an integer, got str"),
        (np.array([[1 << 63]], np.uint64), ValueError, "expected integers below 2.63, got 922"),
        ([[0, 12]], ValueError, r"expected rows in \[0, 12\) or -1, got 12"),
        (torch.tensor([0, 1]), ValueError, r"expected shape \[2, C\], got \[2\]"),
    ):
        with pytest.raises(error, match=f"candidates.*{message}"):
            rerank(X[:2] if isinstance(rows, torch.Tensor) else X[:1], X, rows, 1)


@pytest.mark.parametrize("dims", [(20, 5), [12, 20, 5], np.array([20, 5, 12], np.int32)])
def test_dims_in_any_order(dims):
    index = MatryoshkaIndex(dims)
    assert index.dims == tuple(sorted(int(d) for d in dims)) and index.width == 20
    index.add(X)
    assert index.search(X[:1], 1).ids.tolist() == [[0]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pyarrow_vectors(dtype):
    pa = pytest.importorskip("pyarrow")
    numbers = X.to(getattr(torch, dtype)).numpy()
    array = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), 20)
    plain, index = MatryoshkaIndex((5, 20)), MatryoshkaIndex((5, 20))
    plain.add(numbers)
    index.add(array[:5])
    index.add(pa.chunked_array([array[5:7], array[7:]]))
    assert torch.equal(index.reconstruct(range(12)), plain.reconstruct(range(12)))
    found = index.search(array[2:4], 3)
    assert isinstance(found.ids, torch.Tensor) and found.ids[:, 0].tolist() == [2, 3]
    ranked = prefix_topk(array[2:4], array, 3, dim=7)
    assert ranked.ids.tolist() == prefix_topk(numbers[2:4], numbers, 3, dim=7).ids.tolist()


def test_pyarrow_vectors_are_not_copied():
    pa = pytest.importorskip("pyarrow")
    from mrl_fast.shared.arrays import as_tensor

    numbers = X.numpy()
    array = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), 20)
    values = array.flatten().to_numpy()
    assert as_tensor(array[3:], "x").data_ptr() == values[60:].ctypes.data
    assert as_tensor(pa.chunked_array([array]), "x").data_ptr() == values.ctypes.data


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda pa: pa.array([[1.0] * 20]), TypeError, "expected .*ListArray.* got list<"),
        (
            lambda pa: pa.array([["a"] * 20], pa.list_(pa.string(), 20)),
            TypeError,
            "expected numbers or a FixedSizeListArray of them, got fixed_size_list<.*string",
        ),
        (
            lambda pa: pa.array([[1.0] * 20, None], pa.list_(pa.float32(), 20)),
            ValueError,
            "expected no nulls, got one in row 1",
        ),
        (
            lambda pa: pa.array([[1.0] * 20] * 2 + [[None] * 20], pa.list_(pa.float32(), 20)),
            ValueError,
            "expected no nulls, got one in row 2",
        ),
        (lambda pa: pa.array([[[1.0]]]), TypeError, "expected numbers or .* got list<"),
        (lambda pa: pa.table({"a": [1.0]}), TypeError, "expected a pyarrow array, got Table"),
        (lambda pa: X.to_sparse(), TypeError, "expected a dense tensor, got torch.sparse_coo"),
        (lambda pa: X.to_sparse_csr(), TypeError, "expected a dense tensor, got torch.sparse_csr"),
        (lambda pa: X.int().numpy(), TypeError, "expected a floating-point.*, got numpy.int32"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_other_vectors_are_refused_by_name(make, error, message):
    wrong = make(pytest.importorskip("pyarrow"))
    index = MatryoshkaIndex((5, 20), rotation="pca")
    for name, call in {
        "samples": lambda: index.fit(wrong),
        "vectors": lambda: index.add(wrong),
        "queries": lambda: index.search(wrong),
        "database": lambda: prefix_topk(X, wrong, 3),
    }.items():
        with pytest.raises(error, match=f"{name}: {message}"):
            call()
    for call in (
        lambda: index.range_search(wrong, 0.0),
        lambda: prefix_topk(wrong, X, 3),
        lambda: rerank(wrong, X, torch.zeros(2, 3, dtype=torch.int64), 2),
        lambda: funnel_search(wrong, X, [(5, 4), (20, 2)]),
    ):
        with pytest.raises(error, match=f"queries: {message}"):
            call()
    index.add(X)
    with pytest.raises(error, match=f"vectors: {message}"):
        index.update([0], wrong)


def test_vectors_without_values():
    index = MatryoshkaIndex((5, 20))
    with pytest.raises(ValueError, match="vectors: expected values, got a tensor on meta"):
        index.add(X.to("meta"))
    with pytest.raises(ValueError, match="queries: expected values, got a tensor on meta"):
        index.search(X.to("meta"))


def test_a_mask_is_what_is_not_zero():
    index = MatryoshkaIndex((4, 20))
    index.add(torch.randn(1001, 20, generator=torch.Generator().manual_seed(2)))
    for only in (1000, 3):
        flags = torch.zeros(1001, dtype=torch.uint8)
        flags[only] = 255
        found = index.search(X, 3, allowed=flags.view(torch.bool), exact=True)
        assert found.ids.tolist() == [[only, -1, -1]] * len(X)
