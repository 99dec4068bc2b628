"""tune's time: what it leaves out for it and says so, and how it chooses among lists as fast."""

import math
from statistics import median

import pytest
import torch

from mrl_fast.search.index import timing
from mrl_fast.search.index.timing import Budget, as_fast, first_look, in_turn
from mrl_fast.search.index.tuning import (
    CHEAPER,
    ENOUGH,
    MIN_QUERIES,
    PASSED,
    PLANNED,
    PROBE,
    SLOW,
    Sample,
    _affordable,
    _chains,
    _checked,
    tune,
)
from tests.helpers.tuning import Clock, clustered

LISTS = 4 * 8  # of 1,000 rows in four dims


@pytest.fixture(scope="module")
def data():
    return clustered(queries=2000)


@pytest.fixture(scope="module")
def whole(data):
    """The report where time is no matter."""
    with pytest.MonkeyPatch.context() as patch:
        Clock(patch)
        return tune(data[0], data[1][:512], 10, 0.9, seconds=math.inf, progress=False)


def seconds_of(query_ticks, queries=512):
    return queries * query_ticks / (1 << 30)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6])
def test_what_the_time_leaves_out_is_said_and_never_accepted(data, whole, monkeypatch, share):
    index, queries = data
    clock = Clock(monkeypatch)
    seconds = share * whole.seconds
    report = tune(index, queries[:512], 10, 0.9, seconds=seconds, progress=False)
    why = {why: n for n, why in report.untried}
    late = why.get(PASSED, 0) + why.get(f"as the time was up (seconds={seconds:g})", 0)
    assert late > 0 and sum(why.values()) + len(report.rows) - 1 == LISTS
    assert len(report.rows) < len(whole.rows)
    for n, reason in report.untried:
        assert f"not tried: {n} list{'s' * (n > 1)} {reason}" in str(report)
    if "512 queries" in report.note:
        known = {str(row.stages): row for row in whole.rows}
        for row in report.rows:  # the next list is a worse one, where others are passed over
            assert row.recall == known[str(row.stages)].recall
            assert row.recall_bound <= known[str(row.stages)].recall_bound
    assert report.seconds == clock.seconds
    # The least there is: exact answers, and how long they take; a list that was begun is finished,
    # and the one after it is judged with it.
    assert report.seconds < seconds + seconds_of(5 * 4000, MIN_QUERIES) + 4 * seconds_of(1032)


def test_with_time_for_all_nothing_is_left_out_for_it(whole):
    assert [why for _, why in whole.untried] == [CHEAPER]
    assert whole.untried[0].lists + len(whole.rows) - 1 == LISTS
    assert whole.note.startswith("For recall@10 of 0.9, shown by 512 queries")


@pytest.mark.parametrize(
    ("fits", "used", "step"),
    [  # so many queries with every list; 512 with so many of the lists, if need be
        (math.inf, 2000, 1),
        (1700, 1700, 1),
        (700, 700, 1),
        (400, ENOUGH, 2),
        (250, ENOUGH, 4),
        (10, MIN_QUERIES, 8),
    ],
)
def test_what_there_is_time_for(data, monkeypatch, fits, used, step):
    index, queries = data
    Clock(monkeypatch, lambda stages: 100 if stages is None else stages[0][0])
    all_lists = 100 + 8 * (8 + 16 + 8)  # without those that take over twice the least
    budget = Budget(seconds_of(all_lists, fits + 0.5) / PLANNED)
    chains = _chains(index, 10)
    sample, exact, walked = _affordable(Sample(index, queries, 1, 2000), chains, budget)
    assert sample.batch == used and torch.equal(sample.queries, queries[:used])
    assert torch.equal(exact.ids, index.search(queries[:used], 1).ids)
    assert walked == [chain[::step] for chain in chains]


def test_a_sample_that_was_cut_is_said(data, monkeypatch):
    Clock(monkeypatch)
    report = tune(*data, seconds=1e-9, progress=False)
    assert report.note.startswith("For recall@10 of 0.99, shown by 256 of 2,000 queries")
    assert report.batch == 256 and report.stages is None
    assert "exact search, as no stage list is shown to reach it in the time" in report.note


def test_the_queries_are_mixed_as_the_first_may_be_alike(data):
    index, queries = data
    mixed = _checked(index, queries, 10, 0.9, None, 0.95).queries
    assert not torch.equal(mixed[:256], queries[:256])
    assert torch.equal(mixed.sort(dim=0).values, queries.sort(dim=0).values)


def test_chains_that_are_several_times_slower_at_their_cheapest_are_left_out(data, monkeypatch):
    index, queries = data
    dims = {8: 100, 16: 100, 32: 300, None: 4000}

    def work(stages):
        return dims[None] if stages is None else dims[stages[0][0]] + stages[0][1] // 100

    clock = Clock(monkeypatch, work)
    report = tune(index, queries[:512], 10, 0.9, batch=1, progress=False)
    assert (8, SLOW) in report.untried
    assert all(row.stages is None or row.stages[0][0] < 32 for row in report.rows)
    slow = [n for stages, n in clock.calls if stages and stages[0][0] == 32]
    assert slow == [PROBE, PROBE, 1, 1, 1, 1, 1]  # twice a few calls: it was no slow spell
    assert sum(n for n, _ in report.untried) + len(report.rows) - 1 == LISTS


def test_recalls_take_large_calls_whatever_the_batch(data, monkeypatch):
    clock = Clock(monkeypatch)
    report = tune(data[0], data[1][:512], 10, 0.9, batch=1, progress=False)
    assert {n for _, n in clock.calls} == {MIN_QUERIES, PROBE, 1}
    assert sum(n == PROBE for _, n in clock.calls) == 2 * 4
    searched = [str(stages) for stages, n in clock.calls if n == MIN_QUERIES]
    assert {searched.count(str(row.stages)) for row in report.rows} == {2}
    # Several times slower: called a few times; the best: as often as there is a round.
    alone = [str(stages) for stages, n in clock.calls if n == 1]
    counts = [alone.count(str(row.stages)) for row in report.rows]
    assert min(counts) == 2 and max(counts) >= 50
    assert all(
        counts[i] <= 3 for i, row in enumerate(report.rows) if row.time_ms > 2 * report.time_ms
    )


def test_among_lists_as_fast_the_one_that_reads_least(data, monkeypatch):
    """Times of one query differ more from call to call than those of two lists."""
    index, queries = data
    spells = 0

    def work(stages):
        nonlocal spells
        spells += 1
        noise = spells * 7919 % 97  # of 1000
        return 9000 if stages is None else 1000 - stages[0][1] // 50 + noise

    Clock(monkeypatch, work)
    report = tune(index, queries[:512], 10, 0.9, batch=1, progress=False)
    accepted = [row for row in report.rows if row.accepted and row.stages]
    assert min(accepted, key=lambda row: row.time_ms).stages != report.stages  # by noise
    least = min(accepted, key=lambda row: row.read_bytes)
    assert report.stages == least.stages
    assert report.time_ms == least.time_ms


@pytest.fixture
def calls(monkeypatch):
    """Searches by number, the ticks of whose rounds are given, and the order of all calls."""
    now, order = 0.0, []

    def made(rows):
        def call(i):
            def search(number):
                nonlocal now
                order.append(i)
                now += rows[i][number % len(rows[i])]

            return search

        return [call(i) for i in range(len(rows))], order

    monkeypatch.setattr(timing, "clock", lambda: now)
    return made


def test_a_first_look_is_short_where_a_call_is_slow(calls):
    (slow, mixed), order = calls([[8.0], [8.0, 3.0, 1.0]])
    assert first_look(slow, 2000.0) == [8000.0] * 2 and len(order) == 2
    assert first_look(slow, 4000.0) == [8000.0] * 3
    assert first_look(mixed, 2000.0) == [8000.0, 3000.0, 1000.0]  # one slow call proves nothing


def test_rounds_take_turns_and_drop_what_falls_behind(calls):
    searches, order = calls([[2.0], [9.0, 2.25, 9.0, 9.0, 9.0, 9.0, 9.0], [3.0]])
    rounds = []
    times, left = in_turn(searches, 7, Budget(math.inf), lambda: rounds.append(0))
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1] + [0, 1, 2, 1, 2, 0] + [1, 0, 0, 1]
    assert left == [0, 1] and len(rounds) == 7  # 1 was near once, 2 never
    assert [len(mine) for mine in times] == [7, 7, 5] and median(times[2]) == 3000


def test_rounds_end_with_the_time_and_are_whole(calls):
    searches, order = calls([[2.0], [2.0], [2.0]])
    times, left = in_turn(searches, 9, Budget(16.0), list)  # 8 calls: the third round is not whole
    assert [len(mine) for mine in times] == [2, 2, 2] and left == [0, 1, 2]
    times, left = in_turn(searches, 9, Budget(3.0), list)  # two calls: the most promising
    assert [len(mine) for mine in times] == [1, 1, 0] and left == [0, 1]
    times, left = in_turn(searches, 9, Budget(1e-9), list)  # at least one
    assert [len(mine) for mine in times] == [1, 0, 0] and left == [0]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([[5, 5, 5, 5], [5, 5, 5, 5]], [0, 1]),
        ([[5, 5, 5, 5], [6, 6, 6, 6]], [0]),
        ([[5, 5, 5, 5], [6, 6, 6, 5]], [0, 1]),  # in a quarter of the rounds
        ([[5] * 8, [6] * 7 + [5]], [0]),  # in an eighth
        ([[5] * 4, [7, 7, 7, 5]], [0]),  # the median is not near
        ([[7, 3, 5, 5], [6, 6, 6, 6]], [0, 1]),
        ([[6], [5]], [1]),
    ],
)
def test_as_fast_by_what_their_times_tell(times, expected):
    assert as_fast(times, [*range(len(times))]) == expected
