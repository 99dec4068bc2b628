"""An index of dtype int8: what it keeps of vectors, and exact answers by that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl_fast import _C, MatryoshkaIndex
from mrl_fast.search.index import scaled, store
from mrl_fast.shared import native
from tests.helpers.coding import CODINGS, coding
from tests.helpers.index_model import TIMES, Answers, Model
from tests.helpers.search import METRICS, held

DIMS = (5, 41)  # rows begin at any byte
FLOAT_MAX = torch.finfo(torch.float32).max


def vectors(rows, seed=0, width=DIMS[-1]):
    """Of sizes that are far apart, a seventh of them equal to others, one 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= 10.0 ** torch.randint(-3, 4, (rows, 1), generator=generator)
    x[::7] = x[torch.randint(0, rows, (len(x[::7]),), generator=generator)]
    x[3:4] = 0
    return x


def built(x, **options):
    index = MatryoshkaIndex(DIMS, dtype="int8", **options)
    index.add(x)
    return index


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("code", CODINGS)
@settings(max_examples=5 * TIMES, deadline=None)
@given(
    rows=st.sampled_from([1, 63, 64, 65, 200, 3000]),
    queries=st.sampled_from([1, 2, 40]),
    k=st.sampled_from([1, 10, 3001]),
    threads=st.sampled_from([1, 2]),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 1 << 20),
)
def test_answers_are_exact_by_what_is_kept(code, metric, rows, queries, k, threads, share, seed):
    x, q = vectors(rows, seed), vectors(queries, seed + 1)
    index, model = built(x, metric=metric, **coding(code)), Model(DIMS[-1])
    model.add(x)
    gone = [i for i in range(rows) if i % 5 == seed % 5]
    index.remove(gone)
    model.remove(gone)
    some = {i for i in model.ids if (i * 2654435761 % 1000) < 1000 * share}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        exact = index.search(q, k, exact=True)
        Answers(index, model, q).check_exact(exact)
        allowed = torch.tensor(sorted(some), dtype=torch.int64)
        few = index.search(q, k, exact=True, allowed=allowed)
        Answers(index, model, q, some).check_exact(few)
        everything = index.search(q, rows, exact=True)
        threshold = float(everything.scores[0, len(index) // 3]) if len(index) else 0.0
        found = index.range_search(q, threshold)
        Answers(index, model, q).check_range(found, everything, threshold)
        if metric != "ip":  # whose sizes differ so much that fp32 tells few apart
            stages = [(5, rows + k), (DIMS[-1], k)]
            Answers(index, model, q).check_staged(index.search(q, k, stages=stages))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("code", CODINGS)
def test_what_is_kept(code):
    x = vectors(500)
    x[10] *= 1e-38 / x[10].abs().max()  # its scale would be subnormal
    x[11] *= 2.5e-36 / x[11].abs().max()
    x[12] = x[12].sign() * FLOAT_MAX
    kept = built(x, **coding(code)).reconstruct(range(500))
    largest = x.abs().amax(dim=1, keepdim=True)
    few = torch.arange(500) != 10
    assert ((kept - x).abs() <= 0.5001 * (largest / 127))[few].all()
    assert not kept[3].any() and not kept[10].any() and kept[11].any()
    assert kept.isfinite().all() and (kept[12].abs() >= 0.999999 * FLOAT_MAX).all()


def test_each_code_is_multiplied_by_its_rows_scale_and_rounded(monkeypatch):
    """By every instruction set, wherever a row is read: three times a column is its own score."""
    x = vectors(300)
    q = 3 * torch.eye(DIMS[-1])
    values = held(x, "int8")
    right, single = (3 * values.double()).float().T, (3 * values).T
    for isa in _C.available():
        monkeypatch.setattr(native, "ISA", isa)
        for code in CODINGS:
            index = built(x, metric="ip", **coding(code))
            assert torch.equal(index.reconstruct(range(300)), values)
            for queries in (q, q[:1]):
                for how, expected in (
                    ({"exact": True}, right),
                    ({"stages": [(5, 300), (41, 300)]}, single),
                    ({"stages": [(41, 300)]}, single),
                    ({"stages": [(41, 7)]}, single),
                ):
                    k = 7 if how == {"stages": [(41, 7)]} else 300
                    found = index.search(queries, k, **how)
                    mine = expected[: len(queries)]
                    assert torch.equal(found.scores, mine.gather(1, found.ids))
                    best = mine.sort(dim=1, descending=True).values[:, :k]
                    assert torch.equal(found.scores, best)


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16", "numpy", "strided"])
def test_vectors_of_any_dtype_are_rounded_from_fp32(kind):
    x = vectors(100)
    given = {
        "numpy": lambda: x.double().numpy(),
        "strided": lambda: torch.cat([x, x], dim=1)[:, : DIMS[-1]],
    }.get(kind, lambda: x.to(getattr(torch, kind)))()
    once, rounded = built(given), torch.as_tensor(given).float()
    assert torch.equal(once.reconstruct(range(100)), held(rounded, "int8"))


@pytest.mark.parametrize("large", [1e39, -1e300])
def test_values_beyond_fp32_are_refused(large):
    x = vectors(3).double()
    x[1, 7] = large
    with pytest.raises(ValueError, match="vectors as float32: expected finite values"):
        built(x)


def test_one_row_at_any_byte():
    index = built(vectors(20))
    rows, right = index._rows.snapshot.blocks[0].suffix, index.reconstruct(range(20))
    for i in range(20):
        assert torch.equal(scaled.values(rows[i : i + 1]), right[i : i + 1])
    assert scaled.values(rows[:0]).shape == (0, DIMS[-1])


def stored(index):
    """Rows by id, as they lie in memory."""
    now = index._rows.snapshot
    rows = [block.suffix[:n] for block, n in zip(now.blocks, now.counts, strict=True)]
    alive = now.live_rows(0, now.count)
    return dict(zip(index.ids.tolist(), torch.cat(rows)[alive].unbind(), strict=True))


def assert_same_rows(index, rows):
    there = stored(index)
    assert all(torch.equal(there[i], rows[i]) for i in there)


@pytest.mark.parametrize("code", CODINGS)
def test_rows_that_move_keep_their_bits(code, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_ROWS", (192, 64))
    index = built(vectors(700), **coding(code))
    rows = stored(index)
    index.remove(range(0, 700, 3))
    index.compact()
    assert len(stored(index)) == len(index)
    assert_same_rows(index, rows)
    index.save(tmp_path)
    again = MatryoshkaIndex.load(tmp_path, verify=True)
    assert_same_rows(again, rows)
    again.add(vectors(5, seed=2))  # which writes the rows of the last tile anew
    rows.update({i: row for i, row in stored(again).items() if i >= 700})
    again.update([1], vectors(1, seed=3))
    rows[1] = stored(again)[1]
    again.remove(range(2, 700, 3))
    again.compact()
    assert_same_rows(again, rows)
    again.save(tmp_path)
    assert_same_rows(MatryoshkaIndex.load(tmp_path, verify=True), rows)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("code", CODINGS)
def test_a_graph_over_rows_of_codes(code, metric, tmp_path):
    generator = torch.Generator().manual_seed(4)
    few = torch.randn(6, DIMS[-1], generator=generator)  # of which all vectors are sums, nearly
    x, q = (torch.randn(n, 6, generator=generator) @ few for n in (3000, 40))
    x += 0.1 * torch.randn(x.shape, generator=generator)
    if metric == "cosine":  # whose scores are the same for vectors of any size
        x *= 10.0 ** torch.randint(-3, 4, (len(x), 1), generator=generator)
    index = built(x, metric=metric, **coding(code))
    index.build_graph(progress=False)
    stages = [("graph", 64, 20), (DIMS[-1], 10)]
    found, right = index.search(q, 10, stages=stages), index.search(q, 10, exact=True)
    hits = (found.ids[:, :, None] == right.ids[:, None, :]).any(dim=2)
    assert hits.float().mean() >= 0.9
    same = found.ids == right.ids
    torch.testing.assert_close(found.scores[same], right.scores[same], rtol=1e-4, atol=1e-4)
    index.save(tmp_path)
    again = MatryoshkaIndex.load(tmp_path, verify=True).search(q, 10, stages=stages)
    assert torch.equal(again.ids, found.ids) and torch.equal(again.scores, found.scores)


def test_bytes_a_row():
    x = torch.randn(4096, 256)  # fills its blocks
    sizes = []
    for dtype in ("float32", "int8"):
        index = MatryoshkaIndex((64, 256), dtype=dtype)
        index.add(x)
        sizes.append(index.nbytes)
    assert sizes[1] <= 0.3 * sizes[0]
    assert sizes[1] / 4096 <= 256 + 4 + 8 + 4 * 6  # codes, scale, id, norms
