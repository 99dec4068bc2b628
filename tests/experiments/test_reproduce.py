"""The reproduction's quick form, end to end: numbers that have to agree, a run that goes on where
it was stopped, and claims that can fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mrl_fast.experiments import reproduce
from mrl_fast.experiments.reproduce import claims, data
from mrl_fast.experiments.reproduce.claims import (
    FAILS,
    HOLDS,
    UNSHOWN,
    Claim,
    Difference,
    Interval,
    judge,
)

FIGURES = ("adaptive", "few_shot", "linear", "nearest", "retrieval", "structure")


def mrl_fast(*arguments):
    command = [sys.executable, "-c", "from mrl_fast.cli import main; main()", *map(str, arguments)]
    kept = {k: v for k, v in os.environ.items() if k != "MRL_FAST_DATA"}
    plain = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, env=kept | plain, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce") / "new" / "out"
    done = mrl_fast("reproduce", "--quick", "--seeds", 2, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert f"Wrote {folder / 'report.html'}" in done.stdout
    return folder


def cells_of(out: Path, name: str) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(out.glob(f"cells/quick-{name}-*.json"))]


def test_report(out):
    text = (out / "report.md").read_text()
    verdicts = [
        line for line in text.split("\n") if re.search(r"\*\*(holds|does not|cannot)", line)
    ]
    assert len(verdicts) == len(claims.CLAIMS)
    for name in ("synthetic, ", "digits"):
        assert name.strip(", ") in text
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(FIGURES) and ".png" not in page
    assert page.count("<table") == text.count("\n|---") and 'class="claims"' in page
    for name in FIGURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*partial*"))


@pytest.mark.parametrize("name", ["synthetic", "digits"])
def test_what_has_to_agree(out, name):
    found = cells_of(out, name)
    assert [cell["seed"] for cell in found] == [0, 1] and found[0]["linear"] != found[1]["linear"]
    for cell in found:
        linear, nearest, between = cell["linear"], cell["nearest"], cell["interpolated"]
        assert abs(linear["SVD"][-1] - linear["FF"][-1]) < 0.005  # all directions: the net's own
        assert nearest["truncated FF"][-1] == nearest["FF"][-1]
        assert nearest["MRL"] == [
            between["nearest"][between["dims"].index(d)] for d in cell["dims"]
        ]
        assert cell["oracle"] >= max(linear["MRL"])
        curve = cell["adaptive"]["curve"]
        assert curve[0]["dims"] == cell["dims"][0] and curve[0]["accuracy"] == linear["MRL"][0]
        assert curve[-1]["dims"] > curve[0]["dims"]
        single = {s["stages"][0][0]: s for s in cell["searches"] if s["kind"] == "single"}
        assert [single[d]["map"] for d in cell["dims"]] == cell["map"]["MRL"]
        assert [single[d]["top1"] for d in cell["dims"]] == nearest["MRL"]
        rows, width = cell["rows"]["train"], cell["dims"][-1]
        assert single[width]["macs"] == rows * width
        (adaptive,) = (s for s in cell["searches"] if s["stages"] == [[4, 200], [width, 10]])
        assert adaptive["macs"] == 4 * rows + 200 * width
        assert all(0 <= v <= 1 for values in linear.values() for v in values)
    assert min(found[0]["linear"]["FF"][2:]) > 0.6, "the nets learn nothing"


def test_goes_on_where_it_was_stopped(out, tmp_path):
    kept = tmp_path / "out"
    (kept / "cells").mkdir(parents=True)
    for file in out.glob("cells/*.json"):
        (kept / "cells" / file.name).write_bytes(file.read_bytes())
    damaged, missing, old = (kept / "cells" / f"quick-{n}.json" for n in CELLS)
    damaged.write_text(json.dumps({"recipe": reproduce.RECIPE}))
    missing.unlink()
    cell = json.loads(old.read_text())
    old.write_text(json.dumps(cell | {"recipe": 0}))
    times = {file: file.stat().st_mtime_ns for file in kept.glob("cells/*.json")}
    measured = []

    def stub(task, seed, **options):
        measured.append((task.name, seed))
        return cells_of(out, task.name)[seed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "measure", stub)
        reproduce.run_reproduce(kept, None, seeds=2, quick=True, progress=False)
    assert sorted(measured) == [("digits", 0), ("digits", 1), ("synthetic", 1)]
    untouched = kept / "cells" / "quick-synthetic-0.json"
    assert untouched.stat().st_mtime_ns == times[untouched]
    for file in (damaged, missing, old):
        assert json.loads(file.read_text()) == json.loads((out / "cells" / file.name).read_text())
    same = [(folder / "report.md").read_text() for folder in (out, kept)]
    assert same[0] == same[1]


CELLS = ("digits-0", "digits-1", "synthetic-1")


def test_claims_hold_fail_or_are_not_shown():
    def verdict(*values, bound=0.0):
        claim = Claim("", "", lambda cell: {"a": Difference(cell["a"], bound)})
        return judge(claim, [{"a": value} for value in values])

    assert verdict(1.0, 1.2, 0.9).word == HOLDS
    assert verdict(1.0, 1.2, 0.9, bound=2).word == FAILS
    assert verdict(-1.0, 1.2, 0.9).word == UNSHOWN
    assert verdict(1.0).word == UNSHOWN  # one seed has no interval
    assert judge(Claim("", "", lambda cell: None), [{}]).word == UNSHOWN
    several = Claim("", "", lambda c: {n: Difference(c[n], 0) for n in "abc"})
    seeds = [{"a": 1.0 + i, "b": -1 - i / 9, "c": -5 - i / 9} for i in range(3)]
    word, why = judge(several, seeds)
    assert word == FAILS and why.startswith("c: -5.1") and why.endswith("; 1 more")


def test_errors_at_random_hold_no_superclass():
    """Half of 4 superclasses' rows right, the rest anywhere: no more than chance is shown."""
    (claim,) = (c for c in claims.CLAIMS if c.name.startswith("Superclasses"))
    chance = 0.2
    fine, coarse = [0.5, 0.7], [0.5 + 0.5 * chance, 0.7 + 0.3 * chance]
    cell = {
        "dims": [4, 8],
        "linear": {"MRL": fine},
        "superclass": {"MRL": coarse, "chance": chance},
    }
    assert judge(claim, [cell] * 3).word == FAILS
    cell["superclass"] = {"MRL": [0.9, 0.95], "chance": chance}
    assert judge(claim, [cell] * 3).word == HOLDS
    assert judge(claim, [{}]).word == UNSHOWN


def test_interval():
    # Student's t of 2 degrees of freedom at 97.5 %: 4.3027
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2 and interval.half == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert f"{interval:.1f}" == "2.0 ± 2.5" and f"{interval:+.1f}" == "+2.0 ± 2.5"
    assert f"{Interval.of([1.0]):.1f}" == "1.0"


def test_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    for options, message in [
        ({"only": "imagenet"}, "--only: expected one of synthetic"),
        ({"only": "banking77"}, "--data: expected the folder that holds banking77"),
        ({"out": tmp_path / "file"}, "--out: expected a folder"),
        ({"seeds": 1}, "--seeds: expected at least 2"),
        ({"data_folder": tmp_path, "only": "Fashion-MNIST"}, "--data: expected fashion_mnist.npz"),
        ({"data_folder": tmp_path, "only": "banking77"}, "--data: expected banking77/train.csv"),
    ]:
        with pytest.raises(ValueError, match=message):
            reproduce.run_reproduce(
                **{"out": out, "data_folder": None, "progress": False, **options}
            )
        assert not out.exists()
    done = mrl_fast("reproduce", "--out", out, "--only", "imagenet")
    assert done.returncode == 2 and done.stderr.startswith("mrl-fast: --only: expected one of")


def test_banking77(tmp_path, monkeypatch):
    folder = tmp_path / "banking77"
    folder.mkdir()
    rows = [f'"text, {i}",{"card" if i % 2 else "cash"}' for i in range(2000)]
    (folder / "train.csv").write_text("\n".join(["text,category", *rows]))
    (folder / "test.csv").write_text("\n".join(["text,category", *rows[:3]]))
    calls = []

    def encode(texts):
        calls.append(len(texts))
        return torch.full((len(texts), 384), 384**-0.5) * torch.arange(1, len(texts) + 1)[:, None]

    monkeypatch.setattr(data, "encode_sentences", encode)
    cache = tmp_path / "out" / "vectors.safetensors"
    task = data.banking77(tmp_path, cache, 0, lambda what: None)
    again = data.banking77(tmp_path, cache, 0, lambda what: None)
    assert calls == [2000, 3], "encoded twice"
    assert torch.equal(task.inputs["train"], again.inputs["train"])
    assert {part: len(x) for part, x in task.inputs.items()} == {
        "holdout": 1500, "train": 500, "test": 3,
    }  # fmt: skip
    # a row and its label stay together: row i holds i + 1, and even rows are "cash", 1
    assert torch.equal(task.labels["train"], task.inputs["train"][:, 0].round().long() % 2)
    assert task.labels["test"].tolist() == [1, 0, 1]
    cache.write_bytes(cache.read_bytes()[:100])  # damaged, then of other texts
    assert torch.equal(
        data.banking77(tmp_path, cache, 0, print).inputs["test"], task.inputs["test"]
    )
    (folder / "train.csv").write_text("\n".join(["text,category", *reversed(rows)]))
    assert not torch.equal(
        data.banking77(tmp_path, cache, 0, print).labels["train"], task.labels["train"]
    )
    assert calls == [2000, 3] * 3
    (folder / "train.csv").write_bytes(b"text,category\n\xff\xfe,card\n")
    with pytest.raises(ValueError, match="expected a readable .*train.csv"):
        data.banking77(tmp_path, cache, 0, print)
    (folder / "train.csv").write_text("\n".join(["text,category", *rows[:1510]]))
    with pytest.raises(ValueError, match="expected 1500 training rows and 20 more a class"):
        data.banking77(tmp_path, cache, 0, print)
    (folder / "train.csv").write_text("\n".join(["text,category", *rows]))
    (folder / "test.csv").write_text("text,category\nwhat,unknown\n")
    with pytest.raises(ValueError, match="categories in train.csv, got {'unknown'}"):
        data.banking77(tmp_path, cache, 0, lambda what: None)
    (folder / "test.csv").write_text("text\nwhat\n")
    with pytest.raises(ValueError, match="expected columns text and category"):
        data.banking77(tmp_path, cache, 0, lambda what: None)


def test_synthetic_is_of_its_seed_alone():
    first, same, other = (data.synthetic(seed, quick=True) for seed in (3, 3, 4))
    assert torch.equal(first.inputs["test"], same.inputs["test"])
    assert not torch.equal(first.inputs["test"], other.inputs["test"])
    assert torch.equal(first.superclass[first.labels["train"]] % 8, first.labels["train"] % 8)
