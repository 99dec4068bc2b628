"""The examples run, in their quick form and with no network, and what they print holds."""

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import mrl_fast

EXAMPLES = Path(__file__).parents[2] / "examples"
ROW = re.compile(r" +(\d+)((?: +-?[\d.]+)+)")


def test_readme(capsys, recwarn):
    """Its first blocks run as they stand: a search finds what it asks for, every prefix is judged,
    a head learns."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    torch.manual_seed(0)
    blocks, names = re.findall(r"```python\n(.*?)```", readme, re.S), {}
    exec("".join(blocks[:3]), names)
    assert all(tensor.grad.any() for tensor in [names["features"], *names["head"].parameters()])
    found = capsys.readouterr().out.split("\n")
    assert any("name='inv'" in line for line in found[:3]), found
    quality = re.findall(r"(\d+): MRR@10 (\S+), recall@10 (\S+)", found[3])
    assert [dim for dim, *_ in quality] == ["16", "64", "256"]
    assert all(0.2 < float(mrr) < float(recall) < 1 for _, mrr, recall in quality), quality


ELSEWHERE = "# elsewhere\n"  # the first line of a block that runs where mrl_fast is not
FOUND = """
found = [x, by_export, by_trace, by_onnx, exported, traced, evaluated, features, logits, short]
torch.save(found, "found.pt")
"""


def test_deploying(tmp_path, monkeypatch, capsys):
    """Every block of the page runs, and what runs elsewhere gives the values of what was made."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    page = (EXAMPLES.parent / "docs/deploying.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    elsewhere = [block for block in blocks if block.startswith(ELSEWHERE)]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        exec("".join(block for block in blocks if block not in elsewhere), names)
    assert "rows ended" in capsys.readouterr().out  # the report
    code = "".join(["import sys; sys.modules['mrl_fast'] = None\n", *elsewhere, FOUND])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x, *found = torch.load("found.pt", weights_only=False)
    head, classifier = names["head"], names["classifier"]
    with torch.no_grad():
        features = names["backbone"](x)
        expected = [head(features)] * 3 + [classifier(features)] * 3
    for actual, wanted in zip(found[:6], expected, strict=True):
        torch.testing.assert_close([*map(torch.as_tensor, actual)], [*wanted])
    features, logits, short = found[6:]
    torch.testing.assert_close(torch.stack(logits), head(features))
    assert torch.equal(short, logits[0])


@pytest.mark.parametrize("name", ["serving", "shards"])
def test_serving(name, tmp_path, monkeypatch):
    """Every block of the page runs."""
    page = (EXAMPLES.parent / f"docs/{name}.md").read_text()
    monkeypatch.chdir(tmp_path)
    try:
        exec("".join(re.findall(r"```python\n(.*?)```", page, re.S)), {})
    finally:
        mrl_fast.set_num_threads(None)


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")  # both losses learn from what one of them read


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_two_towers(run, loss, cache, monkeypatch):
    monkeypatch.setenv("MRL_FAST_CACHE", str(cache))
    dims, (first, last, before, after), _ = run("two_towers.py", "--loss", loss)
    assert dims == [8, 16, 32, 64, 128]
    assert all(b < 0.6 * a for a, b in zip(first, last, strict=True))
    assert all(percent < 2.0 for percent in before)  # chance is 0.2
    assert all(percent > 5.0 for percent in after)
    assert min(after[1:]) > 10.0


@pytest.mark.parametrize("options", [(), ("--sparse", "--spread-out", "100")], ids=str)
def test_static_retrieval(run, options, cache, monkeypatch):
    """With any options every prefix learns, more columns find more, and so do their signs."""
    monkeypatch.setenv("MRL_FAST_CACHE", str(cache))
    dims, results, printed = run("static_retrieval.py", "--profile", *options)
    first, last, mrr, recall, by_signs = results
    assert dims == [16, 32, 64, 128, 256]
    assert all(b < 0.8 * a for a, b in zip(first, last, strict=True))
    assert sorted(mrr) == list(mrr) and mrr[0] > 0.05 and mrr[-1] > 0.15
    assert all(m < r < 1 for m, r in zip(mrr, recall, strict=True))
    assert sorted(by_signs) == list(by_signs) and by_signs[-1] > 60.0
    parts = re.search(r"a step of [\d.]+ ms: embed .* loss .* backward .* optimizer .*", printed)
    assert parts and sum(int(s) for s in re.findall(r"\((\d+)%\)", parts[0])) in range(98, 103)


def test_missing_data_is_named(run, tmp_path):
    with pytest.raises(SystemExit, match=f"--data: expected a folder with .*{tmp_path}"):
        run("masked_language_model.py", "--data", str(tmp_path))
