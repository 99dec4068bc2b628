"""FAISS indexes in and out: the same vectors, ids and results."""

import sys

import numpy as np
import pytest
import torch

from mrl_fast import MatryoshkaIndex

faiss = pytest.importorskip("faiss")
from mrl_fast.integrations.faiss import from_faiss, to_faiss  # noqa: E402
from mrl_fast.search.index import faiss_flat as convert  # noqa: E402
from mrl_fast.shared import native  # noqa: E402


def vectors(rows, seed=0, width=96):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def assert_same_results(index, other, queries, k, *, tolerance=1e-4):
    """Scores agree, and each id's score is what the other gives that id, or beyond its worst."""
    scores, ids = index.search(queries, k)
    theirs, their_ids = other.search(queries, k)
    if other.metric_type == faiss.METRIC_L2:
        theirs = -theirs * native.METRICS[index.metric].squares
    theirs = np.where(their_ids < 0, -np.inf, theirs)
    np.testing.assert_allclose(scores, theirs, atol=tolerance, rtol=tolerance)
    for b in range(len(queries)):
        known = dict(zip(their_ids[b].tolist(), theirs[b].tolist(), strict=True))
        assert len(set(ids[b].tolist())) == len(ids[b]) or -1 in ids[b]
        for i, score in zip(ids[b].tolist(), scores[b].tolist(), strict=True):
            assert abs(known.get(i, theirs[b, -1]) - score) <= tolerance or i < 0


def test_the_comparison_rejects_wrong_results():
    x, q = vectors(300), vectors(5, seed=1)
    other = faiss.IndexFlatIP(96)
    other.add(x)
    index = MatryoshkaIndex((16, 96), metric="ip")
    index.add(x, ids=np.roll(np.arange(300), 1))
    with pytest.raises(AssertionError):
        assert_same_results(index, other, q, 10)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("kind", ["Flat", "SQ8", "SQfp16", "SQ4"])
@pytest.mark.parametrize("mapped", ["", "IDMap", "IDMap2"])
def test_in(metric, kind, mapped, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK_BYTES", 96 * 4 * 70)  # five chunks
    x, q = vectors(300), vectors(20, seed=1)
    number = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    other = faiss.index_factory(96, f"{mapped},{kind}" if mapped else kind, number)
    other.train(x)
    ids = np.random.default_rng(2).permutation(1000)[:300]
    if mapped:
        other.add_with_ids(x, ids)
    else:
        ids = np.arange(300)
        other.add(x)
    index = from_faiss(other)
    assert index.dims == (96,) and index.metric == metric
    assert index.ids.tolist() == ids.tolist()
    inner = faiss.downcast_index(other.index) if mapped else other
    assert np.array_equal(index.reconstruct(ids), inner.reconstruct_n(0, 300))
    assert_same_results(index, other, q, 12)
    assert_same_results(index, other, q, 350)  # more than there are


def test_options():
    x, q = vectors(500, width=200), vectors(10, width=200, seed=1)
    other = faiss.IndexFlatL2(200)
    other.add(x)
    assert from_faiss(other).dims == (100, 200)
    index = from_faiss(other, [8, 200], dtype="float16", prefix_dtype="int8")
    assert index.dims == (8, 200) and index.dtype == "float16" and index.prefix_dtype == "int8"
    assert_same_results(index, other, q, 10, tolerance=0.3)
    via_method = MatryoshkaIndex.from_faiss(other, (8, 200))
    assert via_method.dims == (8, 200) and len(via_method) == 500
    assert len(from_faiss(faiss.IndexFlatIP(8))) == 0
    assert len(from_faiss(faiss.IndexFlatIP(8), rotation="pca")) == 0


def test_rotation_is_fitted_on_vectors_from_all_over(monkeypatch):
    monkeypatch.setattr(convert, "CHUNK_BYTES", 32 * 4 * 50)
    x = np.zeros((500, 32), np.float32)
    x[:100, :4], x[100:, 28:] = vectors(100, width=4), 3 * vectors(400, width=4)
    other = faiss.IndexFlatIP(32)
    other.add(x)
    index = from_faiss(other, (4, 32), rotation="pca")
    assert (index.rotation[:4, 28:].square().sum(dim=1) > 0.99).all()  # not the first chunk's axes
    np.testing.assert_allclose(index.reconstruct(np.arange(500)), x, atol=1e-5)
    assert_same_results(index, other, x[::50], 5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: faiss.index_factory(8, "IVF2,Flat"), TypeError, "got IndexIVFFlat$"),
        (lambda: faiss.index_factory(8, "PCA4,Flat"), TypeError, "got IndexPreTransform$"),
        (lambda: faiss.index_factory(8, "HNSW4"), TypeError, "got IndexHNSWFlat$"),
        (lambda: faiss.IndexIDMap(faiss.index_factory(8, "PQ4x4")), TypeError, "IDMap of IndexPQ$"),
        (
            lambda: faiss.IndexIDMap2(faiss.IndexIDMap(faiss.IndexFlatIP(8))),
            TypeError,
            "got IndexIDMap2 of IndexIDMap$",
        ),
        (lambda: faiss.IndexBinaryFlat(8), TypeError, "got IndexBinaryFlat$"),
        (lambda: vectors(3), TypeError, "IndexScalarQuantizer, or IndexIDMap .* got ndarray$"),
        (lambda: faiss.IndexFlat(8, faiss.METRIC_L1), ValueError, "got METRIC_L1$"),
    ],
)
def test_refused_kinds(make, error, message):
    with pytest.raises(error, match=f"^index: expected .*{message}"):
        from_faiss(make())


def test_refused_ids_and_dims():
    for ids, message in (
        ([3, -1, 4], "ids of at least 0, got -1"),
        ([3, 7, 7], "no id twice, got 7 again"),
    ):
        other = faiss.IndexIDMap(faiss.IndexFlatIP(8))
        other.add_with_ids(vectors(3, width=8), np.array(ids))
        with pytest.raises(ValueError, match=f"index: expected {message}"):
            from_faiss(other)
    for option in ("metric", "colour"):
        with pytest.raises(TypeError, match=option):
            from_faiss(faiss.IndexFlatIP(8), **{option: "l2"})
    with pytest.raises(ValueError, match="dims: expected the last to be 8, got 4"):
        from_faiss(faiss.IndexFlatIP(8), (2, 4))


@pytest.mark.parametrize("metric", native.METRICS)
def test_out(metric, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK_BYTES", 96 * 4 * 70)
    x, q = vectors(300), vectors(20, seed=1)
    x[7] = 0
    index = MatryoshkaIndex((16, 96), metric=metric)
    index.add(x)
    plain = to_faiss(index)
    terms = native.METRICS[metric]
    assert type(plain) is (faiss.IndexFlatL2 if terms.differences else faiss.IndexFlatIP)
    index.remove(np.array([3, 299]))
    index.update(np.array([5]), x[3:4])
    mapped = index.to_faiss()
    assert type(mapped) is faiss.IndexIDMap2 and mapped.ntotal == 298
    assert faiss.vector_to_array(mapped.id_map).tolist() == index.ids.tolist()
    if terms.normalized:
        norms = np.linalg.norm(mapped.index.reconstruct_n(0, 298), axis=1)
        zero = index.ids.tolist().index(7)
        assert norms[zero] == 0 and np.allclose(np.delete(norms, zero), 1, atol=1e-6)
        q /= np.linalg.norm(q, axis=1, keepdims=True)
    else:
        assert np.array_equal(mapped.reconstruct(5), x[3])
    assert_same_results(index, mapped, q, 10)


@pytest.mark.parametrize("kind", ["Flat", "SQ8"])
def test_there_and_back(kind):
    x = vectors(300)
    other = faiss.index_factory(96, f"IDMap2,{kind}", faiss.METRIC_L2)
    other.train(x)
    other.add_with_ids(x, np.arange(300) * 3)
    back = to_faiss(from_faiss(other))
    assert np.array_equal(back.reconstruct(36), faiss.downcast_index(other.index).reconstruct(12))
    q = vectors(20, seed=1)
    (a, ids), (b, same) = other.search(q, 10), back.search(q, 10)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert (ids == same).mean() > 0.99


def test_it_is_written_as_any_faiss_index(tmp_path):
    index = MatryoshkaIndex((16, 96))
    index.add(torch.from_numpy(vectors(50)), ids=torch.arange(50) + 9)
    faiss.write_index(to_faiss(index), str(tmp_path / "index.faiss"))
    again = from_faiss(faiss.read_index(str(tmp_path / "index.faiss")))
    assert torch.equal(again.ids, index.ids)
    expected = torch.nn.functional.normalize(index.reconstruct(index.ids), dim=1)
    torch.testing.assert_close(again.reconstruct(index.ids), expected, atol=1e-6, rtol=0)


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "mrl_fast.search.index.faiss_flat")
    monkeypatch.delattr("mrl_fast.search.index.faiss_flat")
    with pytest.raises(ImportError, match=r"pip install 'mrl-fast\[faiss\]'"):
        MatryoshkaIndex((8,)).to_faiss()
