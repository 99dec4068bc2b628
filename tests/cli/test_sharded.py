"""``mrl-fast index`` on folders of shards, and on folders far away."""

import json
import shutil
import sys

import numpy as np
import pytest

from mrl_fast import MatryoshkaIndex, ShardedIndex
from tests.helpers.cli_index import BASE, DIMS, QUERIES, run, run_json, same_as, saved

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The vectors in three files."""
    folder = tmp_path_factory.mktemp("parts")
    for i, part in enumerate(np.split(BASE, [700, 1500])):
        saved(folder / f"part-{i}.npy", part)
    return folder


@pytest.fixture(scope="module")
def sharded(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "sharded"
    run("build", parts, "--out", folder, "--dims", DIMS, "--shards", 3, "--checkpoint", 900)
    return folder


@pytest.fixture(scope="module")
def one():
    index = MatryoshkaIndex((8, 32))
    index.add(BASE)
    return index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MRL_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_build_of_files_a_folder_and_a_pattern(parts, sharded, one, tmp_path):
    assert isinstance(MatryoshkaIndex.load(sharded), ShardedIndex)
    same_as(sharded, one)
    sources = [f"{parts}/part-*.npy"], sorted(parts.iterdir())
    for i, source in enumerate(sources):
        run("build", *source, "--out", tmp_path / str(i), "--dims", DIMS, "--shards", 2)
        same_as(tmp_path / str(i), one)
    again = run_json("build", parts, "--out", sharded, "--dims", DIMS, "--shards", 3)
    assert again["added"] == 0
    for options in (["--shards", 2], []):
        error = run("build", parts, "--out", sharded, "--dims", DIMS, *options, code=2)
        assert f"--shards: expected 3 as in {sharded}" in error
    error = run("build", parts, "--out", sharded, "--overwrite", code=2)
    assert "--overwrite: expected" in error and "delete it first" in error
    same_as(sharded, one)


def test_search_info_and_verify(sharded, one, tmp_path):
    queries = saved(tmp_path / "q.npy", QUERIES)
    run("search", sharded, queries, "-k", 7, "--out", tmp_path / "found.npz")
    found, expected = np.load(tmp_path / "found.npz"), one.search(QUERIES, 7)
    assert np.array_equal(found["ids"], expected.ids)
    assert np.array_equal(found["scores"], expected.scores)
    told = run_json("info", sharded)
    assert told["shards"] == [1000, 1000, 1000] and told["rows"] == 3000
    assert told["bytes"] == sum((sharded / name).stat().st_size for name in told["files"])
    assert "3, of 1,000, 1,000, 1,000 rows" in run("info", sharded)
    assert run_json("verify", sharded)["rows"] == 3000
    broken = shutil.copytree(sharded, tmp_path / "broken")
    file = next((broken / "shard-00001").glob("rows-*"))
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    assert str(file) in run("verify", broken, code=1)


def test_changes_and_tuning(sharded, one, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    new, queries = saved(tmp_path / "new.npy", BASE[:50] + 1), saved(tmp_path / "q.npy", QUERIES)
    run("add", folder, new)
    run("remove", folder, 5, 3001)
    run("compact", folder)
    run("graph", folder, "--quiet")
    index = MatryoshkaIndex((8, 32))
    index.add(BASE)
    index.add(BASE[:50] + 1)
    index.remove([5, 3001])
    same_as(folder, index)
    assert run_json("info", folder)["graph"] == 3048
    report = run_json("tune", folder, queries, "-k", 5, "--recall", 0.9, "--seconds", 1)
    assert report["saved"] and run_json("info", folder)["tuned"]["k"] == 5


@pytest.mark.parametrize("scheme", ["memory", "local"])
def test_a_far_folder_is_copied_once(scheme, sharded, one, tmp_path, cache, monkeypatch):
    queries = saved(tmp_path / "q.npy", QUERIES)
    url = {"memory": "memory://bucket/index", "local": f"file://{tmp_path}/far"}[scheme]
    system, root = fsspec.core.url_to_fs(url)
    system.put(f"{sharded}/", f"{root}/", recursive=True)
    try:
        loaded = MatryoshkaIndex.load(url, verify=True)
        assert isinstance(loaded, ShardedIndex) and len(loaded) == 3000
        same_as(next(cache.iterdir()), one)
        run("search", url, queries, "--out", tmp_path / "found.npz")
        found = np.load(tmp_path / "found.npz")["ids"]
        assert np.array_equal(found, one.search(QUERIES, 10).ids)
        assert run_json("info", url)["rows"] == run_json("verify", url)["rows"] == 3000
        assert len(list(cache.iterdir())) == 1

        copied = []
        opened = type(system).open
        monkeypatch.setattr(
            type(system), "open",
            lambda self, path, *a, **k: (copied.append(path), opened(self, path, *a, **k))[1],
        )  # fmt: skip
        MatryoshkaIndex.load(url)
        assert copied and not [path for path in copied if not path.endswith("manifest.json")]
        # Other indexes at the same URL, whose files have the same names.
        for factor in (-1, 2):
            other = ShardedIndex((8, 32), shards=3)
            other.add(factor * BASE)
            other.save(tmp_path / str(factor))
            system.rm(root, recursive=True)
            system.put(f"{tmp_path / str(factor)}/", f"{root}/", recursive=True)
            again = MatryoshkaIndex.load(url, verify=True)
            assert again.reconstruct([0]).numpy().tolist() == (factor * BASE[:1]).tolist()
    finally:
        system.rm(root, recursive=True)


def test_a_far_folder_of_one_index(one, tmp_path):
    one.save(tmp_path / "one")
    system, root = fsspec.core.url_to_fs("memory://bucket/one")
    system.put(f"{tmp_path / 'one'}/", f"{root}/", recursive=True)
    loaded = MatryoshkaIndex.load("memory://bucket/one")
    assert type(loaded) is MatryoshkaIndex and len(loaded) == 3000
    file = next(path for path in system.ls(root, detail=False) if "rows" in path)
    system.pipe(file, system.cat(file)[:-1] + b"x")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="rows-.*: expected sha256 "):
        MatryoshkaIndex.load("memory://bucket/one")
    system.rm(root, recursive=True)


def test_what_is_no_far_folder(tmp_path, monkeypatch):
    queries = saved(tmp_path / "q.npy", QUERIES)
    error = run("search", "memory://bucket/nothing", queries, code=2)
    assert "expected a folder that holds an index, got" in " ".join(error.split())
    error = run("tune", "memory://bucket/nothing", queries, code=2)
    assert "expected a folder of this machine" in " ".join(error.split())
    with pytest.raises(ValueError, match="nothing-like-it"):
        MatryoshkaIndex.load("nothing-like-it://bucket/index")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mrl-fast\[remote\]'"):
        MatryoshkaIndex.load("s3://bucket/index")


def test_fsspec_is_not_imported_for_folders(sharded):
    import subprocess

    code = (
        "import sys; sys.modules['fsspec'] = None; import mrl_fast, json; "
        f"print(json.dumps(len(mrl_fast.MatryoshkaIndex.load({str(sharded)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == 3000
