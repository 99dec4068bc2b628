"""ShardedIndex: stages, routes, changes that fail, copies, tuning, threads."""

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl_fast import MatryoshkaIndex, ShardedIndex, set_num_threads
from mrl_fast.shared.types import ExactResult
from tests.search.test_sharded import DIMS, assert_answers_as, assert_same, changed, pair, vectors

CODED = {"codes": "bits"}


def filled(shards, rows=300, **options):
    one, many = pair(shards, **options)
    for index in (one, many):
        index.add(vectors(rows))
    return one, many


@settings(max_examples=40, deadline=None)
@given(
    shards=st.sampled_from([1, 2, 5, 8]),
    rows=st.integers(1, 400),
    k=st.integers(1, 12),
    extra=st.integers(0, 30),
    first=st.sampled_from([(8,), (8, 1), (32, 1), (32, 4)]),
    metric=st.sampled_from(["cosine", "ip", "l2"]),
    seed=st.integers(0, 99),
)
def test_stages_find_no_less(shards, rows, k, extra, first, metric, seed):
    one, many = pair(shards, metric=metric, **CODED)
    x, q = vectors(rows, seed), vectors(8, seed + 100)
    for index in (one, many):
        index.add(x)
    stages = [(*first, k + extra), (32, k)]
    mine, its = many.search(q, k, stages=stages), one.search(q, k, stages=stages)
    assert mine.stages == its.stages == stages
    best = one.search(q, k, stages=[(32, k)])  # every row
    for b in range(len(q)):
        scores = {i: s for i, s in zip(its.ids[b].tolist(), its.scores[b].tolist(), strict=True)}
        found = dict(zip(mine.ids[b].tolist(), mine.scores[b].tolist(), strict=True))
        assert all(found[i] == scores[i] for i in found.keys() & scores.keys())
        true = set(best.ids[b].tolist()) - {-1}
        assert true & scores.keys() <= found.keys()
    if shards == 1:
        assert_same(its, mine)


def test_three_stages_and_graphs_find_as_much():
    one, many = filled(4, 3000, **CODED)
    one.build_graph(progress=False)
    many.build_graph(progress=False)
    q = vectors(200, 1)
    exact = many.search(q, 10).ids
    late = ShardedIndex(DIMS, shards=8, **CODED)  # some of its shards have no graph
    late.add(vectors(3000)[:3])
    late.build_graph(progress=False)
    late.add(vectors(3000)[3:])
    for stages in ([(8, 40), (32, 10)], [(8, 1, 90), (32, 8, 20), (32, 10)], [("graph", 32, 20),
                   (32, 10)]):  # fmt: skip
        hits = [
            sum(len(set(a) & set(b)) for a, b in zip(x.tolist(), exact.tolist(), strict=True))
            for x in (one.search(q, 10, stages=stages).ids, many.search(q, 10, stages=stages).ids)
        ]
        assert hits[1] >= hits[0] > 200
    found = late.search(q, 10, stages=[("graph", 32, 20), (32, 10)])
    assert found.stages[0][0] == "graph"
    assert late.has_graph and not isinstance(found, ExactResult)
    few = [1, 2, 3]
    assert_same(many.search(q, 10, allowed=few, exact=True),
                many.search(q, 10, stages=[("graph", 32, 20), (32, 10)], allowed=few))  # fmt: skip
    with pytest.raises(ValueError, match=r"stages\[0\]: expected a graph: build_graph\(\) first"):
        filled(2, **CODED)[1].search(q, 1, stages=[("graph", 9, 9), (32, 1)])
    with pytest.raises(ValueError, match="index: expected 1 to .* vectors to build a graph over"):
        ShardedIndex(DIMS, shards=2, **CODED).build_graph()


def test_by_id(tmp_path):
    one, many = MatryoshkaIndex(DIMS), ShardedIndex(DIMS, shards=4, route="id")
    changed(one, many)
    assert_answers_as(one, many)
    many.save(tmp_path)
    assert_answers_as(one, ShardedIndex.load(tmp_path, verify=True))
    for number in range(4):  # a shard is an index like any other
        shard = MatryoshkaIndex.load(tmp_path / f"shard-{number:05d}")
        assert len(shard) and bool((shard.ids % 4 == number).all())


def test_empty_shards_and_an_empty_index(tmp_path):
    for rows in (0, 1, 3):
        one, many = filled(8, rows)
        assert_answers_as(one, many) if rows else None
        assert_same(one.search(vectors(4), 3), many.search(vectors(4), 3))
        assert_same(one.range_search(vectors(4), 0.1), many.range_search(vectors(4), 0.1))
        many.save(tmp_path / str(rows))
        loaded = MatryoshkaIndex.load(tmp_path / str(rows), verify=True)
        one.add(vectors(9, 5))
        loaded.add(vectors(9, 5))
        assert_answers_as(one, loaded)


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {**CODED, "rotation": "pca"}], ids=str)
def test_a_change_that_fails_changes_nothing(options):
    one, many = changed(*pair(3, **options))
    bad = vectors(7)
    bad[5] = 1e38 if "dtype" in options else torch.nan
    for call, message in (
        (lambda index: index.add(bad), "vectors"),
        (lambda index: index.update([9, 10, 11, 12, 13, 14, 15], bad), "vectors"),
        (lambda index: index.update([9, 5], bad[:2]), "ids: expected ids of the index, got 5"),
        (lambda index: index.remove([9, 5]), "ids: expected ids of the index, got 5"),
        (lambda index: index.add(bad[:1], [9]), "ids: expected ids that are not in use, got 9"),
        (lambda index: index.add(bad[:2], [2000, 2000]), "ids: expected none twice, got 2000"),
        (lambda index: index.reconstruct([9, 5]), "ids: expected ids of the index, got 5"),
        (lambda index: index.search(bad[:, :9]), "queries: expected width 32"),
        (lambda index: index.search(bad[:2], 0), "k: expected an integer >= 1, got 0"),
        (lambda index: index.search(bad), "queries: expected finite"),
        (lambda index: index.search(bad[:2], allowed=[True]), "allowed: expected a bool for each"),
        (lambda index: index.fit(bad[:3]), "rotation|samples"),
    ):
        if "dtype" in options and "finite" in message:
            continue
        for index in (one, many):
            with pytest.raises(ValueError, match=message):
                call(index)
        assert_answers_as(one, many)
    for index in (one, many):  # after which everything is seen that shards hold
        index.add(vectors(4, 9))
    assert_answers_as(one, many)


def test_a_first_add_that_fails_leaves_no_rotation():
    one, many = pair(3, **CODED, rotation="pca")
    bad, good = vectors(60), vectors(80, 3)
    bad[50] = 3e38
    for index in (one, many):
        with pytest.raises(ValueError, match="vectors: expected"):
            index.add(bad)
        assert index.rotation is None and len(index) == 0
        index.add(good)
    assert torch.equal(one.rotation, many.rotation)
    assert_answers_as(one, many)


def test_what_is_no_index():
    for options, message in (
        ({"shards": 0}, r"shards: expected an integer in \[1, 4096\], got 0"),
        ({"shards": 2, "route": "hash"}, "route: expected one of 'turn', 'id', got 'hash'"),
        ({"shards": 2, "metric": "dot"}, "metric: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            ShardedIndex(DIMS, **options)
    with pytest.raises(TypeError, match="shards: expected an integer, got float"):
        ShardedIndex(DIMS, shards=2.0)


def test_copies(tmp_path):
    one, many = changed(*pair(3))
    many.save(tmp_path)
    loaded = ShardedIndex.load(tmp_path)
    for index in (many, loaded):
        for again in (copy.copy(index), copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
            assert_answers_as(one, again)
            again.remove(again.ids[:3])
            again.add(vectors(5))
            assert_answers_as(one, index)


def test_tuning_and_explaining(tmp_path):
    one, many = filled(2, 3000, **CODED)
    stages = [(8, 1, 50), (32, 10)]
    mine, its = many.explain(stages, batch=4), one.explain(stages, batch=4)
    assert [row.rows for row in mine.rows] == [3000, 100] and mine.rows[0].macs == its.rows[0].macs
    assert mine.macs_share == pytest.approx(mine.macs / (3000 * 32))
    report = many.tune(vectors(400, 1), 5, 0.9, seconds=1, progress=False)
    assert many.tuned.stages == report.stages and report.recall >= 0.9
    many.save(tmp_path)
    loaded = MatryoshkaIndex.load(tmp_path)
    assert loaded.tuned == many.tuned
    found = loaded.search(vectors(9, 2), 3)
    assert found.stages == (report.stages and [*report.stages[:-1], (32, 3)])


def test_threads_and_shards_change_no_bit():
    _, many = filled(4, 2000, **CODED)
    q, found = vectors(70, 1), []
    try:
        for threads in (1, 2, 3, 4):
            set_num_threads(threads)
            found.append((many.search(q, 9), many.range_search(q, 0.4)))
    finally:
        set_num_threads(None)
    for nearest, within in found[1:]:
        assert_same(found[0][0], nearest)
        assert_same(found[0][1], within)


def test_a_search_sees_one_state():
    """Vectors of all shards are replaced at once: nobody sees some of them only."""
    many = ShardedIndex(DIMS, shards=4, metric="ip")
    many.add(torch.ones(8, 32))
    stop, wrong = threading.Event(), []

    def look():
        while not stop.is_set():
            scores = many.search(torch.ones(1, 32), 8).scores.unique()
            if len(scores) != 1:
                wrong.append(scores)

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for i in range(2, 150):
            many.update(range(8), torch.full((8, 32), float(i)))
            if i % 40 == 0:
                many.compact()
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong
