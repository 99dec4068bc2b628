"""Stages that rank a shortlist by more bits of every column, against what an index's arrays say."""

import numpy as np
import pytest
import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.index.tuning import _chains
from mrl_fast.shared import native
from mrl_fast.shared.native import METRICS as TERMS
from mrl_fast.shared.native import TILE, Stat
from mrl_fast.shared.types import Tuned
from tests.helpers.search import METRICS
from tests.search.test_codes import DIMS, nested

D = DIMS[-1]
CHAINS = [
    [(D, 1, 150), (D, 8, 20), (D, 10)],
    [(48, 1, 150), (D, 4, 40), (D, 10)],
    [(48, 1, 150), (D, 4, 40), (D, 8, 12), (48, 11), (D, 10)],
    [(D, 4, 60), (D, 8, 12), (D, 10)],
    [(16, 1, 9999), (D, 4, 11), (D, 10)],  # all rows, by four bits that lie in tiles
    [(D, 4, 9999), (D, 8, 11), (D, 10)],
    [(16, 1, 9999), (D, 8, 9999), (48, 30), (D, 10)],  # codes that drop none
]


def made(metric, rows=1500, centre=0.0, dtype="float32"):
    """An index in several blocks, every ninth vector a copy of another."""
    index = MatryoshkaIndex(DIMS, metric=metric, dtype=dtype, codes="bits")
    x = nested(rows, centre=centre)
    x[1::9] = x[::9][: len(x[1::9])]
    x[5] = 0
    for part in x.split(rows // 3 + 1):
        index.add(part)
    return index


def code_scores(index, q, bits):
    """Of every row by the first bits of its codes, ``[B, rows]`` fp32 of fp64, up to what a query
    adds to all."""
    now, terms = index._rows.snapshot, TERMS[index.metric]
    centre = index._rows.layout.centre
    q64, c = q.double().numpy(), np.zeros(D) if centre is None else centre.double().numpy()
    less = q.numpy() - c.astype(np.float32)
    largest = np.abs(less).max(axis=1, keepdims=True)
    query = np.rint(less * (np.float32(127) / largest)).astype(np.float64)
    scale = (largest / np.float32(127)).astype(np.float64)
    scores = []
    for block, count in zip(now.blocks, now.counts, strict=True):
        nibbles, lows = (block.arrays[name].numpy() for name in ("nibbles", "lows"))
        tiles, steps = nibbles.shape[:2]
        first = np.stack([nibbles & 15, nibbles >> 4], axis=3)  # [tiles, steps, TILE, 2, 4]
        first = first.transpose(0, 2, 1, 3, 4).reshape(tiles * TILE, steps * 8)[:count, :D]
        last = np.concatenate([lows & 15, lows >> 4], axis=2).reshape(tiles * TILE, -1)[:count, :D]
        decoded = first - 7.5 + ((last - 7.5) / 16 if bits == 8 else 0)
        stats = block.stats.double().numpy()[:, :count]
        own = Stat.SIGN_FACTOR + 2 * len(DIMS) - 1  # of all columns
        unit = np.full((len(q), 1), terms.product)
        if terms.normalized:
            squares = np.zeros(len(q), np.float32)
            for column in q.numpy().T:
                squares += column * column
            unit = unit * (1 / np.sqrt(squares)).astype(np.float64)[:, None]
        score = unit * scale * (query @ decoded.T) * stats[Stat.CODE_SCALE]
        if terms.squares:
            score -= terms.squares * stats[own]
        elif centre is not None:
            score += unit * stats[own]
            if terms.normalized:
                score += unit * (q64 @ c - c @ c)[:, None] * stats[own + len(DIMS)]
        scores.append(score.astype(np.float32))
    return np.concatenate(scores, axis=1)


def expected(index, q, stages, allowed=None):
    """``[B, k]`` ids, which are numbers of rows: the first stage's shortlist is the index's own."""
    (dim, bits, keep), *later = stages
    keep = min(keep, len(index))
    found = index.search(q, keep, stages=[(dim, bits, keep), (dim, keep)], allowed=allowed).ids
    rows = [[row for row in row_list if row >= 0] for row_list in found.tolist()]
    for dim, *bits, keep in later:
        if bits:
            scores = code_scores(index, q, bits[0])
        else:
            everything = index.search(q, len(index), stages=[(dim, len(index))])
            scores = torch.zeros(len(q), index._rows.snapshot.count)
            scores = scores.scatter(1, everything.ids, everything.scores).numpy()
        rows = [
            sorted(mine, key=lambda row, s=of_query: (-s[row], row))[:keep]
            for mine, of_query in zip(rows, scores, strict=True)
        ]
    return rows


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("centre", [0.0, 5.0])
def test_shortlists_are_ranked_by_what_codes_stand_for(metric, centre):
    index, q = made(metric, centre=centre), nested(9, 1, centre)
    assert (index._rows.layout.centre is not None) == (centre > 0)
    for stages in CHAINS:
        found = index.search(q, 10, stages=stages)
        assert found.ids.tolist() == expected(index, q, stages)
        plain = index.search(q, 1500, stages=[(D, 1500)])
        scores = torch.zeros(9, 1500).scatter(1, plain.ids, plain.scores)
        assert torch.equal(found.scores, scores.gather(1, found.ids))  # of the vectors


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vectors_of_half_precision(dtype):
    index, q = made("cosine", centre=5.0, dtype=dtype), nested(5, 1, 5.0)
    for stages in CHAINS[:2]:
        assert index.search(q, 10, stages=stages).ids.tolist() == expected(index, q, stages)


def test_filters_and_removed_rows():
    index, q = made("cosine"), nested(9, 1)
    index.remove(range(0, 1500, 7))
    alive = torch.tensor([i for i in range(1500) if i % 7])
    for stages in CHAINS:
        for allowed in (None, alive[alive % 3 == 0]):
            found = index.search(q, 10, stages=stages, allowed=allowed)
            assert found.ids.tolist() == expected(index, q, stages, allowed)
    few = alive[::100]  # which are read themselves: columns take the part of codes
    for first in [(48, 1, 10), (D, 1, 10), (D, 4, 10)]:
        right = index.search(q, 5, stages=[(first[0], 10), (D, 5)][first[0] == D :], allowed=few)
        for later in [(D, 8, 7)], [(D, 8, 7), (16, 7)]:
            found = index.search(q, 5, stages=[first, *later, (D, 5)], allowed=few)
            assert torch.equal(found.ids, right.ids) and torch.equal(found.scores, right.scores)


@pytest.mark.parametrize("rows", [1, 30, 65])
def test_fewer_rows_than_are_kept(rows):
    index, q = MatryoshkaIndex(DIMS, codes="bits"), nested(4, 1)
    index.add(nested(rows))
    plain = index.search(q, 100, stages=[(D, 100)])
    for stages in ([(16, 1, 500), (D, 8, 200), (D, 100)], [(D, 4, 100), (D, 8, 100), (D, 100)]):
        found = index.search(q, 100, stages=stages)
        assert torch.equal(found.ids, plain.ids) and torch.equal(found.scores, plain.scores)
    assert found.ids.ge(0).sum() == 4 * rows


def test_results_depend_on_no_batch_and_no_threads(monkeypatch):
    index, q = made("l2", centre=5.0), nested(70, 1, 5.0)
    for stages in CHAINS:
        monkeypatch.setattr(native, "threads", 1)
        whole = index.search(q, 10, stages=stages)
        single = [index.search(row, 10, stages=stages) for row in q]
        monkeypatch.setattr(native, "threads", 2)
        both = index.search(q, 10, stages=stages)
        for other in (both, type(whole)(*map(torch.cat, zip(*single, strict=True)))):
            assert torch.equal(whole.ids, other.ids) and torch.equal(whole.scores, other.scores)


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([(D, 8, 50), (D, 10)], ValueError, r"stages\[0\] bits: expected one of \(1, 4\), got 8"),
        ([(D, 1, 50), (D, 1, 20), (D, 10)], ValueError, r"stages\[1\] bits: .* \(4, 8\), got 1"),
        (
            [(D, 4, 50), (D, 4, 20), (D, 10)],
            ValueError,
            r"stages\[1\] bits: expected one of \(8,\), more than the stage before has, got 4",
        ),
        ([(D, 1, 50), (D, 8, 20), (D, 4, 20), (D, 10)], ValueError, r"stages\[2\] bits: .* got 4"),
        ([(D, 1, 50), (48, 8, 20), (D, 10)], ValueError, r"stages\[1\] dim: expected 100 where 8"),
        ([(D, 1, 50), (D, 8, 60), (D, 10)], ValueError, "keeps that do not grow"),
        ([(D, 1, 50), (D, 8, 10)], TypeError, "the first ones perhaps"),
        ([(48, 50), (D, 8, 20), (D, 10)], TypeError, "the first ones perhaps"),
        ([(D, 1, 50), (D, 10), (D, 8, 10)], TypeError, "the first ones perhaps"),
        ([(D, 1, 50), (D, "8", 20), (D, 10)], TypeError, r"stages\[1\] bits: expected an integer"),
    ],
)  # fmt: skip
def test_stages_that_are_none(stages, error, message):
    index = made("ip", 100)
    with pytest.raises(error, match=message):
        index.search(nested(1), 10, stages=stages)


def test_what_holds_no_such_codes():
    chain = [(16, 8, 50), (D, 8, 20), (D, 10)]
    int8 = MatryoshkaIndex(DIMS, prefix_dtype="int8")
    device = MatryoshkaIndex(DIMS, codes="bits", device="cuda")
    for index in (int8, device):
        index.add(nested(100))
        with pytest.raises(TypeError, match=r"\(dim, keep\) pairs"):
            index.search(nested(1), 10, stages=chain)


def test_queries_that_a_stage_reads_beyond_its_pairs():
    index, q = made("ip"), nested(3, 1)
    with pytest.raises(ValueError, match=r"stages\[1\] dim: expected at most 48, the queries'"):
        index.search(q[:, :48], 10, stages=[(48, 1, 50), (D, 8, 20), (48, 10)])
    q[1, 90] = float("nan")
    for stages in ([(D, 1, 50), (48, 10)], [(48, 1, 50), (D, 8, 20), (48, 10)]):
        with pytest.raises(ValueError, match="queries: expected finite values, .* row 1"):
            index.search(q, 10, stages=stages)


def test_scores_beyond_fp32():
    index = MatryoshkaIndex(DIMS, metric="l2", codes="bits")
    x = nested(200)
    x[7] *= 1e18
    index.add(x)
    with pytest.raises(ValueError, match="within float32"):
        index.search(1e19 * nested(1), 10, stages=[(16, 1, 200), (D, 8, 200), (D, 10)])


def test_what_each_rung_costs():
    index = made("ip", 1000)
    plan = index.explain([(48, 1, 50), (D, 4, 20), (D, 8, 12), (D, 10)], batch=4)
    assert plan.rows == (
        (48, 50, 1000, 48_000, 1000 * 6 // 4, 1),
        (D, 20, 50, 50 * D, 50 * D // 2, 4),
        (D, 12, 20, 20 * D, 20 * D // 2, 8),  # of four bits more
        (D, 10, 12, 12 * D, 12 * 4 * D, 0),
    )
    assert index.explain([(48, 1, 50), (D, 8, 12), (D, 10)]).rows[1].read_bytes == 50 * D


def test_tune_tries_eight_bits_of_files(tmp_path):
    index = MatryoshkaIndex(DIMS, codes="bits")
    index.add(nested(640))
    in_memory = _chains(index, 10)
    assert all(len(stages) == 2 for chain in in_memory for stages in chain)
    index.save(tmp_path)
    loaded = MatryoshkaIndex.load(tmp_path)
    *chains, rung = _chains(loaded, 10)
    assert chains == in_memory
    keeps = [(640, 160), (320, 80), (240, 60), (160, 40), (120, 30), (80, 20), (60, 20), (40, 20)]
    assert rung == [[(D, 1, keep), (D, 8, few), (D, 10)] for keep, few in [*keeps, (30, 20)]]
    assert len(_chains(loaded, 320)) == 3  # where all that may be kept is left by eight bits
    report = loaded.tune(nested(256, 1), 10, 0.5, seconds=2, progress=False)
    assert len(report.rows) - 1 + sum(left.lists for left in report.untried) == sum(
        map(len, [*chains, rung])
    )


def test_tuned_stages_of_codes_are_saved(tmp_path):
    index, q = made("ip"), nested(5, 1)
    index._tuned = Tuned(CHAINS[2], 10, len(index), 0.9)
    index.save(tmp_path)
    loaded = MatryoshkaIndex.load(tmp_path)
    assert loaded.tuned.stages == CHAINS[2]
    found = loaded.search(q, 10)
    assert found.stages == CHAINS[2]
    assert torch.equal(found.ids, index.search(q, 10, stages=CHAINS[2]).ids)
