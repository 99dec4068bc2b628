"""The command line as a user meets it: help, and a package that is not installed."""

import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from mrl_fast import __version__
from mrl_fast.cli.app import app

# That compute.
COMMANDS = (
    "demo", "reproduce", "build", "add", "update", "remove", "compact", "graph", "search", "tune"
)  # fmt: skip


def mrl_fast(*arguments, **environment):
    command = [sys.executable, "-c", "from mrl_fast.cli import main; main()", *map(str, arguments)]
    plain = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
    kept = {k: v for k, v in os.environ.items() if k != "MRL_FAST_DATA"}
    return subprocess.run(
        command, capture_output=True, text=True, env=kept | plain | environment, check=False
    )


def test_help():
    assert re.search(r"Usage: mrl-fast", mrl_fast("--help").stdout)
    for arguments in (["demo", "--help"], []):
        assert "Usage: " in CliRunner().invoke(app, arguments).output
    assert "--ask" in CliRunner().invoke(app, ["demo", "--help"]).stdout


def test_a_command_of_index_without_index():
    done = CliRunner().invoke(app, ["build", "x.npy", "--out", "i"])
    assert done.exit_code == 2 and "it is mrl-fast index build" in " ".join(done.stderr.split())
    assert "mrl-fast index" not in CliRunner().invoke(app, ["biuld"]).stderr


def test_version():
    text = CliRunner().invoke(app, ["--version"]).stdout
    assert text == f"mrl-fast {__version__} (torch {torch.__version__})\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_threads(command):
    """Set for the process before the work, which here fails for want of a file."""
    before = torch.get_num_threads()
    arguments = {
        "demo": ["demo", "why"],
        "reproduce": ["reproduce", "--data", "no-such-folder", "--only", "none"],
        "build": ["index", "build", "none.npy", "--out", "none"],
        "remove": ["index", "remove", "none", "1"],
        "compact": ["index", "compact", "none"],
        "graph": ["index", "graph", "none"],
    }.get(command, ["index", command, "none", "none.npy"])
    try:
        done = CliRunner().invoke(app, [*arguments, "--threads", "3"])
        assert done.exit_code == 2 and done.stderr.startswith("mrl-fast: "), done.output
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert CliRunner().invoke(app, [*arguments, "--threads", "0"]).exit_code == 2


def test_missing_extra():
    code = "import sys; sys.modules['faiss'] = None; from mrl_fast.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "pip install 'mrl-fast[demo]'" in done.stderr
