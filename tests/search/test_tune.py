"""tune: what it accepts holds on queries it has not seen, and its choice follows from the times."""

import math
import re
import sys

import numpy as np
import pytest
import torch

from mrl_fast import MatryoshkaIndex, SearchResult
from mrl_fast.search.index.config import IndexConfig
from mrl_fast.search.index.cost import explain
from mrl_fast.search.index.tuning import _chains, _losses, _lower_bound, _walk, tune

DIMS = (8, 16, 32, 64)


class Shape:
    """What counting asks of an index."""

    def __init__(self, rows, dims, dtype="float32", prefix_dtype="float32"):
        self.rows, self.dims, self.device = rows, dims, "cpu"
        self.config = IndexConfig(dims, "ip", dtype, prefix_dtype)

    def __len__(self):
        return self.rows


def clustered(rows=1000, queries=2600, prefix_dtype="float32"):
    """An index of clustered vectors whose variance falls along the columns, and queries."""
    generator = torch.Generator().manual_seed(0)

    def noise(n):
        return torch.randn(n, 64, generator=generator) / (1 + torch.arange(64) / 4).sqrt()

    def pick(x, n):
        return x[torch.randint(len(x), (n,), generator=generator)]

    x = pick(noise(100), rows) + 0.6 * noise(rows)
    index = MatryoshkaIndex(DIMS, prefix_dtype=prefix_dtype)
    index.add(x)
    return index, pick(x, queries) + 0.3 * noise(queries)


def calls_ms(work):
    """Stands in for the clock: a list takes what ``work`` says of it."""
    return lambda search, part, lists: [work(stages) for stages in lists]


def cost(stages):  # of the first stage little, of each row kept much; exact search last
    return 1e6 if stages is None else stages[0][0] + stages[0][1]


@pytest.fixture
def by_cost(monkeypatch):
    monkeypatch.setattr("mrl_fast.search.index.tuning._calls_ms", calls_ms(cost))


@pytest.fixture(scope="module")
def data():
    return clustered()


def recall_of(index, queries, k, stages):
    exact = index.search(queries, k, exact=True).ids.tolist()
    found = index.search(queries, k, stages=stages).ids.tolist()
    hits = [len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)]
    return sum(hits) / (k * len(queries))


@pytest.mark.parametrize(("prefix_dtype", "target"), [("float32", 0.99), ("int8", 0.9)])
def test_every_accepted_list_reaches_the_target_on_held_out_queries(by_cost, prefix_dtype, target):
    index, queries = clustered(prefix_dtype=prefix_dtype)
    report = tune(index, queries[:512], recall=target, batch=256, progress=False)
    lists = [row for row in report.rows if row.stages]
    assert {row.accepted for row in lists} == {True, False}
    held_out = [recall_of(index, queries[600:], 10, row.stages) for row in lists if row.accepted]
    assert min(held_out) >= target
    for row in lists:
        assert row.recall == pytest.approx(recall_of(index, queries[:512], 10, row.stages))
        assert row.recall_bound < row.recall and row.accepted == (row.recall_bound >= target)


def test_the_choice_is_the_fastest_accepted(data, by_cost):
    index, queries = data
    report = tune(index, queries[:512], progress=False)
    chosen = min((row for row in report.rows if row.accepted), key=lambda row: cost(row.stages))
    assert report.stages == chosen.stages and report.time_ms == cost(report.stages) < 1e6
    assert report.recall_bound >= 0.99 == report.target
    assert (report.recall, report.recall_bound) == (chosen.recall, chosen.recall_bound)
    assert report == tune(index, queries[:512], progress=False)
    again = tune(index, queries[:512].double().numpy(), batch=100, progress=False)
    assert again.batch == 100 and again.stages == report.stages
    assert [row[:5] for row in again.rows] == [row[:5] for row in report.rows]


def test_more_queries_allow_cheaper_lists(data, by_cost):
    index, queries = data
    few, many = (tune(index, queries[:n], progress=False).stages for n in (256, 1500))
    assert cost(many) < cost(few)


def test_rows_are_sorted_with_their_work_and_front(data, by_cost):
    index, queries = data
    report = tune(index, queries[:256], batch=8, progress=False)
    times = [row.time_ms for row in report.rows]
    assert times == sorted(times) and len(times) > 5
    for row in report.rows:
        work = explain(index, row.stages or [(64, 10)], 8)
        assert (row.macs, row.read_bytes) == (work.macs, work.read_bytes)
        better = [r for r in report.rows if r.time_ms < row.time_ms and r.recall >= row.recall]
        assert row.pareto == (not better)


def test_exact_search_where_it_is_faster(data, monkeypatch):
    index, queries = data
    work = calls_ms(lambda stages: 0.5 if stages is None else 1.0)
    monkeypatch.setattr("mrl_fast.search.index.tuning._calls_ms", work)
    report = tune(index, queries[:256], recall=0.9, progress=False)
    assert report.stages is None and (report.recall, report.recall_bound) == (1, 1)
    assert report.time_ms == 0.5 and any(row.accepted for row in report.rows if row.stages)
    assert report.note.endswith("exact search")


def test_times_are_medians_of_calls_of_one_batch(data, monkeypatch):
    index, queries = data
    sizes, clock = [], iter([9.0, 2.0, 3.0, 1.0, 5.0])

    def calls(search, part, lists):
        sizes.append(len(part))
        return [next(clock)] * len(lists)

    monkeypatch.setattr("mrl_fast.search.index.tuning._calls_ms", calls)
    report = tune(index, queries[:256], batch=100, progress=False)
    assert sizes == [100] * 5 and {row.time_ms for row in report.rows} == {3.0}


def test_measured_times_are_each_lists_own(data):
    index, queries = data
    report = tune(index, queries[:256], batch=64, progress=False)
    assert len({row.time_ms for row in report.rows}) > 1
    assert all(row.time_ms > 0 for row in report.rows)


@pytest.mark.parametrize(
    ("k", "recall", "note"),
    [
        (10, 1.0, "exact search, as no stage list is shown to reach it"),
        (
            1,
            0.99,
            f"reach it (which takes at least {math.ceil(math.log(4 / 0.05) / 0.01)} queries)",
        ),
        (10, 0.999, "queries)"),
    ],
)
def test_a_target_out_of_reach_gives_exact_search(data, by_cost, k, recall, note):
    index, queries = data
    report = tune(index, queries[:256], k, recall, progress=False)
    assert report.stages is None and report.note.endswith(note)
    assert [row.accepted for row in report.rows if row.stages] == [False] * 4  # one a chain


def test_fewer_rows_than_k(by_cost):
    index, queries = clustered(rows=4, queries=300)
    report = tune(index, queries, 10, 0.9, progress=False)
    assert report.stages == [(8, 10), (64, 10)] and report.recall == 1


def test_one_width_has_only_exact_search():
    index = MatryoshkaIndex((64,))
    index.add(torch.eye(64))
    report = tune(index, torch.eye(64).repeat(4, 1), 3, progress=False)
    assert report.stages is None and len(report.rows) == 1
    assert report.note.endswith("as no stage list is shown to reach it")


def test_chains_go_from_safe_to_cheap():
    index = Shape(5000, DIMS)
    chains = _chains(index, 10)
    assert [chain[0] for chain in chains] == [
        [(8, 4096), (64, 10)],
        [(16, 4096), (64, 10)],
        [(32, 4096), (64, 10)],
        [(8, 4096), (16, 1024), (64, 10)],
    ]
    assert [stages[0][1] for stages in chains[3]] == [4096 >> i for i in range(9)] + [10]
    assert chains[3][5:] == [
        [(8, keep), (16, 32 if keep == 128 else max(10, keep // 4)), (64, 10)]
        for keep in (128, 64, 32, 16, 10)
    ]
    assert _chains(index, 100)[0][0] == [(8, 5000), (64, 100)]  # 64k, capped at the rows


# Upper 95 % limits of a Poisson mean after 0, 1, … events, as tabled.
LIMITS = (2.996, 4.744, 6.296, 7.754, 9.154)


@pytest.mark.parametrize(
    ("losses", "worst", "events"),
    [
        ([], 0.5, 0.5 * LIMITS[0]),
        ([1.0, 1.0], 1.0, LIMITS[2]),
        ([0.1] * 4, 0.1, 0.1 * LIMITS[4]),
        ([0.1, 1.0], 1.0, LIMITS[1] + 0.1 * (LIMITS[2] - LIMITS[1])),
    ],
)
def test_bound_by_hand(losses, worst, events):
    sample = torch.tensor(losses + [0.0] * (256 - len(losses)), dtype=torch.float64)
    bound = _lower_bound(sample, worst, 0.05)
    assert bound < 1 and bound == pytest.approx(1 - events / 256, abs=1e-4)


def test_bound_of_a_hopeless_list_is_not_negative():
    assert _lower_bound(torch.ones(256, dtype=torch.float64), 1.0, 0.05) == 0


@pytest.mark.parametrize("loss", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("n", [512, 1024])
def test_bound_covers_the_mean(loss, n):
    generator = torch.Generator().manual_seed(n)
    events = torch.rand(1000, n, generator=generator) < 0.01 / loss  # their mean loss is 0.01
    samples = events.double() * loss
    wrong = [_lower_bound(x, max(0.5, float(x.max())), 0.05) > 0.99 for x in samples]
    student = samples.mean(1) + 1.65 * samples.std(1) / math.sqrt(n) < 0.01
    assert np.mean(wrong) <= 0.05 < student.double().mean()


def losses_like(*values, n=512):
    """Per list one sample: so many queries lose so much."""
    for count, loss in values:
        yield torch.tensor([loss] * count + [0.0] * (n - count), dtype=torch.float64)


def test_walk_stops_at_the_first_failure():
    lists = losses_like((0, 0.0), (5, 0.1), (300, 0.1), (0, 0.0), (0, 0.0))
    results = list(_walk(lists, 0.99, 0.05, 0.5))
    assert [bound >= 0.99 for _, bound in results] == [True, True, False]
    assert [mean for mean, _ in results] == pytest.approx([1, 1 - 0.5 / 512, 1 - 30 / 512])
    assert len(list(lists)) == 1  # nothing further was searched than one ahead


def test_walk_fears_what_the_next_list_shows():
    def bound(*values):
        return next(_walk(losses_like(*values), 0.9, 0.05, 0.5))[1]

    assert bound((0, 0.0)) == bound((0, 0.0), (3, 0.2)) == pytest.approx(1 - 1.498 / 512, abs=1e-4)
    assert bound((0, 0.0), (1, 1.0)) == pytest.approx(1 - 2.996 / 512, abs=1e-4)
    assert bound((1, 1.0)) == pytest.approx(1 - 4.744 / 512, abs=1e-4)


def test_losses_count_ties_and_nothing_else():
    exact = SearchResult(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[7, 5, 9]]))
    for scores, ids, count, expected in [
        ([3.0, 2.0, 1.0], [7, 5, 9], 3, 0.0),
        ([3.0, 1.0, 0.5], [7, 4, 6], 3, 1 / 3),  # 4 ties with the third
        ([3.0, 1 - 4e-7, 1 - 8e-7], [7, 4, 6], 3, 1 / 3),  # 4 by rounding, 6 not
        ([3.0, 2.0, 0.5], [7, 5, 9], 3, 0.0),  # a neighbour, whatever its score
        ([3.0, -math.inf, -math.inf], [7, -1, -1], 3, 2 / 3),
        ([3.0, 2.0, -math.inf], [7, 5, -1], 2, 0.0),
        ([1.0, 0.5, 0.2], [9, 3, 2], 2, 1.0),  # 9 is not among the best two
    ]:
        found = SearchResult(torch.tensor([scores]), torch.tensor([ids]))
        assert _losses(found, exact, count).tolist() == pytest.approx([expected])
    negative = SearchResult(-exact.scores.flip(1), exact.ids)  # −1, −2, −3: l2
    below = SearchResult(torch.tensor([[-1.0, -2.0, -3.000001]]), torch.tensor([[7, 5, 4]]))
    far = SearchResult(torch.tensor([[-1.0, -2.0, -3.1]]), torch.tensor([[7, 5, 4]]))
    assert _losses(below, negative, 3).tolist() == [0]
    assert _losses(far, negative, 3).tolist() == pytest.approx([1 / 3])
    missing = SearchResult(torch.full((1, 1), -math.inf), torch.tensor([[-1]]))
    assert _losses(missing, missing, 1).tolist() == [1]


@pytest.mark.parametrize(
    ("prefix_dtype", "dtype", "stages", "batch", "expected"),
    [  # of 1000 × 32, dims (4, 8, 32): rows, MACs and bytes of each stage
        ("float32", "float32", [(4, 100), (32, 10)], 1, [(1000, 4000, 16000), (100, 2800, 11200)]),
        ("float32", "float16", [(4, 100), (32, 10)], 1, [(1000, 4000, 16000), (100, 2800, 5600)]),
        ("float32", "bfloat16", [(8, 20), (32, 10)], 1, [(1000, 8000, 24000), (20, 480, 960)]),
        ("int8", "float32", [(4, 100), (32, 10)], 1, [(1000, 4000, 4000), (100, 3200, 12800)]),
        ("int8", "float16", [(4, 100), (32, 10)], 1, [(1000, 4000, 4000), (100, 3200, 6400)]),
        ("int8", "float16", [(8, 100), (32, 10)], 1, [(1000, 8000, 16000), (100, 2400, 4800)]),
        ("int8", "float16", [(4, 10)], 1, [(1000, 4000, 8000)]),
        (
            "int8",
            "float32",
            [(4, 100), (8, 20), (32, 10)],
            1,
            [(1000, 4000, 4000), (100, 800, 3200), (20, 480, 1920)],
        ),
        ("float32", "float32", [(4, 100), (32, 10)], 3, [(1000, 4000, 5334), (100, 2800, 11200)]),
        (
            "float32",
            "float32",
            [(4, 9999), (32, 10)],
            1,
            [(1000, 4000, 16000), (1000, 28000, 112000)],
        ),
        ("float32", "float32", [(32, 10)], 1, [(1000, 32000, 128000)]),
    ],
)
def test_explain_by_hand(prefix_dtype, dtype, stages, batch, expected):
    result = explain(Shape(1000, (4, 8, 32), dtype, prefix_dtype), stages, batch)
    assert [row[:2] for row in result.rows] == stages
    assert [row[2:5] for row in result.rows] == expected
    assert result.macs == sum(macs for _, macs, _ in expected)
    assert result.read_bytes == sum(read for *_, read in expected)


def test_explain_shares_and_table():
    result = explain(Shape(1000, (4, 8, 32), "float16"), [(4, 100), (32, 10)])
    assert result.macs_share == 6800 / 32000
    assert result.read_share == 21600 / (1000 * (4 * 4 + 28 * 2))
    lines = str(result).splitlines()
    assert lines[1].split() == ["4", "100", "1,000", "4,000", "16,000"]
    assert lines[3].split() == ["total", "6,800", "21,600"]
    assert lines[4].split() == ["of", "full", "21.25%", "30.00%"]
    assert len({len(line) for line in lines}) == 1
    many = explain(Shape(1000, (4, 8, 32)), [(32, 10)], 10)
    assert many.read_share == many.macs_share == 1  # a full scan's bytes are shared as well
    assert explain(Shape(0, (4, 32)), [(4, 10), (32, 1)]).macs_share == 0


def test_table(data, by_cost):
    index, queries = data
    report = tune(index, queries[:512], progress=False)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == len(report.rows) + 4
    shown = " ".join(f"{dim}:{keep}" for dim, keep in report.stages or [])
    assert lines[0] == f"For recall@10 of 0.99, shown by 512 queries: {shown}"
    (chosen,) = [line for line in lines[3:-1] if line.startswith(">")]
    assert chosen.split()[1:4] == [*shown.split(), f"{report.recall:.4f}"]
    for line, row in zip(lines[3:-1], report.rows, strict=True):
        assert line.endswith("refused") != row.accepted
        assert (line[0] == " ") == (not row.pareto and row.stages != report.stages)


def test_plot(data, by_cost, tmp_path, monkeypatch):
    index, queries = data
    report = tune(index, queries[:256], batch=1, progress=False)
    report.plot(tmp_path / "tune.png")
    picture = (tmp_path / "tune.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot: needs matplotlib: .*mrl-fast\[demo\]"):
        report.plot(tmp_path / "none.png")


def test_progress(data, by_cost, capsys):
    index, queries = data
    report = tune(index, queries[:256])  # chains end early
    shown = capsys.readouterr().err
    done = len(report.rows) - 1 + 5
    assert re.search(rf" {done}/37 ", shown) and shown.endswith("\n")
    tune(index, queries[:256], progress=False)
    assert capsys.readouterr().err == ""


def sample(n=256):
    return torch.eye(64).repeat(n // 64 + 1, 1)[:n]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: tune(i, sample(255)), ValueError, "queries: expected at least 256 .* got 255"),
        (lambda i: tune(i, sample()[0]), ValueError, "queries: expected shape"),
        (lambda i: tune(i, sample()[:, :8]), ValueError, "queries: expected width 64, got 8"),
        (lambda i: tune(i, sample() * math.nan), ValueError, "queries: expected finite"),
        (lambda i: tune(i, [[1.0]]), TypeError, "queries: expected a tensor"),
        (lambda i: tune(i, sample(), 0), ValueError, "k: expected an integer >= 1, got 0"),
        (lambda i: tune(i, sample(), recall=0), ValueError, r"recall: .* in \(0, 1\], got 0"),
        (lambda i: tune(i, sample(), recall=1.1), ValueError, r"recall: .* in \(0, 1\], got 1.1"),
        (lambda i: tune(i, sample(), recall=math.nan), ValueError, "recall: .* got nan"),
        (lambda i: tune(i, sample(), batch=0), ValueError, r"batch: .* in \[1, 256\], got 0"),
        (lambda i: tune(i, sample(), batch=257), ValueError, r"batch: .* in \[1, 256\], got 257"),
        (lambda i: tune(i, sample(), confidence=1), ValueError, r"confidence: .* got 1"),
        (lambda i: tune(i, sample(), confidence=0.4), ValueError, r"confidence: .* got 0.4"),
        (
            lambda i: tune(MatryoshkaIndex(DIMS), sample()),
            ValueError,
            "index: expected vectors .* got none",
        ),
        (lambda i: explain(i, [(9, 5)]), ValueError, r"stages\[0\] dim: expected one of .* got 9"),
        (lambda i: explain(i, []), ValueError, "stages: expected at least one"),
        (lambda i: explain(i, [(8, 5)], 0), ValueError, "batch: expected an integer >= 1, got 0"),
    ],
)
def test_bad_input(data, call, error, message):
    with pytest.raises(error, match=message):
        call(data[0])
