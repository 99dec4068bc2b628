"""Codes of every column: stages by one and by four bits, what they cost, and data that are hard for
codes. Exact search by them is in test_exact.py and test_worst_cases.py."""

import weakref

import pytest
import torch

from mrl_fast import _C, MatryoshkaIndex
from mrl_fast.shared import native
from tests.helpers.coding import whole_tiles
from tests.helpers.search import METRICS, brute_force

DIMS = (16, 48, 100)  # no multiples of a step


def nested(rows, seed=0, centre=0.0):
    """Clustered vectors whose energy is spread evenly, as a Matryoshka loss leaves it."""
    generator = torch.Generator().manual_seed(9)
    centres = torch.randn(50, DIMS[-1], generator=generator)
    offset = centre * torch.randn(DIMS[-1], generator=generator)
    generator.manual_seed(seed)
    chosen = torch.randint(50, (rows,), generator=generator)
    return centres[chosen] + 0.8 * torch.randn(rows, DIMS[-1], generator=generator) + offset


def recall(index, queries, stages):
    right = index.search(queries, 10, exact=True).ids
    found = index.search(queries, 10, stages=stages).ids
    return (found[:, :, None] == right[:, None, :]).any(1).float().mean().item()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("centre", [0.0, 5.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_few_bits_of_all_columns_rank_well(dtype, centre, metric):
    index = MatryoshkaIndex(DIMS, metric=metric, dtype=dtype, codes="bits")
    index.add(nested(6000, centre=centre))
    q = nested(64, 1, centre)
    assert recall(index, q, [(100, 1, 200), (100, 10)]) > 0.97
    assert recall(index, q, [(100, 4, 20), (100, 10)]) > 0.95
    assert recall(index, q, [(48, 1, 600), (100, 10)]) > 0.8


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_stages_are_those_of_columns(metric):
    x, q = nested(500), nested(7, 1)
    index = MatryoshkaIndex(DIMS, metric=metric, codes="bits")
    index.add(x)
    for first in [(100, 1, 500), (16, 1, 500), (100, 4, 500)]:  # which drops no row
        found = index.search(q, 500, stages=[first, (48, 500)])
        plain = index.search(q, 500, stages=[(48, 500)])
        assert torch.equal(found.ids, plain.ids) and torch.equal(found.scores, plain.scores)


def test_filters_and_removed_rows():
    x, q = nested(3000), nested(9, 1)
    index = MatryoshkaIndex(DIMS, metric="ip", codes="bits")
    index.add(x)
    index.remove(range(0, 3000, 7))
    alive = torch.tensor([i for i in range(3000) if i % 7])
    for allowed in (alive, alive[alive % 3 == 0], alive[::100]):
        right = allowed[brute_force(q, x[allowed], "ip").topk(5).indices]
        found = index.search(q, 5, stages=[(100, 1, len(allowed)), (100, 5)], allowed=allowed)
        assert torch.equal(found.ids, right)
        assert torch.equal(index.search(q, 5, exact=True, allowed=allowed).ids, right)


@pytest.mark.parametrize("metric", METRICS)
def test_an_outlier_column(metric):
    x, q = nested(3000), nested(9, 1)
    x[:, 7] *= 100
    q[:, 7] *= 100
    index = MatryoshkaIndex(DIMS, metric=metric, codes="bits")
    index.add(x)
    right = brute_force(q, x, metric).topk(10)
    found = index.search(q, 10, exact=True)
    assert torch.equal(found.ids, right.indices)


def test_the_centre_is_of_the_first_vectors_or_of_samples(tmp_path):
    plain, fitted = (MatryoshkaIndex(DIMS, codes="bits") for _ in range(2))
    fitted.fit(nested(3000, 2, centre=5.0))
    for index in (plain, fitted):
        index.add(nested(200, centre=5.0))
        centre = index._rows.layout.centre
        offset = nested(3000, 3, centre=5.0).mean(dim=0)
        assert (centre - offset).norm() < 0.1 * offset.norm()
        index.save(tmp_path)
        loaded = MatryoshkaIndex.load(tmp_path)
        assert torch.equal(loaded._rows.layout.centre, centre)
        more, q = nested(300, 4, centre=5.0), nested(5, 5, centre=5.0)
        for each in (index, loaded):
            each.add(more)
        first, second = (
            each.search(q, 7, stages=[(48, 1, 50), (100, 7)]) for each in (index, loaded)
        )
        assert torch.equal(first.ids, second.ids) and torch.equal(first.scores, second.scores)
    huge = MatryoshkaIndex(DIMS, codes="bits")  # their sum is beyond fp32
    huge.add(nested(4000, centre=5.0) * 1e36)
    assert torch.isfinite(huge._rows.layout.centre).all()
    small = MatryoshkaIndex(DIMS, codes="bits")
    small.add(nested(200))
    assert small._rows.layout.centre is None  # of so little it would be noise


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([(100, 2, 50), (100, 10)], ValueError, r"stages\[0\] bits: expected .*1, 4\), got 2"),
        ([(48, 4, 50), (100, 10)], ValueError, r"stages\[0\] dim: expected 100 where 4 bits rank"),
        ([(40, 1, 50), (100, 10)], ValueError, r"stages\[0\] dim: expected one of \(16, 48, 100\)"),
        ([(100, 1, 50)], TypeError, "the first ones perhaps"),  # scores are of columns
        ([(48, 50), (100, 1, 10)], TypeError, "the first ones perhaps"),
        ([(100, 1, 5), (100, 10)], ValueError, "keeps that do not grow"),
    ],
)  # fmt: skip
def test_stages_that_are_none(stages, error, message):
    index = MatryoshkaIndex(DIMS, codes="bits")
    index.add(nested(100))
    with pytest.raises(error, match=message):
        index.search(nested(1), 10, stages=stages)
    plain = MatryoshkaIndex(DIMS)
    plain.add(nested(100))
    with pytest.raises(TypeError, match=r"\(dim, keep\) pairs, got"):
        plain.search(nested(1), 10, stages=[(100, 1, 50), (100, 10)])


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="codes: expected one of None, 'bits'"):
        MatryoshkaIndex(DIMS, codes="nibbles")
    with pytest.raises(ValueError, match="prefix_dtype: expected 'float32' with codes='bits'"):
        MatryoshkaIndex(DIMS, codes="bits", prefix_dtype="int8")
    with pytest.raises(ValueError, match="dims: expected at most 8192 with codes='bits', got 9000"):
        MatryoshkaIndex((9000,), codes="bits")


def test_what_stages_by_bits_cost():
    index = MatryoshkaIndex(DIMS, codes="bits")
    index.add(nested(1000))
    coded, last = index.explain([(48, 1, 50), (100, 10)], batch=4).rows
    assert coded == (48, 50, 1000, 48_000, 1000 * 48 // 8 // 4, 1)
    assert last == (100, 10, 50, 50 * 100, 50 * 400, 0)


def test_tune_chooses_bits():
    index = MatryoshkaIndex(DIMS, codes="bits")
    index.add(nested(4000))
    report = index.tune(nested(600, 1), 10, 0.9, progress=False)
    assert all(row.stages is None or row.stages[0][1] == 1 for row in report.rows)
    assert {row.stages[0][0] for row in report.rows if row.stages} <= set(DIMS)
    assert any(row.accepted for row in report.rows if row.stages)


def test_a_guess_that_is_too_high():
    """The best rows lie in one tile, which a sample of one tile in sixteen takes for a sixteenth of
    such rows."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(70_000, 32, generator=generator)
    q = torch.randn(8, 32, generator=generator)
    x[:40] = q.repeat(5, 1) * (1 + 0.1 * torch.rand(40, 1, generator=generator))
    index = MatryoshkaIndex((16, 32), metric="ip", codes="bits")
    index.add(x)
    found = index.search(q, 10, exact=True)
    right = brute_force(q, x, "ip").topk(10)
    assert torch.equal(found.ids, right.indices)
    assert (found.rows_touched < 35_000).all()  # bounds served them


def test_factors_beyond_fp32():
    """A cosine's part of the centre may be beyond fp32 where every score is not."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(64, generator=generator)
    x = 3e11 * (mean + 0.3 * torch.randn(9000, 64, generator=generator))
    q = 1.3e-16 * (mean + 0.3 * torch.randn(4, 64, generator=generator))
    index = MatryoshkaIndex((16, 64), metric="cosine", codes="bits")
    index.add(x)
    right = brute_force(q * 1e16, x * 1e-11, "cosine")
    best = right.topk(10)
    assert torch.equal(index.search(q, 10, exact=True).ids, best.indices)
    threshold = right.flatten().sort(descending=True).values[100:102].mean().item()
    assert len(index.range_search(q, threshold).ids) == 101


def test_a_search_outlives_the_centre_of_its_rows():
    x = nested(3000, centre=5.0)
    index = MatryoshkaIndex(DIMS, metric="ip", codes="bits")
    index.add(x)
    before = index._rows.snapshot
    centre = weakref.ref(index._rows.layout.centre)
    index.remove(range(3000))
    index.compact()
    index.fit(nested(3000, 2))
    assert centre() is not None  # which the old rows name
    del before
    assert index.search(x[:2], 3, exact=True).ids.eq(-1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_codes_have_the_same_bits_on_every_instruction_set(dtype, metric, monkeypatch):
    """As compiled for users: compilers fuse products and sums only where they optimize fully."""
    vectors, made = nested(200, centre=2.0), []
    for isa in [*_C.available(), "portable"]:
        monkeypatch.setattr(native, "ISA", isa)
        index = MatryoshkaIndex(DIMS, metric=metric, dtype=dtype, codes="bits")
        first, rest = vectors.split([37, 163])  # the first rows' mean is the centre
        for piece in (first, rest) if isa == "portable" else (first, *rest.split(50)):
            index.add(piece)
        made.append(whole_tiles(index))
    for arrays in made:
        assert all(map(torch.equal, arrays, made[-1]))


@pytest.mark.quick
def test_which_codes_an_index_has_by_default():
    def codes(dims, **options):
        index = MatryoshkaIndex(dims, **options)
        return index.codes, index.prefix_dtype

    assert codes((64, 128)) == codes((128,)) == codes((64, 8192)) == ("bits", "float32")
    assert codes((32, 127)) == codes((64, 8193)) == (None, "float32")
    assert codes((64, 256), dtype="float16") == codes((64, 256), dtype="int8") == (None, "float32")
    assert codes((64, 256), prefix_dtype="float32") == (None, "float32")
    assert codes((64, 256), prefix_dtype="int8") == (None, "int8")
    assert codes((16, 32), codes="bits") == ("bits", "float32")
