"""An index by pickle, copy, torch.save and a spawned process: the same answers, and its own."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.index import store
from mrl_fast.shared.types import Tuned
from tests.helpers.index_model import (  # noqa: F401
    DIMS,
    assert_same,
    build,
    change,
    names,
    one_thread,
    quick,
    vectors,
)

pytestmark = pytest.mark.usefixtures("quick")
Q = vectors(5, DIMS[-1], 9)
STAGES = [(DIMS[0], 40), (DIMS[1], 4)]


def saved_by_torch(index):
    file = io.BytesIO()
    torch.save({"index": index}, file)
    file.seek(0)
    return torch.load(file, weights_only=False)["index"]


WAYS = {
    "pickle": lambda index: pickle.loads(pickle.dumps(index)),
    "protocol 2": lambda index: pickle.loads(pickle.dumps(index, protocol=2)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": saved_by_torch,
}
OPTIONS = [
    {},
    {"prefix_dtype": "int8", "rotation": "pca", "dtype": "bfloat16", "metric": "l2"},
    {"dtype": "float16", "metric": "ip"},
]


def assert_answers_equal(one, other):
    assert repr(one) == repr(other) and one.tuned == other.tuned
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.reconstruct(one.ids), other.reconstruct(one.ids))
    for stages in (None, STAGES):
        a, b = (index.search(Q, 4, stages=stages) for index in (one, other))
        assert torch.equal(a.scores, b.scores) and torch.equal(a.ids, b.ids)


@pytest.mark.parametrize("rows", [0, 1, 64, 150, 700])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_and_independent(way, options, rows, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_ROWS", (192, 64))
    index, model = build(rows, **options)
    if rows > 100:
        change(index, model)
    index._tuned = Tuned(STAGES, 4, len(index))
    other, its = WAYS[way](index), model.copy()
    assert_same(other, its)
    assert_answers_equal(index, other)
    x = vectors(3, DIMS[-1], 20)  # to the tile that both read
    index.add(x)
    model.add(x)
    WAYS[way](other)
    if rows:
        assert_same(index, model)
    for one, of, seed in ((other, its, 21), (index, model, 22), (other, its, 23)):  # in turns
        x = vectors(70, DIMS[-1], seed)
        one.add(x)
        of.add(x)
        one.remove(of.ids[:2])
        of.remove(of.ids[:2])
    if rows and "dtype" not in options:
        assert_same(index, model)
        assert_same(other, its)
    assert index.ids.tolist() == model.ids and other.ids.tolist() == its.ids
    other.compact()
    assert index.ids.tolist() == model.ids


def test_nothing_else_of_our_memory_is_pickled():
    index = MatryoshkaIndex(DIMS)
    index.add(vectors(70, DIMS[-1], 0))
    block = index._rows.snapshot.blocks[0]
    for x in block.arrays.values():  # rows 70 and on, of 1024
        x.view(torch.uint8).reshape(-1)[-8:] = torch.tensor([*b"a secret"], dtype=torch.uint8)
    block.suffix[70:] = 7e33
    block.tiles["packed"][1, :, 6:] = 7e33
    data = pickle.dumps(index)
    assert b"a secret" not in data
    assert torch.tensor([7e33]).numpy().tobytes() not in data
    assert len(data) < 128 * (4 * 20 + 8 + 4 * 8) + 2000


def test_a_loaded_index_is_its_folder(tmp_path):
    index, model = build(3000)
    index.save(tmp_path)
    assert len(pickle.dumps(index)) > 3000 * 80  # it is in memory
    loaded = MatryoshkaIndex.load(tmp_path)
    data = pickle.dumps(loaded)
    assert len(data) < 1000
    assert_same(pickle.loads(data), model)
    loaded.remove(loaded.ids[:1])
    model.remove(model.ids[:1])
    loaded.save(tmp_path)  # the next generation
    assert len(pickle.dumps(loaded)) < 1000
    assert_same(pickle.loads(pickle.dumps(loaded)), model)
    with pytest.raises(
        ValueError, match=r"when .* pickled \(generation 1\), got generation 2.*: pickle"
    ):
        pickle.loads(data)
    kept = pickle.dumps(copy.copy(loaded))
    assert len(kept) < 1000
    change(loaded, model)
    assert len(pickle.dumps(loaded)) > 3000 * 80
    assert_same(pickle.loads(pickle.dumps(loaded)), model)
    tuned = MatryoshkaIndex.load(tmp_path)
    tuned._tuned = Tuned(STAGES, 4, len(tuned))
    assert pickle.loads(pickle.dumps(tuned)).tuned == tuned.tuned
    elsewhere = MatryoshkaIndex.load(tmp_path)
    elsewhere.save(tmp_path / "elsewhere")
    assert len(pickle.dumps(elsewhere)) > 3000 * 80
    for file in tmp_path.glob("*.*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=f"path: expected a folder .*, got {tmp_path}"):
        pickle.loads(kept)


def test_a_copy_saves_where_the_original_was_saved(tmp_path):
    index, model = build()
    index.save(tmp_path)
    other, its = copy.copy(index), model.copy()
    change(other, its)
    other.save(tmp_path)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), its)
    assert "rows-00000001.safetensors" in names(tmp_path)  # only what is new was written
    with pytest.raises(ValueError, match="which another has saved"):
        index.save(tmp_path)


def test_another_versions_pickle():
    state = {**MatryoshkaIndex(DIMS).__getstate__(), "version": 5}
    with pytest.raises(ValueError, match="version: expected 1 or 2 or 3 or 4, got a pickle of 5"):
        MatryoshkaIndex.__new__(MatryoshkaIndex).__setstate__(state)


def best(index, queries):
    return index.search(queries, 3).ids


@pytest.mark.parametrize("from_folder", [False, True])
def test_a_spawned_pool(from_folder, tmp_path):
    index, _ = build(prefix_dtype="int8")
    if from_folder:
        index.save(tmp_path)
        index = MatryoshkaIndex.load(tmp_path)
    expected = best(index, Q.numpy())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert (pool.apply(best, (index, Q.numpy())) == expected).all()
    assert (best(index, Q.numpy()) == expected).all()  # its memory was not given away
