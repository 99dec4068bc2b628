"""ShardedIndex: the bits of one index that holds all rows."""

import pytest
import torch

from mrl_fast import MatryoshkaIndex, ShardedIndex
from mrl_fast.shared.types import ExactResult

DIMS = (8, 32)
OPTIONS = [
    {"metric": "cosine"},
    {"metric": "ip", "codes": "bits"},
    {"metric": "l2", "dtype": "float16"},
    {"metric": "cosine", "dtype": "int8"},
    {"metric": "ip", "prefix_dtype": "int8"},
    {"metric": "cosine", "rotation": "pca", "codes": "bits"},
]
SHARDS = [1, 2, 5, 8]


def vectors(rows, seed=0):
    """Of small integers, many of them equal, so that scores tie."""
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
    x[: rows // 4] = x[: rows // 4].round()
    x[rows // 2 : rows // 2 + rows // 5] = x[: rows // 5]
    return x


def pair(shards, **options):
    return MatryoshkaIndex(DIMS, **options), ShardedIndex(DIMS, shards=shards, **options)


def changed(*indexes, seed=0):
    """Both, after adding, removing, replacing."""
    x = vectors(400, seed)
    for index in indexes:
        index.add(x[:3])
        index.add(x[3:300])
        index.remove([5, 17, 280])
        index.update([7, 250, 8], x[5:8])
        index.add(x[300:].numpy(), ids=range(1000, 1100))
    return indexes


def assert_same(one, many):
    """The same arrays, to the bit."""
    assert type(one) is type(many)
    for mine, its in zip(one, many, strict=True):
        assert mine.dtype == its.dtype and torch.equal(mine, its)


def assert_answers_as(one, many, seed=1):
    q = torch.cat([vectors(6, seed), one.reconstruct(one.ids[:3])])
    assert len(one) == len(many) and torch.equal(one.ids, many.ids)
    assert torch.equal(one.reconstruct(one.ids), many.reconstruct(one.ids))
    mask = torch.arange(len(one)) % 3 == 0
    for asked in (
        {"k": 1},
        {"k": 10, "exact": True},
        {"k": len(one) + 5},
        {"k": 7, "dim": 8},
        {"k": 9, "allowed": [1, 2, 3, 7, 1000, 99999]},
        {"k": 9, "allowed": mask},
        {"k": 9, "allowed": mask.to(torch.uint8).numpy()},
        {"k": 9, "allowed": torch.zeros(len(one), dtype=torch.bool)},
        {"k": 9, "stages": [(32, 9)]},
        {"k": 9, "stages": [(8, max(9, len(one))), (32, 9)]},
    ):
        assert_same(one.search(q, **asked), many.search(q, **asked))
    for dim in (8, 32):
        best = one.search(q, 30, dim=dim).scores
        threshold = float(best[best > -torch.inf].median()) if len(one) else 0.0
        ranges = [index.range_search(q, threshold, dim=dim) for index in (one, many)]
        assert_same(*ranges)
        assert_same(*(i.range_search(q, threshold, dim=dim, allowed=mask) for i in (one, many)))


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bits_of_one_index(options, shards, tmp_path):
    one, many = changed(*pair(shards, **options))
    assert many.shards == shards and max(many.shard_sizes) - min(many.shard_sizes) <= 3
    assert_answers_as(one, many)
    many.save(tmp_path)
    loaded = MatryoshkaIndex.load(tmp_path, verify=True)
    assert isinstance(loaded, ShardedIndex)
    assert_answers_as(one, loaded)
    for index in (one, loaded):
        index.compact()
        index.add(vectors(40, seed=3))
        index.update([1000], vectors(1, seed=4))
    assert_answers_as(one, loaded)
    loaded.save(tmp_path)
    assert_answers_as(one, MatryoshkaIndex.load(tmp_path, verify=True))


def test_ranks_are_the_fp64_scores():
    """Scores that are equal in fp32 are told apart across shards as within one index."""
    x = torch.ones(64, 32)
    x[:, 0] += torch.arange(64).flip(0) * 1e-7  # larger scores come later, by less than fp32 tells
    x[:, 0] = 1 + torch.randperm(64, generator=torch.Generator().manual_seed(0)) * 2**-23
    x[:, 1:] = 1000
    q = torch.ones(2, 32)
    one, many = pair(4, metric="ip")
    for index in (one, many):
        index.add(x)
    found = one.search(q, 20)
    assert len(found.scores.unique()) == 1 and not torch.equal(found.ids, found.ids.sort().values)
    assert_same(found, many.search(q, 20))
    threshold = float(found.scores.min())
    assert_same(one.range_search(q, threshold), many.range_search(q, threshold))


def test_exact_says_so_and_counts():
    one, many = changed(*pair(3, codes="bits"))
    q = vectors(5, seed=2)
    found = many.search(q.numpy(), 4)
    assert isinstance(found, ExactResult) and type(found.ids).__name__ == "ndarray"
    assert found.stages is None and found.rows_touched.shape == (5,)
    assert (found.rows_touched >= 4).all() and (found.rows_touched <= len(one)).all()
