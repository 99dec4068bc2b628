"""The command line as a user meets it: help, and a package that is not installed."""

import os
import re
import subprocess
import sys

from typer.testing import CliRunner

from mrl_fast.cli.app import app


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


def test_missing_extra():
    code = "import sys; sys.modules['faiss'] = None; from mrl_fast.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "pip install 'mrl-fast[demo]'" in done.stderr
