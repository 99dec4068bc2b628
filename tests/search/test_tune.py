"""tune: what it accepts holds on queries it has not seen, and its choice follows from the times."""

import itertools
import math
import re
import sys

import pytest
import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.index.cost import explain
from mrl_fast.search.index.tuning import tune
from tests.helpers.tuning import DIMS, TICK_MS, Clock, clustered, cost


@pytest.fixture
def by_cost(monkeypatch):
    return Clock(monkeypatch)


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
    accepted = [row for row in report.rows if row.accepted]
    chosen = min(accepted, key=lambda row: (cost(row.stages), row.read_bytes))
    assert report.stages == chosen.stages is not None
    assert report.time_ms == 512 * cost(report.stages) * TICK_MS
    assert report.recall_bound >= 0.99 == report.target
    assert (report.recall, report.recall_bound) == (chosen.recall, chosen.recall_bound)
    assert report == tune(index, queries[:512], progress=False)
    again = tune(index, queries[:512].double().numpy(), batch=100, progress=False)
    assert again.batch == 100 and again.stages == report.stages
    assert [row[:3] for row in again.rows] == [row[:3] for row in report.rows]


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
        counted = None, None  # of exact search
        if row.stages:
            work = explain(index, row.stages, 8)
            counted = work.macs, work.read_bytes
        assert (row.macs, row.read_bytes) == counted
        better = [r for r in report.rows if r.time_ms < row.time_ms and r.recall >= row.recall]
        assert row.pareto == (not better)


def test_exact_search_where_it_is_faster(data, monkeypatch):
    index, queries = data
    Clock(monkeypatch, lambda stages: 2 if stages is None else 4)
    report = tune(index, queries[:256], recall=0.9, progress=False)
    assert report.stages is None and (report.recall, report.recall_bound) == (1, 1)
    assert report.time_ms == 512 * TICK_MS
    assert any(row.accepted for row in report.rows if row.stages)
    assert report.note.endswith("exact search")


def test_times_are_medians_of_calls_of_one_batch(data, monkeypatch):
    index, queries = data
    ticks = itertools.cycle([9, 2, 3, 1, 5])
    clock = Clock(monkeypatch, lambda stages: next(ticks))
    report = tune(index, queries[:256], 10, 1.0, batch=100, progress=False)  # exact search alone
    assert report.time_ms == 100 * 3 * TICK_MS and report.stages is None
    assert {size for _, size in clock.calls} == {256, 64, 100}
    assert [stages for stages, _ in clock.calls[-5:]] == [None] * 5


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


def test_table(data, by_cost):
    index, queries = data
    report = tune(index, queries[:512], progress=False)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == len(report.rows) + 5
    shown = " ".join(f"{dim}:{keep}" for dim, keep in report.stages or [])
    assert lines[0] == f"For recall@10 of 0.99, shown by 512 queries: {shown}"
    rows = lines[3:-2]
    (chosen,) = [line for line in rows if line.startswith(">")]
    assert chosen.split()[1:4] == [*shown.split(), f"{report.recall:.4f}"]
    for line, row in zip(rows, report.rows, strict=True):
        assert line.endswith("refused") != row.accepted
        assert (line[0] == " ") == (not row.pareto and row.stages != report.stages)
    assert lines[-1] == "not tried: 17 lists cheaper than a refused one of their chain"


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
        (lambda i: tune(i, ["text"]), TypeError, "queries: expected numbers"),
        (lambda i: tune(i, sample(), 0), ValueError, "k: expected an integer >= 1, got 0"),
        (lambda i: tune(i, sample(), recall=0), ValueError, r"recall: .* in \(0, 1\], got 0"),
        (lambda i: tune(i, sample(), recall=1.1), ValueError, r"recall: .* in \(0, 1\], got 1.1"),
        (lambda i: tune(i, sample(), recall=math.nan), ValueError, "recall: .* got nan"),
        (lambda i: tune(i, sample(), batch=0), ValueError, r"batch: .* in \[1, 256\], got 0"),
        (lambda i: tune(i, sample(), batch=257), ValueError, r"batch: .* in \[1, 256\], got 257"),
        (lambda i: tune(i, sample(), confidence=1), ValueError, r"confidence: .* got 1"),
        (lambda i: tune(i, sample(), confidence=0.4), ValueError, r"confidence: .* got 0.4"),
        (lambda i: tune(i, sample(), seconds=0), ValueError, "seconds: .* above 0, got 0"),
        (lambda i: tune(i, sample(), seconds=math.nan), ValueError, "seconds: .* got nan"),
        (
            lambda i: tune(MatryoshkaIndex(DIMS), sample()),
            ValueError,
            "index: expected vectors .* got none",
        ),
    ],
)
def test_bad_input(data, call, error, message):
    with pytest.raises(error, match=message):
        call(data[0])
