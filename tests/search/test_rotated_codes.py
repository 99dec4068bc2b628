"""Codes of vectors a few of whose columns are much larger than the others: rotated between the
dims, where that helps, and searches by them exact all the same."""

import copy
import json
import pickle
import weakref

import pytest
import torch

from mrl_fast import _C, MatryoshkaIndex
from mrl_fast.shared import native
from tests.helpers.coding import whole_tiles
from tests.helpers.search import METRICS, brute_force

DIMS = (16, 48, 101)  # slabs of 16, 32 and 53 columns
OUTLIERS = {  # columns, how many times larger, times their deviation that all columns are off 0
    "one of 10": ([7], 10, 0),
    "one of 100": ([60], 100, 0),
    "eight of 30, off 0": (list(range(3, 101, 13)), 30, 10),
    "one of 10, off 0": ([100], 10, 10),
}


def nested(rows, seed=0, columns=(), times=1.0, offset=0.0):
    """Clustered vectors whose energy is spread evenly, but for some columns."""
    generator = torch.Generator().manual_seed(9)
    scale = torch.ones(DIMS[-1])
    scale[list(columns)] = times
    centres = torch.randn(50, DIMS[-1], generator=generator)
    mean = offset * torch.randn(DIMS[-1], generator=generator)
    generator.manual_seed(seed)
    chosen = torch.randint(50, (rows,), generator=generator)
    x = centres[chosen] + 0.8 * torch.randn(rows, DIMS[-1], generator=generator)
    return scale * (x + mean)


def made(*args, **options):
    index = MatryoshkaIndex(DIMS, **{"codes": "bits", **options})
    if args:
        index.add(nested(*args))
    return index


def is_rotated(index):
    return index._rows.layout.signs is not None


def exact(index, q, x, ids, k=10, **options):
    found = index.search(q, k, exact=True, **options)
    right = brute_force(q, x[ids], index.metric).sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.ids, ids[right.indices[:, :k]])
    torch.testing.assert_close(found.scores, right.values[:, :k].float(), rtol=3e-7, atol=1e-30)
    return right.values


def test_what_is_rotated():
    assert is_rotated(made(3000, 0, [7], 10.0))
    assert not is_rotated(made(3000))
    assert not is_rotated(made(3000, 0, [7], 4.0))  # hardly larger
    assert not is_rotated(made(1, 0, [7], 10.0))  # of which one cannot know
    constant = nested(3000)
    constant[:, 7] += 10  # the centre takes it
    falling = nested(3000) / (1 + torch.arange(DIMS[-1]) / 16)  # as every slab's columns do a bit
    for x in (constant, falling, torch.zeros(9, DIMS[-1])):
        index = made()
        index.add(x)
        assert not is_rotated(index)
    plain, fitted = made(), made()
    for index, times in ((plain, 1.0), (fitted, 10.0)):  # samples decide, not what comes first
        index.fit(nested(3000, 1, [7], times))
        index.add(nested(300, 2, [7], 11.0 - times))
        assert is_rotated(index) == (times > 1)
    huge = made()
    huge.add(nested(3000, 0, [7], 10.0) * 1e17)
    assert is_rotated(huge)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", OUTLIERS)
def test_exact_search_by_rotated_codes(kind, dtype, metric):
    columns, times, offset = OUTLIERS[kind]
    q = nested(9, 1, columns, times, offset)
    index = made(3000, 0, columns, times, offset, metric=metric, dtype=dtype)
    assert is_rotated(index)
    index.remove(range(0, 3000, 7))
    index.update([5, 2900], nested(2, 3, columns, times, offset))
    index.add(nested(600, 4, columns, times, offset))
    ids = index.ids
    x = torch.zeros(int(ids.max()) + 1, DIMS[-1])
    x[ids] = index.reconstruct(ids)
    scores = exact(index, q, x, ids)
    for allowed in (ids[ids % 3 == 0], ids[ids % 50 == 1]):
        order = {int(i): place for place, i in enumerate(ids)}  # of rows
        allowed = torch.tensor(sorted(allowed.tolist(), key=order.__getitem__))
        exact(index, q, x, allowed, allowed=allowed)
    best = scores.flatten().sort(descending=True).values[150:250]
    widest = int((best[:-1] - best[1:]).argmax())  # a gap that rounding to fp32 does not close
    found = index.range_search(q, best[widest : widest + 2].mean().item())
    assert len(found.ids) == 151 + widest
    index.compact()
    exact(index, q, x, ids)


def test_a_few_large_columns_take_no_bits_of_the_others():
    columns, times, _ = OUTLIERS["eight of 30, off 0"]
    index, q = made(6000, 0, columns, times, metric="ip"), nested(64, 1, columns, times)
    right = index.search(q, 10, exact=True)
    for stages in ([(101, 4, 20), (101, 10)], [(101, 1, 300), (101, 10)]):
        found = index.search(q, 10, stages=stages)
        share = (found.ids[:, :, None] == right.ids[:, None, :]).any(1).float().mean().item()
        assert share > 0.9
    plain = made(metric="ip")
    plain.fit(nested(3000))
    plain.add(nested(6000, 0, columns, times))
    assert not is_rotated(plain)
    more = plain.search(q, 10, exact=True).rows_touched - 10  # than the best themselves
    assert (right.rows_touched - 10).sum() < more.sum() / 2


def same(one, other, q):
    for options in ({"exact": True}, {"stages": [(48, 1, 90), (101, 8, 20), (101, 7)]}):
        a, b = (index.search(q, 7, **options) for index in (one, other))
        assert torch.equal(a.ids, b.ids) and torch.equal(a.scores, b.scores)


def version_of(folder):
    return json.loads((folder / "manifest.json").read_text())["version"]


@pytest.mark.parametrize("rotation", [None, "pca"])
def test_rotated_codes_are_kept(rotation, tmp_path):
    outliers = [7], 100.0
    x = nested(900, 0, *outliers)
    index = made(rotation=rotation)
    index.add(x[:700])
    assert is_rotated(index)
    index.save(tmp_path)
    assert version_of(tmp_path) == 4
    loaded = MatryoshkaIndex.load(tmp_path, verify=True)
    copies = [loaded, *map(pickle.loads, map(pickle.dumps, (index, loaded)))]
    copies += [copy.copy(index), copy.deepcopy(loaded)]
    q = nested(5, 1, *outliers)
    for other in copies:
        assert is_rotated(other)
        same(index, other, q)
    index.add(x[700:])
    for other in copies:
        other.add(x[700:])
        same(index, other, q)
    loaded.save(tmp_path)
    same(index, MatryoshkaIndex.load(tmp_path, verify=True), q)

    # Other vectors decide anew, and the folder is what older versions read.
    loaded.remove(loaded.ids)
    loaded.compact()
    loaded.add(nested(300))
    assert is_rotated(loaded)
    loaded.remove(loaded.ids)
    loaded.compact()
    loaded.fit(nested(3000))
    loaded.add(nested(300))
    loaded.save(tmp_path)
    assert version_of(tmp_path) == 3
    same(loaded, MatryoshkaIndex.load(tmp_path, verify=True), nested(5, 1))


def test_signs_that_are_none(tmp_path):
    index = made(300, 0, [7], 10.0)
    index._rows.frame[-1, 3] = 0.5
    index.save(tmp_path)
    with pytest.raises(ValueError, match="axes: expected signs, 1 and -1, in the last row"):
        MatryoshkaIndex.load(tmp_path)


def test_a_search_outlives_the_signs_of_its_rows():
    index = made(300, 0, [7], 10.0)
    before, signs = index._rows.snapshot, weakref.ref(index._rows.layout.signs)
    index.remove(range(300))
    index.compact()
    index.fit(nested(3000))
    assert signs() is not None and not is_rotated(index)
    del before
    assert signs() is None


@pytest.mark.parametrize("metric", METRICS)
def test_rotated_codes_have_the_same_bits_on_every_instruction_set(metric, monkeypatch):
    vectors, arrays = nested(200, 0, [7, 60], 20.0, 2.0), []
    for isa in [*_C.available(), "portable"]:
        monkeypatch.setattr(native, "ISA", isa)
        index = made(metric=metric)
        index.fit(vectors)
        for piece in (vectors,) if isa == "portable" else vectors.split(37):
            index.add(piece)
        arrays.append(whole_tiles(index))
    for each in arrays:
        assert all(map(torch.equal, each, arrays[-1]))


def test_signs_do_not_depend_on_torchs_state():
    index = made(300, 0, [7], 10.0)
    torch.manual_seed(5)
    x = nested(300, 0, [7], 10.0)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.inference_mode():
            other = made()
            other.add(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(other._rows.layout.signs, index._rows.layout.signs)
    same(index, other, nested(5, 1, [7], 10.0))


@pytest.mark.parametrize("metric", METRICS)
def test_queries_of_any_size(metric):
    index = made(3000, 0, [7], 10.0, metric=metric)
    for size in (1e-30, 1e-12, 1e12):
        q = size * nested(5, 1, [7], 10.0)
        exact(index, q, nested(3000, 0, [7], 10.0), index.ids)


def test_a_device_keeps_what_a_host_reads(tmp_path):
    x, q = nested(300, 0, [7], 30.0), nested(3, 1, [7], 30.0)
    host, device = made(), made(device="cuda")
    for index in (host, device):
        index.add(x)
    assert is_rotated(device)
    assert torch.equal(device.search(q, 5, exact=True).ids, host.search(q, 5, exact=True).ids)
    device.save(tmp_path)
    same(host, MatryoshkaIndex.load(tmp_path, verify=True), q)
    assert is_rotated(MatryoshkaIndex.load(tmp_path, device="cuda"))
