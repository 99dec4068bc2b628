"""A saved index: what is written, when, and what comes back; whatever the disk does."""

import errno
import json
import os
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.disk import tensorfile
from mrl_fast.search.index.codes import TILED
from mrl_fast.shared.types import Tuned
from tests.helpers.coding import CODINGS, coding
from tests.helpers.index_model import (  # noqa: F401
    DIMS,
    ROOT,
    Model,
    assert_same,
    build,
    change,
    content,
    names,
    one_thread,
    quick,
    strays,
    vectors,
)
from tests.helpers.search import METRICS

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("rotation", [None, "pca"])
@pytest.mark.parametrize("prefix_dtype", CODINGS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("metric", METRICS)
def test_round_trip(metric, dtype, prefix_dtype, rotation, tmp_path):
    options = dict(metric=metric, dtype=dtype, **coding(prefix_dtype), rotation=rotation)
    index, model = build(**options)
    change(index, model)
    index._tuned = Tuned([(5, 30), (20, 4)], 4, len(index))
    index.save(tmp_path)
    q = vectors(9, DIMS[-1], 1)
    for verify in (False, True):
        again = MatryoshkaIndex.load(tmp_path, verify=verify)
        assert_same(again, model)
        assert repr(again) == repr(index) and again.tuned == index.tuned
        if rotation:
            assert torch.equal(again.rotation, index.rotation)
        for how in ({"exact": True}, {}, {"stages": [(5, 50), (20, 10)]}):
            ours, theirs = index.search(q, 4, **how), again.search(q, 4, **how)
            assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.ids, theirs.ids)
    change(again, model, seed=6)
    again.save(tmp_path)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)


def test_without_vectors(tmp_path):
    MatryoshkaIndex(DIMS).save(tmp_path)
    again = MatryoshkaIndex.load(tmp_path, verify=True)
    assert len(again) == 0 and names(tmp_path) == ["manifest.json"]
    index = MatryoshkaIndex(DIMS, rotation="pca")
    index.fit(vectors(100, DIMS[-1], 0))
    index.save(tmp_path)
    again = MatryoshkaIndex.load(tmp_path, verify=True)
    assert torch.equal(again.rotation, index.rotation)
    index, model = build()
    index.remove(index.ids)
    index.save(tmp_path)  # removed rows and no others
    again = MatryoshkaIndex.load(tmp_path)
    assert len(again) == 0 and (again.search(vectors(1, DIMS[-1], 0), 2).ids == -1).all()
    again.compact()
    again.save(tmp_path)
    again = MatryoshkaIndex.load(tmp_path)
    again.add(vectors(2, DIMS[-1], 0))
    assert again.ids.tolist() == [150, 151]  # ids of removed vectors are not used again


def test_elsewhere_everything_is_written(tmp_path):
    index, model = build()
    index.save(tmp_path / "a")
    index.save(tmp_path / "b")  # nothing has changed, and yet this folder has nothing
    assert_same(MatryoshkaIndex.load(tmp_path / "b", verify=True), model)
    change(index, model)
    index.save(tmp_path / "a")  # where it was saved before, but not last
    assert_same(MatryoshkaIndex.load(tmp_path / "a", verify=True), model)
    assert not strays(tmp_path / "a")


def test_a_rotation_that_was_fitted_anew(tmp_path):
    index, model = build(rotation="pca")
    index.save(tmp_path)
    index.remove(index.ids)
    index.compact()
    index.fit(vectors(50, DIMS[-1], 3))
    index.add(vectors(9, DIMS[-1], 4))
    model.remove(model.ids)
    model.add(vectors(9, DIMS[-1], 4))
    index.save(tmp_path)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)
    assert not strays(tmp_path)


def test_an_index_is_replaced_by_another(tmp_path):
    build(rows=500)[0].save(tmp_path)
    before = names(tmp_path)
    other, model = build(rows=3, metric="l2", prefix_dtype="int8", rotation="pca")
    other.save(tmp_path)
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)
    assert not strays(tmp_path) and before[1] not in names(tmp_path)


def test_only_what_is_new_is_written(tmp_path):
    index, model = build(rows=200)
    index.save(tmp_path)

    def state():
        status = {name: (tmp_path / name).stat() for name in names(tmp_path)}
        return {name: (s.st_mtime_ns, s.st_ino, s.st_size) for name, s in status.items()}

    def saved():
        """What is left of the files before, what is new, and the index that is loaded again."""
        before, bytes_before = state(), content(tmp_path)
        index.save(tmp_path)
        after, bytes_after = state(), content(tmp_path)
        kept = {name for name in before if name in after and name != "manifest.json"}
        assert all(before[name] == after[name] for name in kept)
        assert all(bytes_before[name] == bytes_after[name] for name in kept)
        assert_same(MatryoshkaIndex.load(tmp_path, verify=True), model)
        return kept, sorted(set(after) - set(before))

    first = "rows-00000001.safetensors"
    index.add(vectors(40, DIMS[-1], 1))
    model.add(vectors(40, DIMS[-1], 1))
    assert saved() == ({first}, ["rows-00000002.safetensors"])
    assert (tmp_path / "rows-00000002.safetensors").stat().st_size < 1.5 * 64 * 23 * 4
    index.remove(torch.tensor([3]))
    model.remove([3])
    assert saved()[1] == ["alive-00000003.safetensors"]
    assert saved() == (set(names(tmp_path)) - {"manifest.json"}, [])  # nothing has changed
    index = MatryoshkaIndex.load(tmp_path)  # which knows what is there
    index.update(torch.tensor([5]), vectors(1, DIMS[-1], 2))
    model.update([5], vectors(1, DIMS[-1], 2))
    kept, new = saved()
    assert first in kept and new == ["alive-00000004.safetensors", "rows-00000004.safetensors"]
    index.compact()
    kept, new = saved()
    assert new == ["rows-00000005.safetensors"] and not kept


# The files of 7 a tier, log(tiles) / log(8) tiers, and the manifest; a tile is 64 rows.
@pytest.mark.parametrize(("rows", "saves", "files"), [(1, 1000, 12), (64, 400, 23)])
def test_many_small_saves(rows, saves, files, tmp_path):
    index, model = MatryoshkaIndex(DIMS), Model(DIMS[-1])
    most, written, before = 0, 0, set()
    for i in range(saves):
        x = vectors(rows, DIMS[-1], i)
        index.add(x)
        model.add(x)
        index.save(tmp_path)
        now = set(names(tmp_path))
        written += sum((tmp_path / name).stat().st_size for name in now - before)
        most, before = max(most, len(now)), now
    again = MatryoshkaIndex.load(tmp_path, verify=True)
    assert again.ids.tolist() == model.ids
    assert torch.equal(again.reconstruct(again.ids), model.matrix)
    assert most <= files
    tile = 64 * (20 + 3 + 2) * 4  # bytes: of vectors, norms and ids
    assert written < 4 * saves * tile


@pytest.mark.parametrize("prefix_dtype", CODINGS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_other_programs_can_read_the_files(dtype, prefix_dtype, tmp_path):
    index, model = build(dtype=dtype, **coding(prefix_dtype), rotation="pca")
    change(index, model)
    index.save(tmp_path)
    block = index._rows.snapshot.blocks[0]
    count = index._rows.snapshot.count
    for name in names(tmp_path):
        if name == "manifest.json":
            continue
        header = int.from_bytes((tmp_path / name).read_bytes()[:8], "little")
        assert (8 + header) % 64 == 0
        with safe_open(tmp_path / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if name.startswith("rows"):
            assert torch.equal(tensors["ids"][:count], block.ids[:count])
            assert torch.equal(tensors["tail"][:count], block.suffix[:count])
            assert torch.equal(tensors["stats"][:, :count], block.stats[:, :count])
            whole = count // 64
            for array, own in block.tiles.items():
                assert torch.equal(tensors[array][:whole], own[:whole])
                axis = TILED[array].rows
                if axis is not None:  # nothing else of ours
                    used = count % 64
                    rest = tensors[array][whole:].narrow(1 + axis, used, 64 - used)
                    assert not rest.any()
            assert set(tensors) == {"ids", "tail", "stats", *index.config.code.arrays}
        elif name.startswith("axes"):
            assert torch.equal(tensors["axes"][: index.width], index.rotation)
        else:
            bits = np.unpackbits(tensors["alive"].numpy().view(np.uint8), bitorder="little")
            assert bits.sum() == len(index)


# --- what is no index


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"path: .*, got {tmp_path}"):
        MatryoshkaIndex.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MatryoshkaIndex.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="path: expected a folder that .*, got a file: .*/file "):
        MatryoshkaIndex.load(tmp_path / "file")
    with pytest.raises(ValueError, match="device: expected 'cpu', 'cuda' or .*, got 'tpu'"):
        MatryoshkaIndex.load(tmp_path, device="tpu")
    folder = tmp_path / "index"
    build()[0].save(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "metric": "ip"}))
    with pytest.raises(ValueError, match=f"{folder}/manifest.json: sha256: expected .*, got '"):
        MatryoshkaIndex.load(folder)
    changed = manifests.signed({**manifest, "version": 5})
    (folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"{folder}/manifest.json: version: .* 3 or 4, got 5"):
        MatryoshkaIndex.load(folder)
    nothing = tensorfile.write(
        folder / "alive-00000001.safetensors", {"alive": (torch.int64, (0,))}, {"alive": []}
    )
    entry = {"file": "alive-00000001.safetensors", "sha256": nothing}
    changed = manifests.signed({**manifest, "segments": [], "alive": entry})
    (folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="manifest.json: alive: expected none without rows"):
        MatryoshkaIndex.load(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "rows-00000001.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{folder}/rows-00000001.safetensors: expected a file"):
        MatryoshkaIndex.load(folder)


SEGMENT = {"file": "rows-00000001.safetensors", "sha256": "0" * 64, "rows": 192, "used": 150}
TUNED = {"stages": [[5, 30], [20, 4]], "k": 4, "rows": 150}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dims", [5, 10**30], "dims: expected widths of at most 16777216, got 1000000000"),
        ("dims", [20, 5], "dims: expected strictly ascending"),
        ("metric", "dot", "metric: expected one of"),
        ("next_id", 2**63, "next_id: expected an id, got 9223372036854775808"),
        ("generation", 10**8, "generation: expected a number, got 100000000"),
        ("tuned", [], "tuned: expected stages, k, rows and recall, got"),
        ("tuned", {**TUNED, "recall": 2}, r"tuned recall: expected a number in \(0, 1\], got 2"),
        ("tuned", {**TUNED, "rows": 10**400}, "tuned rows: expected an integer in"),
        ("tuned", {**TUNED, "k": 10**30}, "tuned k: expected an integer in"),
        ("tuned", {**TUNED, "stages": [[5, 10**30], [20, 4]]}, "tuned keep: expected an integer"),
        ("segments", {}, "segments: expected a list, got {}"),
        (
            "segments",
            [{**SEGMENT, "file": "../" + SEGMENT["file"]}],
            "file: expected a file of row",
        ),
        (
            "segments",
            [{**SEGMENT, "file": "axes-00000001.safetensors"}],
            "file: expected a file of",
        ),
        ("segments", [{**SEGMENT, "sha256": "x"}], "sha256: expected 64 hexadecimal digits, got"),
        ("segments", [{**SEGMENT, "rows": "192"}], "rows: expected a number of rows, got '192'"),
        ("segments", [{**SEGMENT, "rows": 191}], "rows: expected a multiple of 64, got 191"),
        ("segments", [{**SEGMENT, "used": 193}], "used: expected 1 to 192, got 193"),
        ("segments", [SEGMENT] * 2, r"segments\[0\] used: expected a multiple of 64, got 150"),
        ("segments", [{**SEGMENT, "rows": 256}], "rows-00000001.safetensors: size: expected"),
    ],
)
def test_fields_that_cannot_be_right(field, value, message, tmp_path):
    build()[0].save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    changed = manifests.signed({**manifest, field: value})
    (tmp_path / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"{tmp_path}/.*{message}"):
        MatryoshkaIndex.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("axes", "axes: expected finite values"), ("alive", "alive: expected bits of 150 rows")],
)
def test_data_that_cannot_be_right(kind, message, tmp_path):
    index, _ = build(rotation="pca")
    index.remove(index.ids[:1])
    index.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    file = tmp_path / manifest[kind]["file"]
    data = file.read_bytes()[:-4] + b"\xff" * 4  # NaN; bits of rows that there are not
    file.write_bytes(data)
    manifest[kind]["sha256"] = sha256(data).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifests.signed(manifest)))
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        MatryoshkaIndex.load(tmp_path)


FULL = """
import resource, sys, torch
from mrl_fast import MatryoshkaIndex
index = MatryoshkaIndex((5, 20))
index.add(torch.randn(50, 20))
index.save(sys.argv[1])
kept = index.ids.clone()
index.add(torch.randn(10_000, 20))
for limit in (0, 1, 300, 4096, 500_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        index.save(sys.argv[1])
        raise AssertionError(limit)
    except OSError as error:
        print(limit, error.strerror)
    assert torch.equal(MatryoshkaIndex.load(sys.argv[1], verify=True).ids, kept)
    assert index.search(torch.zeros(1, 20), 3).ids.min() >= 0
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
index.save(sys.argv[1])
assert torch.equal(MatryoshkaIndex.load(sys.argv[1], verify=True).ids, index.ids)
"""


def test_files_that_may_not_grow(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "index")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(os.strerror(errno.EFBIG)) == 5
    assert not strays(tmp_path / "index")
