"""The examples run, in their quick form and with no network, and what they print holds."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
ROW = re.compile(r" +(\d+)((?: +-?[\d.]+)+)")


def test_readme(capsys, recwarn):
    """Its first lines run as they stand, and find what they ask for."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    torch.manual_seed(0)
    exec(re.findall(r"```python\n(.*?)```", readme, re.S)[0], {})
    found = capsys.readouterr().out.split("\n")[:3]
    assert any("name='inv'" in line for line in found), found


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example: its table's dims and columns, and all that it printed."""
    monkeypatch.delenv("MRL_FAST_DATA", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its steps are too small for two that wait for one another

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, "--quick", *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out
        rows = [match for line in printed.split("\n") if (match := ROW.fullmatch(line))]
        columns = zip(*[map(float, row[2].split()) for row in rows], strict=True)
        return [int(row[1]) for row in rows], list(columns), printed

    yield run
    torch.set_num_threads(threads)


def test_masked_language_model(run):
    dims, (first, last, accuracy), printed = run("masked_language_model.py")
    assert dims == [16, 32, 64, 128]
    assert all(6.0 < loss < 6.5 for loss in first)  # about ln 500: nothing is known yet
    assert all(b < a - 0.5 for a, b in zip(first, last, strict=True))
    assert last[-1] < last[0]  # more columns, a better guess
    assert all(2.0 < percent < 50.0 for percent in accuracy)  # chance is 0.2
    assert "equal losses and gradients" in printed  # asserted there, before it is printed


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_clip(run, loss):
    dims, (first, last, before, after), _ = run("clip.py", "--loss", loss)
    assert dims == [4, 8, 16, 32, 64]
    assert all(b < 0.8 * a for a, b in zip(first, last, strict=True))
    assert all(percent < 40.0 for percent in before)  # chance is 10
    assert all(percent > 75.0 for percent in after)
    assert min(after[1:]) > 90.0


@pytest.mark.parametrize("name", ["clip.py", "masked_language_model.py"])
def test_missing_data_is_named(run, name, tmp_path):
    with pytest.raises(SystemExit, match=f"--data: expected a folder with .*{tmp_path}"):
        run(name, "--data", str(tmp_path))
