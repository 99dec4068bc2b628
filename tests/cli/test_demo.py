"""The demo as a user meets it: a run on a small package, and questions to what it left."""

import random
import re
import shutil

import pytest
from typer.testing import CliRunner

from mrl_fast.cli.app import app
from tests.helpers.packages import WORDS, documented_functions, install

PNG = b"\x89PNG\r\n\x1a\n"
WRITTEN = [
    "encoder.safetensors", "entries.tsv", "index", "lines.npy", "quality.png", "report.md",
    "search.png",
]  # fmt: skip
RUN = ["demo", "--quick", "--packages", "farm"]


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    """Packages on the path, a cache of their own, and a run's folder with what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    install(folder / "site", "farm", {"farm.py": documented_functions(), "broken.py": "def f(:\n"})
    install(folder / "site", "hut", {"hut.py": 'def f():\n    """Heat all of the hut."""\n'})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "site")
        patch.setenv("MRL_FAST_CACHE", str(folder / "cache"))
        out = folder / "new" / "out"
        done = CliRunner().invoke(app, [*RUN, "--out", str(out)])
        assert done.exit_code == 0, done.output
        yield out, done.stdout


def ask(out, *question, typed=None):
    command = ["demo", "--out", str(out), "--ask", *question]
    return CliRunner().invoke(app, command, input=typed, env={"COLUMNS": "120"})


def rows_of(report, name):
    """The cells of a row, without its name."""
    (line,) = [line for line in report.split("\n") if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_run(farm):
    out, printed = farm
    assert sorted(path.name for path in out.iterdir()) == WRITTEN
    for name in ("quality.png", "search.png"):
        assert (out / name).read_bytes().startswith(PNG)
    report = (out / "report.md").read_text()
    # MRR then recall, each: nested, truncated, PCA
    shortest = [float(cell) for cell in rows_of(report, "16")]
    assert shortest[0] > shortest[1] + 0.05, "nested training should beat truncation at 16 dims"
    assert all(0.8 < float(cell) <= 1 for cell in rows_of(report, "256"))
    assert rows_of(report, "mrl_fast exact")[1] == "1.0000"
    for name in ("mrl_fast adaptive", "FAISS HNSW32"):
        _, recall, *times = rows_of(report, name)
        assert 0.95 < float(recall) <= 1 and all(float(t) > 0 for t in times[:4])
    assert "FAISS flat" in printed and "recall" in printed
    assert "1 of 2 files do not parse and were left out: broken.py" in printed


def test_ask(farm):
    a, b, c, *others = random.Random(7).sample(WORDS, 8)
    done = ask(farm[0], f"{a}s with xyzzy {b}s or {c}s")
    assert done.exit_code == 0, done.output
    name, sentence, *more = done.stdout.split("\n")
    score, package, function = name.split()
    assert (package, function) == ("farm", f"{a}_{b}_{c}") and 0.5 < float(score) <= 1
    assert sentence.strip() == f"With {a}s we find {b}s or {c}s but no {' '.join(others)}."
    assert sum(line.split()[1:2] == ["farm"] for line in more) == 4
    assert re.search(r"[\d.]+ ms; unknown words: xyzzy", done.stdout)


def test_ask_again_and_again(farm):
    chosen = [random.Random(i).sample(WORDS, 3) for i in (8, 9)]
    typed = [" ".join(chosen[0]), "xyzzy", " ".join(chosen[1]), "", "we find"]
    done = ask(farm[0], typed="\n".join(typed))
    assert done.exit_code == 0, done.output
    assert all("_".join(words) in done.stdout for words in chosen)
    assert "expected a word that the documentation uses, got 'xyzzy'" in done.stdout
    assert done.stdout.count(" ms") == 2  # nothing is answered after the empty line


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "--ask: expected a question in words, got ''"),
        ("?!", "--ask: expected a question in words, got '?!'"),
        ("xyzzy plugh", "--ask: expected a word that the documentation uses, got 'xyzzy plugh'"),
    ],
)
def test_questions_without_an_answer(farm, question, message):
    done = ask(farm[0], question)
    assert done.exit_code == 2 and done.stderr == f"mrl-fast: {message}\n"


def test_folders_that_no_demo_wrote(farm, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "file").write_text("a file")
    for name, message in {
        "nowhere": "which is none: `mrl-fast demo` makes one",
        "file": "which is none",
        "foreign": "which has no encoder.safetensors",
    }.items():
        done = ask(tmp_path / name, "sort lamps")
        assert done.exit_code == 2 and "expected a folder that a demo wrote" in done.stderr
        assert message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("encoder.safetensors", "expected an encoder, got"),
        ("lines.npy", "lines.npy: expected where each entry begins"),
        ("entries.tsv", "expected the files of one demo"),
    ],
)
def test_damaged_files(farm, tmp_path, file, message):
    folder = shutil.copytree(farm[0], tmp_path / "copy")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:-100])
    done = ask(folder, "sort lamps")
    assert done.exit_code == 2 and message in done.stderr, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--packages", "farm,nowhere-1"],
            "--packages: expected installed packages, got nowhere-1",
        ),
        (["--packages", "hut"], "packages: expected at least 1,536 documented names, got 1"),
        (["--packages", ""], "packages: expected one that is installed, got"),
        (["sort", "lamps"], "expected --ask before a question, got 'sort lamps'"),
    ],
)
def test_bad_input(farm, tmp_path, arguments, message):
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["demo", "--out", str(out), *arguments])
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert not out.exists()


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("a file")
    done = CliRunner().invoke(app, [*RUN, "--out", str(tmp_path / "file")])
    assert done.exit_code == 2 and "--out: expected a folder" in done.stderr
    assert (tmp_path / "file").read_text() == "a file"
