"""``explain``: what stages cost, counted and not measured."""

import pytest

from mrl_fast.search.index.cost import explain
from tests.helpers.tuning import Shape


def test_what_cannot_be_explained():
    shape = Shape(1000, (4, 8, 32))
    with pytest.raises(TypeError, match=r"stages: .*\(dim, bits, keep\) needs .* codes='bits'"):
        explain(shape, [(8, 1, 100), (32, 10)])
    with pytest.raises(ValueError, match="stages: expected a list, got None: .* exact search"):
        explain(shape, None)


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
        ("float32", "int8", [(4, 100), (32, 10)], 1, [(1000, 4000, 8000), (100, 2800, 3200)]),
        ("int8", "int8", [(4, 100), (32, 10)], 1, [(1000, 4000, 4000), (100, 3200, 3600)]),
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


@pytest.mark.parametrize(
    ("stages", "batch", "message"),
    [
        ([(9, 5)], 1, r"stages\[0\] dim: expected one of .* got 9"),
        ([], 1, "stages: expected at least one"),
        ([(8, 5)], 0, "batch: expected an integer >= 1, got 0"),
    ],
)
def test_bad_input(stages, batch, message):
    with pytest.raises(ValueError, match=message):
        explain(Shape(1000, (4, 8, 32)), stages, batch)
