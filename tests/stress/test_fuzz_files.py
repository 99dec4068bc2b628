"""Damaged files: loading one says which it is and what is wrong, or works; nothing crashes, hangs
or takes memory that is not there.

In a process of its own, whose memory and time are limited; a seed says what is damaged and how.
"""

import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from hashlib import sha256
from pathlib import Path

import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.disk import folder
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.shared.types import Tuned
from tests.helpers.index_model import DIMS, ROOT, TIMES, build, change, names, vectors

MANIFEST = manifests.FILE
MANY_BYTES = 64 << 20  # beyond a file's size
SECONDS = 20  # of a processor
VALUES = [
    None, True, False, 0, 1, -1, 63, 64, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30,
    -(10**30), 10**400, 0.5, 64.0, float("nan"), float("inf"), "", "x", "pca", "l2", "int8",
    "float16", "../rows-00000001.safetensors", "/etc/passwd", "/dev/zero", ".", "manifest.json",
    "rows-00000001.safetensors", "rows-00000001.safetensors\n", "axes-00000001.safetensors",
    "rows-٠٠٠٠٠٠٠١.safetensors", "\ud800", "\0", "0" * 64, [], [[]], [0], [1, 2], [5, 20], {},
    {"file": "rows-00000001.safetensors"}, [0] * 5000, "9" * 100_000,
]  # fmt: skip


def bases(root):
    """Folders with all that a manifest may have, and what their files hold."""
    made = []
    for i, options in enumerate([
        {"metric": "cosine"},
        {"metric": "l2", "dtype": "bfloat16", "rotation": "pca"},
        {"metric": "ip", "dtype": "float16", "prefix_dtype": "int8"},
        {"metric": "cosine", "prefix_dtype": "int8", "rotation": "pca"},
        {"metric": "ip", "dtype": "int8"},
    ]):  # fmt: skip
        folder = root / f"base{i}"
        index, model = build(rows=70, seed=i, **options)
        if i % 2 == 0:
            index.build_graph(progress=False)
        index.save(folder)
        if i:
            change(index, model)
            index._tuned = Tuned([(DIMS[0], 30), (DIMS[1], 5)], 5, len(index))
            index.save(folder)
        made.append((folder, {name: (folder / name).read_bytes() for name in names(folder)}))
    return made


# --- what is done to files: each takes a random generator and {name: bytes}, which it changes


def change_bytes(rng, data):
    data = bytearray(data)
    end = len(data) if rng.random() < 0.6 else min(len(data), 400)  # in the header
    for _ in range(rng.choice([1, 1, 2, 8, 100])):
        where = rng.randrange(end)
        data[where] = rng.choice([data[where] ^ 1 << rng.randrange(8), 0, 255, 32, 127])
    return bytes(data)


def cut_or_extend(rng, data):
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return data + rng.choice([b"\0", b" ", b"{}", data, rng.randbytes(100), bytes(1 << 20)])
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:begin] + data[end:] if kind == 2 else data[:end] + data[begin:]


def damage(rng, held):
    """Bytes of a file."""
    name = rng.choice(sorted(held))
    held[name] = rng.choice([change_bytes, cut_or_extend])(rng, held[name])


def swap(rng, held):
    """Files among themselves, one with nothing, or with none."""
    one, other = rng.choice(sorted(held)), rng.choice(sorted(held))
    held[one], held[other] = rng.choice([
        (held[other], held[one]), (b"", held[other]), (None, held[other]), ("folder", held[other]),
        ("loop", held[other]),
    ])  # fmt: skip


def text(rng, held):
    """The manifest as text."""
    data = held[MANIFEST]
    token = rng.choice(re.findall(rb'"[^"]*"|\d+|[{}\[\]:,]', data))
    new = [b"", b"null", b"-", b"9" * 5000, b"1e999", b"NaN", b'"', b"[" * 5000, b"\xff", b"\0"]
    new += [token * 2, b'{"a":' * 900 + b"1" + b"}" * 900, b"[" + b"{}," * 300_000 + b"0]", b"\\u0"]
    held[MANIFEST] = data.replace(token, rng.choice(new), rng.choice([1, -1]))


def places(tree):
    """Every list or object in it with each of its keys."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


def fields(rng, held):
    """The manifest's fields, with a checksum that is right."""
    manifest = json.loads(held[MANIFEST])
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        tree, key = rng.choice([*places(manifest), *((manifest, key) for key in manifest)])
        kind, old = rng.randrange(8), tree[key]
        if kind == 0:
            del tree[key]
        elif kind == 1 and isinstance(tree, dict):
            tree[rng.choice(["more", "rows", ""])] = deepcopy(old)
        elif kind == 1:
            tree.insert(key, deepcopy(old))
        elif kind in (2, 3) and isinstance(old, int):
            tree[key] = old + rng.choice([-64, -1, 1, 64, 1 << 20])
        elif kind == 3:
            tree[key] = rng.choice([[old], {"a": old}, str(old), [old, deepcopy(old)]])
        elif kind == 4:
            tree[key] = deepcopy(rng.choice(list(manifest.values())))
        else:
            tree[key] = deepcopy(rng.choice(VALUES))
        if not manifest:
            break
    signed(held, manifest)


def signed(held, manifest):
    held[MANIFEST] = json.dumps(manifests.signed(manifest)).encode()


def rows(rng, held):
    """Data, with checksums that are right."""
    manifest = json.loads(held[MANIFEST])
    for entry in [*manifest["segments"], manifest["alive"], manifest["axes"]]:
        if entry and rng.random() < 0.7:
            data = bytearray(held[entry["file"]])
            header = 8 + int.from_bytes(data[:8], "little")
            for _ in range(rng.choice([1, 4, 64])):
                where = rng.randrange(header, len(data)) & ~3
                word = rng.choice(["0000807f", "0000c07f", "ffffffff", "00000080", "ffff7f7f"])
                data[where : where + 4] = rng.choice([bytes.fromhex(word), rng.randbytes(4)])
            held[entry["file"]] = bytes(data)
            entry["sha256"] = sha256(data).hexdigest()
    signed(held, manifest)


# --- what may come of it


def refused(folder, verify):
    """The index; or the kind of refusal, which names a file and what was expected of it."""
    try:
        return MatryoshkaIndex.load(folder, verify=verify)
    except FileNotFoundError:
        assert not (folder / MANIFEST).is_file()
        return "no index"
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError, repr(error)
        wanted = rf"{re.escape(str(folder))}/[^/]+: (\w[\w \[\]]*: )?.*expected .+"
        assert re.match(wanted, message, re.DOTALL), message
        return "refused"


def use(index, out):
    """Everything that an index can do; what it refuses it says why."""

    def attempt(call):
        try:
            return call()
        except (ValueError, TypeError) as error:
            assert type(error) in (ValueError, TypeError), repr(error)
            assert re.match(r"[a-z][\w \[\]]*: expected ", str(error)), repr(error)

    repr(index)
    ids = index.ids
    known = {-1, *ids.tolist()}
    assert len(ids) == len(index)
    if index.width <= 64:
        q = vectors(2, index.width, 1)
        mask = torch.arange(len(ids)) % 3 == 0
        stages = [(dim, 9 - i) for i, dim in enumerate(index.dims[:5])]
        for how in ({}, {"stages": stages}, {"allowed": mask}, {"allowed": ids[:5]}):
            found = attempt(lambda how=how: index.search(q, 4, **how))
            assert found is None or set(found.ids.ravel().tolist()) <= known
        attempt(lambda: index.range_search(q, 0.0))
        attempt(lambda: index.reconstruct(ids[:70]))
        attempt(lambda: index.add(q))
        attempt(lambda: index.update(ids[:2].unique(), q))
    attempt(lambda: index.contains(ids))
    attempt(lambda: index.remove(ids[5:9]))
    attempt(index.compact)
    shutil.rmtree(out, ignore_errors=True)
    if attempt(lambda: index.save(out) or True):
        assert len(MatryoshkaIndex.load(out, verify=True)) == len(index)


def outcome(seed, made, root, meter):
    """Damages a copy of a folder; returns what was done and what came of it."""
    rng = random.Random(seed)
    origin, original = rng.choice(made)
    how = rng.choice([damage, damage, swap, text, fields, fields, fields, rows])
    held = dict(original)
    how(rng, held)
    folder = root / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(origin, folder)
    for name, data in held.items():
        if data == original[name]:
            continue
        (folder / name).unlink()
        if data == "folder":
            (folder / name).mkdir()
        elif data == "loop":
            (folder / name).symlink_to(name)
        elif data is not None:
            (folder / name).write_bytes(data)
    size = max(path.lstat().st_size for path in folder.iterdir())
    with meter.limit(size):
        found = refused(folder, verify=True)
    if how in (damage, swap, text) and held != original:  # found, unless it means the same
        same = {name for name in held if held[name] != original[name]} == {MANIFEST}
        assert (
            isinstance(found, str)
            or same
            and json.loads(held[MANIFEST]) == json.loads(original[MANIFEST])
        )
    with meter.limit(size):
        index = refused(folder, verify=False)
        if isinstance(index, MatryoshkaIndex):
            use(index, root / "out")
    if isinstance(index, str):
        assert isinstance(found, str)
        return how.__name__, "refused"
    return how.__name__, "found when verified" if isinstance(found, str) else "loaded"


# --- memory and time


def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


class Meter:
    """Limits what may be allocated; of some runs, which it does not limit, it says how much was."""

    def __init__(self):
        self.runs, self.peaks = 0, {"tracemalloc": 0, "resident": 0}

    @contextmanager
    def limit(self, file_bytes):
        self.runs += 1
        if self.runs % 16 == 0:
            tracemalloc.start()
            yield
            self.note("tracemalloc", tracemalloc.get_traced_memory()[1] - file_bytes)
            tracemalloc.stop()
        elif self.runs % 16 == 8:
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmHWM")
            yield
            self.note("resident", status("VmHWM") - before - file_bytes)
        else:
            most = status("VmData") + MANY_BYTES + file_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
            yield
            unlimited = resource.RLIM_INFINITY, resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_DATA, unlimited)

    def note(self, name, peak):
        self.peaks[name] = max(self.peaks[name], peak)


def fuzz(root, begin, count):
    """Runs so many seeds in this process; prints what became of them and the most memory taken."""
    torch.set_num_threads(1)
    root, outcomes, meter = Path(root), Counter(), Meter()
    folder.os.fsync = lambda _: None
    made = bases(root)
    for seed in range(begin, begin + count):
        (root / "seed").write_text(str(seed))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process: it ends if they pass
        outcomes[outcome(seed, made, root, meter)] += 1
    by_kind = {f"{how}, {what}": n for (how, what), n in sorted(outcomes.items())}
    print(json.dumps({"peaks": meter.peaks, "outcomes": by_kind}))


def test_damaged_files(tmp_path):
    count = 600 if TIMES == 1 else 2500 * TIMES
    code = f"from tests.stress.test_fuzz_files import fuzz; fuzz({str(tmp_path)!r}, 1000, {count})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    seed = (tmp_path / "seed").read_text() if (tmp_path / "seed").exists() else None
    assert done.returncode == 0, f"seed {seed}, status {done.returncode}\n{done.stderr}"
    result = json.loads(done.stdout)
    print(json.dumps(result, indent=1))
    assert sum(result["outcomes"].values()) == count
    assert max(result["peaks"].values()) < MANY_BYTES
    for how in ("damage", "swap", "text", "fields"):
        assert result["outcomes"][f"{how}, refused"] > count / 40
    assert result["outcomes"]["rows, loaded"] > count / 40
