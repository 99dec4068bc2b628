"""The command line as a user meets it: the demo on real data, and what it says to bad input."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from mrl_fast.cli.app import app

PNG = b"\x89PNG\r\n\x1a\n"


def mrl_fast(*arguments, **environment):
    command = [sys.executable, "-c", "from mrl_fast.cli import main; main()", *map(str, arguments)]
    plain = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
    kept = {k: v for k, v in os.environ.items() if k != "MRL_FAST_DATA"}
    return subprocess.run(
        command, capture_output=True, text=True, env=kept | plain | environment, check=False
    )


def cells(report, name):
    """A row of the report, without its name."""
    (line,) = [line for line in report.split("\n") if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_demo_on_digits(tmp_path):
    out = tmp_path / "new" / "out"
    done = mrl_fast("demo", "--out", out, "--quick")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["accuracy.png", "recall.png", "report.md"]
    for name in ("accuracy.png", "recall.png"):
        assert (out / name).read_bytes().startswith(PNG)
    report = (out / "report.md").read_text()
    # linear then 1-NN, each: nested, truncated, PCA
    shortest = [float(cell) for cell in cells(report, "2")]
    assert shortest[3] > shortest[4] + 5, "nested training should beat truncation at 2 dims"
    assert all(85 < float(cell) <= 100 for cell in cells(report, "64"))
    assert cells(report, "mrl_fast exact")[1] == "1.0000"
    for name in ("mrl_fast adaptive", "mrl_fast funnel"):
        stages, recall, *times = cells(report, name)
        assert "→" in stages and 0.9 < float(recall) <= 1 and all(float(t) > 0 for t in times)
    assert "FAISS flat" in done.stdout and "recall@10" in done.stdout


def test_help():
    assert re.search(r"Usage: mrl-fast", mrl_fast("--help").stdout)
    for arguments in (["demo", "--help"], []):
        assert "Usage: " in CliRunner().invoke(app, arguments).output
    assert "--data" in CliRunner().invoke(app, ["demo", "--help"]).stdout


@pytest.fixture
def damaged(tmp_path):
    """Folders that are not Fashion-MNIST, each wrong in its own way."""
    for name in ("empty", "garbage", "keys", "shape"):
        (tmp_path / name).mkdir()
    (tmp_path / "garbage" / "fashion_mnist.npz").write_bytes(b"PK not really")
    images, labels = np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8)
    np.savez(tmp_path / "keys" / "fashion_mnist.npz", x_train=images)
    np.savez(
        tmp_path / "shape" / "fashion_mnist.npz",
        x_train=images, y_train=labels[:3], x_test=images, y_test=labels,
    )  # fmt: skip
    (tmp_path / "file").write_text("a file")
    return tmp_path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "--data: expected a folder"),
        ("file", "--data: expected a folder"),
        ("empty", "--data: expected fashion_mnist.npz in"),
        ("garbage", "--data: expected a readable"),
        ("keys", "--data: expected a readable"),
        ("shape", "--data: expected images [n, h, w] uint8 and labels [n]"),
    ],
)
def test_bad_data(damaged, data, message):
    command = ["demo", "--out", str(damaged / "out")]
    for options, environment in (
        (["--data", str(damaged / data)], {"MRL_FAST_DATA": None}),
        ([], {"MRL_FAST_DATA": str(damaged / data)}),
    ):
        done = CliRunner().invoke(app, [*command, *options], env=environment)
        assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr
        assert not (damaged / "out").exists()


def test_out_that_is_a_file(damaged):
    done = mrl_fast("demo", "--out", damaged / "file")
    assert done.returncode == 2 and "--out: expected a folder" in done.stderr
    assert (damaged / "file").read_text() == "a file"


def test_missing_extra():
    code = "import sys; sys.modules['faiss'] = None; from mrl_fast.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "pip install 'mrl-fast[demo]'" in done.stderr
