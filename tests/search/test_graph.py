"""A graph over rows: what it finds, and that it lives as the rest of an index does."""

import copy
import pickle

import pytest
import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.shared.recall import count_found
from mrl_fast.shared.types import SearchResult, Tuned
from tests.helpers.search import brute_force

D, N = 64, 6000
STAGES = [("graph", 128, 40), (D, 10)]


def nested(count: int, seed: int) -> torch.Tensor:
    """Unit rows whose columns are alike in size, with near ones to be found."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(24, D, generator=torch.Generator().manual_seed(9))
    x = torch.randn(count, 24, generator=generator) @ basis
    x = x + 0.3 * torch.randn(count, D, generator=generator)
    return torch.nn.functional.normalize(x, dim=1)


X, Q = nested(N, 0), nested(200, 1)


def made(rows=X, metric="cosine", **options) -> MatryoshkaIndex:
    index = MatryoshkaIndex((16, D), metric=metric, **options)
    index.add(rows)
    index.build_graph(progress=False)
    return index


def recall(index: MatryoshkaIndex, q=Q, stages=STAGES, k=10, **options) -> float:
    exact = index.search(q, k, exact=True, **options)
    found = index.search(q, k, stages=stages, **options)
    best = SearchResult(exact.scores, exact.ids)
    return float(count_found(found, best, tolerance=1e-6).double().mean()) / k


@pytest.mark.quick
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize(
    "options", [{}, {"codes": "bits"}, {"dtype": "bfloat16", "prefix_dtype": "int8"}]
)
def test_what_it_finds(metric, options):
    generator = torch.Generator().manual_seed(2)
    lengths = 1.0 if metric == "cosine" else 0.5 + torch.rand(N, 1, generator=generator)
    index = made(X * lengths, metric, **options)
    assert recall(index) >= 0.97
    scores, ids = index.search(Q, 10, stages=STAGES)
    x = index.reconstruct(ids.flatten()).view(len(Q), 10, D)
    for b in (0, 7, 199):  # the scores are those of the vectors, best first
        whole = brute_force(Q[b : b + 1], x[b], metric)[0]
        torch.testing.assert_close(scores[b], whole.float(), atol=1e-5, rtol=1e-5)
    assert bool((scores.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("codes", [None, "bits"])
def test_far_from_the_origin(codes):
    """A common mean of ten times the rows' length; the centre of codes leaves what differs."""
    far = 10 / D**0.5
    assert recall(made(X + far, "l2", codes=codes), Q + far) >= 0.97


def test_four_bits_rank_rows_of_a_falling_spectrum():
    """Near ones around centres, whose first columns are far larger than a few deviations."""

    def steep(count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(60, 256, generator=torch.Generator().manual_seed(3))
        own = centres[torch.randint(60, (count,), generator=generator)]
        x = own + 0.3 * torch.randn(count, 256, generator=generator)
        return torch.nn.functional.normalize(x / (1 + torch.arange(256) / 2) ** 0.5, dim=1)

    index = MatryoshkaIndex((64, 256), metric="ip")
    index.add(steep(N, 0))
    index.build_graph(progress=False)
    assert recall(index, steep(200, 1), [("graph", 400, 30), (256, 10)]) >= 0.93


def test_a_longer_beam_finds_more():
    index = made()
    found = [
        recall(index, stages=[("graph", beam, min(beam, 40)), (D, 10)]) for beam in (10, 40, 160)
    ]
    assert found[0] < found[1] < found[2] and found[2] > 0.95


@pytest.mark.quick
def test_the_same_on_any_threads_and_in_any_batch():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = made(codes="bits")
        alone = [one.search(Q[b : b + 1], 10, stages=STAGES) for b in range(20)]
        torch.set_num_threads(2)
        two = made(codes="bits")
    finally:
        torch.set_num_threads(threads)
    graphs = [index._rows.snapshot.graph for index in (one, two)]
    for name, array in graphs[0].arrays.items():
        assert torch.equal(array, graphs[1].arrays[name]), name
    together = two.search(Q, 10, stages=STAGES)
    for b, found in enumerate(alone):
        assert torch.equal(found.ids[0], together.ids[b])
        assert torch.equal(found.scores[0], together.scores[b])


@pytest.mark.quick
@pytest.mark.parametrize("codes", [None, "bits"])
def test_it_lives_with_the_index(tmp_path, codes):
    index = made(codes=codes)
    fresh = recall(index)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    index.remove(order[: N // 5])
    assert index.search(Q, 10, stages=STAGES).ids[:, 0].min() >= 0
    gone = set(order[: N // 5].tolist())
    assert not gone & set(index.search(Q, 10, stages=STAGES).ids.flatten().tolist())
    index.add(nested(N // 5, 4))
    index.update([int(order[-1])], Q[:1])
    assert index.search(Q[:1], 1, stages=STAGES).ids.tolist() == [[int(order[-1])]]
    assert recall(index) >= fresh - 0.005
    before = index.search(Q, 10, stages=STAGES)

    index.save(tmp_path / "index")
    loaded = MatryoshkaIndex.load(tmp_path / "index", verify=True)
    others = [loaded, copy.deepcopy(index)]
    others += [pickle.loads(pickle.dumps(each)) for each in (index, loaded)]
    for other in others:
        found = other.search(Q, 10, stages=STAGES)
        assert torch.equal(found.ids, before.ids) and torch.equal(found.scores, before.scores)
    files = {path.name for path in (tmp_path / "index").iterdir()}
    loaded.add(Q[:1])
    loaded.save(tmp_path / "index")  # what is there of the graph is not written again
    kept = {name for name in files if name.startswith("graph")}
    assert kept and kept <= {path.name for path in (tmp_path / "index").iterdir()}

    index.compact()
    with pytest.raises(ValueError, match=r"stages\[0\]: expected a graph"):
        index.search(Q, 10, stages=STAGES)
    index.save(tmp_path / "index2")
    assert not list((tmp_path / "index2").glob("graph*"))
    index.build_graph(progress=False)
    assert recall(index) >= fresh - 0.005


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_filters(share):
    index = made(codes="bits")
    allowed = torch.rand(N, generator=torch.Generator().manual_seed(5)) < share
    assert recall(index, allowed=allowed) >= 0.93
    ids = index.search(Q, 10, stages=STAGES, allowed=allowed).ids
    assert bool(allowed[ids].all())


@pytest.mark.quick
def test_a_narrow_filter_is_searched_exactly():
    index = made(codes="bits")
    for few in ([5], list(range(0, N, 100)), list(range(0, N, 9))):
        found = index.search(Q, 10, stages=STAGES, allowed=few)
        exact = index.search(Q, 10, exact=True, allowed=few)
        assert found.stages is None and torch.equal(found.ids, exact.ids)


@pytest.mark.quick
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(1, D),
        torch.zeros(3, D),
        torch.ones(3000, D),
        X[:7].repeat(300, 1),
        torch.cat([X[:1] + 1e-6 * X[:500], 100 * X[500:1000]]),
        1e18 * X[:100],
        1e-30 * X[:100],
    ],
    ids=["one", "zeros", "equal", "seven", "islands", "huge", "tiny"],
)
def test_every_row_is_reached(rows, metric):
    """Every live row is found by a beam as long as the index."""
    index = made(rows, metric)
    n = len(rows)
    found = index.search(Q[:2], n, stages=[("graph", 2 * n, n), (D, n)])
    assert found.ids.sort(dim=1).values.tolist() == [list(range(n))] * 2
    first = index.search(Q[:2], 5, stages=[("graph", 32, 16), (D, 5)])
    assert bool((first.ids[:, : min(n, 5)] >= 0).all()) and bool((first.ids[:, n:] == -1).all())


def test_every_row_is_reached_from_the_entries():
    """By edges alone: those that a long beam passes, with no row known beforehand."""
    rows = torch.cat([X[:1] + 1e-6 * X[:500], 100 * X[500:1000], X[7:8].repeat(500, 1)])
    graph = made(rows, "l2")._rows.snapshot.graph
    edges = graph.arrays["edges"].view(torch.int32)
    reached = torch.zeros(len(rows), dtype=torch.bool)
    front = graph.arrays["entries"].view(torch.int32).flatten().long()
    while len(front):
        reached[front] = True
        ahead = edges[front].flatten().long()
        front = ahead[(ahead >= 0) & ~reached[ahead.clamp(min=0)]].unique()
    assert bool(reached.all())


@pytest.mark.quick
def test_edges_lead_to_near_rows_in_other_directions():
    index = made()
    edges = index._rows.snapshot.graph.arrays["edges"].view(torch.int32).long()
    assert bool(((edges >= -1) & (edges < N)).all())
    taken = [row[row >= 0] for row in edges]
    assert all(len(row.unique()) == len(row) for row in taken)
    assert all(n not in row for n, row in enumerate(taken))
    near = torch.stack([X[row].mv(X[n]).mean() for n, row in enumerate(taken[:200])]).mean()
    assert near > X[:200].matmul(X.T).mean() + 0.2
    assert sum(map(len, taken)) / N > 16


@pytest.mark.quick
def test_tune_and_explain():
    index = made()
    report = index.tune(nested(600, 6), 10, 0.9, seconds=3, progress=False)
    walked = [row.stages for row in report.rows if row.stages and row.stages[0][0] == "graph"]
    assert walked and all(stages[1] == (D, 10) for stages in walked)
    cost = index.explain(STAGES)
    assert cost.rows[0].bits == 1 and cost.rows[0].keep == 40 and cost.rows[1].rows == 40
    assert 0 < cost.rows[0].read_bytes < N * 4 * D


@pytest.mark.quick
def test_tuned_stages_lapse_with_the_graph(tmp_path):
    index = made()
    index._tuned = Tuned(STAGES, 10, N, 0.9)
    assert index.search(Q, 10).stages == STAGES
    index.save(tmp_path / "index")
    assert MatryoshkaIndex.load(tmp_path / "index").search(Q, 10).stages == STAGES
    index.remove([0])
    index.compact()
    with pytest.warns(UserWarning, match="graph is gone"):
        assert index.search(Q, 10).stages is None


@pytest.mark.quick
@pytest.mark.parametrize(
    ("stages", "error", "words"),
    [
        ([("graph", 64, 20)], TypeError, "and then at least one"),
        ([("graph", 64), (D, 10)], TypeError, "expected"),
        (
            [("graph", 10, 20), (D, 10)],
            ValueError,
            r"stages\[0\] beam: expected at least its keep of 20",
        ),
        ([("graph", 64, 0), (D, 10)], ValueError, r"stages\[0\] keep"),
        ([("graph", 64, 20), (D, 30)], ValueError, "keeps that do not grow"),
        ([("graph", 1 << 70, 20), (D, 10)], ValueError, r"stages\[0\] beam"),
        ([("graph", 64, 20), (D, 0)], ValueError, r"stages\[1\] keep"),
        ([("graph", 64, 20), (D, 5)], ValueError, "at least k=10"),
        ([("tree", 64, 20), (D, 10)], (TypeError, ValueError), "stages"),
        ([(16, 100), ("graph", 64, 20), (D, 10)], (TypeError, ValueError), "stages"),
    ],
)
def test_bad_stages(stages, error, words):
    with pytest.raises(error, match=words):
        made(X[:300]).search(Q, 10, stages=stages)


@pytest.mark.quick
def test_bad_calls():
    index = MatryoshkaIndex((16, D))
    with pytest.raises(ValueError, match="index: expected 1 to .* got 0"):
        index.build_graph(progress=False)
    index.add(X[:300])
    with pytest.raises(ValueError, match=r"stages\[0\]: expected a graph"):
        index.search(Q, 10, stages=STAGES)
    with pytest.raises(ValueError, match=r"stages\[0\]: expected a graph"):
        index.explain(STAGES)
    index.build_graph(progress=False)
    with pytest.raises(ValueError, match=r"stages\[0\]: expected no graph for queries of width"):
        index.search(Q[:, :16], 10, stages=[("graph", 64, 20), (16, 10)])


@pytest.mark.quick
def test_near_rows_that_may_not_be_found():
    """A walk goes on until as many as are kept may be found, however far they are."""
    index = made(torch.cat([X[:2000] + 5, X[:2000] - 5]), "l2")
    near, q = list(range(2000)), Q[:5] + 5
    far = torch.arange(4000) >= 2000
    for beam in (20, 64):
        stages = [("graph", beam, 20), (D, 10)]
        assert bool((index.search(q, 10, stages=stages, allowed=far).ids >= 2000).all())
    index.remove(near)
    assert bool((index.search(q, 10, stages=[("graph", 20, 20), (D, 10)]).ids >= 2000).all())


@pytest.mark.quick
def test_a_beam_of_any_length():
    index = made(X[:500])
    most = index.search(Q, 10, stages=[("graph", (1 << 62) - 1, (1 << 62) - 1), (D, 10)])
    assert torch.equal(most.ids, index.search(Q, 10, exact=True).ids)


@pytest.mark.quick
def test_stages_that_come_once():
    index = made(X[:500])
    for keep in (40, 20):
        listed = index.search(Q, 10, stages=zip((16, D), (keep, 10), strict=True))
        assert listed.stages == [(16, keep), (D, 10)]


@pytest.mark.quick
def test_a_narrow_filter_by_a_prefix():
    index, few = made(codes="bits"), list(range(50))
    found = index.search(Q, 5, stages=[("graph", 64, 20), (16, 5)], allowed=few)
    assert torch.equal(found.ids, index.search(Q, 5, dim=16, exact=True, allowed=few).ids)


@pytest.mark.quick
def test_compact_keeps_a_graph_whose_rows_stay():
    index = made(X[:300])
    index.add(X[300:400])
    index.remove([350])
    cost = index.explain(STAGES)
    assert cost.rows[0].rows >= 400 and cost.rows[1].rows == 80
    index.compact()
    assert index.search(Q, 10, stages=STAGES).ids.shape == (len(Q), 10)
    index.remove([299])
    index.compact()
    with pytest.raises(ValueError, match=r"stages\[0\]: expected a graph"):
        index.search(Q, 10, stages=STAGES)
