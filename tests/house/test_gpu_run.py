"""The GPU programme comes to its end on tiny shapes, here in Triton's interpreter, and tells."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MODULES = {
    part: f"benchmarks.gpu.{name}" for part, name in ((3, "search"), (4, "index"), (5, "training"))
}


@pytest.fixture(scope="module")
def modules():
    """Of benchmarks/, imported after conftest.py has chosen the interpreter."""
    return {
        name: importlib.import_module(f"benchmarks.gpu.{name}")
        for name in ("measure", "rows", "table")
    }


def program(out, *parts):
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--tiny", "--out", out, "--part", *parts]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(out.glob("*.log")))
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}\n{logs}"
    return {n: json.loads((out / f"part{n}.json").read_text()) for n in parts}


def check_rows(part, state):
    specs = list(importlib.import_module(MODULES[part]).rows(tiny=True))
    assert [row["name"] for row in state["rows"]] == [spec.name for spec in specs]
    assert len({spec.name for spec in specs}) == len(specs)
    assert state["ceilings"]["copy_gbps"] > 0 and state["ceilings"]["bf16_tflops"] > 0
    for row in state["rows"]:
        assert row["status"] == "ok", row
        ours = row["providers"]["mrl_fast"]
        assert 0 < ours["p20_ms"] <= ours["p50_ms"] <= ours["p80_ms"] < math.inf, row
        assert ours["good"] and math.isfinite(ours[row["quality"]]), row
        assert row["bytes"] > 0 and all(count > 0 for count in row["flops"].values()), row
        assert row["formula"] and 0 < row["fraction"] < math.inf, row
        rivals = [name for name in row["providers"] if not name.startswith("mrl_fast")]
        assert rivals and all(row["providers"][name]["ratio"] > 0 for name in rivals), row


@pytest.mark.parametrize("parts", [(1, 2), (3, 5), (4,)], ids=["kernels", "rows", "index"])
def test_the_programme(parts, tmp_path, modules):
    found = program(tmp_path, *parts)
    for part, state in found.items():
        assert [run["exit_code"] for run in state["runs"]] == [0], part
        if part in MODULES:
            check_rows(part, state)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [run["part"] for run in summary["runs"]] == [*parts]
    assert {"commit", "date", "device", "torch", "triton", "python"} <= summary.keys()
    table = (tmp_path / "table.md").read_text()
    for part in {*parts} & MODULES.keys():
        for row in found[part]["rows"]:
            assert f"| {row['name']} |" in table
    if parts != (3, 5):
        return
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- gpu table -->\nold\n<!-- /gpu table -->\nafter\n")
    modules["table"].write_readme(tmp_path, readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- gpu table -->\n") and text.endswith("table -->\nafter\n")
    assert "old" not in text and "`info_nce-bf16-b32768" in text and "`topk-bf16" in text


def row_of(measure, name, result):
    """A row whose provider returns this, and is to return 1."""

    def make():
        calls = {"mrl_fast": lambda: result, "rival": lambda: 1.0}
        return measure.Work(
            calls, lambda name: abs(calls[name]() - 1.0), "error", 0.1, 1.0, {"bf16": 1.0}, "1"
        )

    return measure.Row(name, "1", "fp32", make)


def test_a_row_that_fails_is_kept_and_tells(tmp_path, modules):
    measure, rows = modules["measure"], modules["rows"]
    ceilings = {"copy_gbps": 1.0, "bf16_tflops": 1.0}
    for results, code in ((("good", 1.0),), 0), ((("bad", 2.0), ("good", 1.0)), 1):
        file = tmp_path / f"{code}.json"
        file.write_text(json.dumps({"ceilings": ceilings, "rows": []}))
        made = [row_of(measure, name, result) for name, result in results]
        assert rows.run(made, file, tiny=True, seconds=1, until=100) == code
    bad, good = json.loads(file.read_text())["rows"]
    assert bad["status"] == "failed" and "error 1.0" in bad["why"]
    assert good["status"] == "ok" and good["best_rival"] == "rival"
    (tmp_path / "1.json").rename(tmp_path / "part3.json")
    assert modules["table"].short(bad)[2] == "**failed**"
    assert any("error 1.0" in cell for cell in modules["table"].cells(bad))


def test_rows_go_on_after_one_that_ended_the_process(tmp_path, modules):
    measure, rows = modules["measure"], modules["rows"]
    file = tmp_path / "part3.json"
    state = {"ceilings": {"copy_gbps": 1.0, "bf16_tflops": 1.0}, "rows": [], "running": "fault"}
    file.write_text(json.dumps(state))
    made = [row_of(measure, name, 1.0) for name in ("fault", "next")]
    assert rows.run(made, file, tiny=True, seconds=1, until=100) == 1
    assert [r["status"] for r in json.loads(file.read_text())["rows"]] == ["failed", "ok"]
    assert rows.run(made[1:], tmp_path / "new.json", tiny=True, seconds=1, until=0) == 0
    assert json.loads((tmp_path / "new.json").read_text())["rows"][0]["status"] == "skipped"


def test_a_rival_that_fails_or_errs_is_no_best_rival(modules):
    measure = modules["measure"]

    def broken():
        raise ModuleNotFoundError("No module named 'rival'")

    def make():
        calls = {"mrl_fast": lambda: 1.0, "wrong": lambda: 5.0, "broken": broken}
        return measure.Work(calls, lambda name: calls[name](), "error", 2.0, 1.0, {}, "1")

    row = measure.measure(
        measure.Row("row", "1", "fp32", make), {"copy_gbps": 1.0, "bf16_tflops": 1.0}, 1.0, 3
    )
    assert row["status"] == "ok" and row["best_rival"] is None and row["ratio"] is None
    assert not row["providers"]["wrong"]["good"] and "No module" in row["absent"]["broken"]


def test_exact_scores_by_hand():
    exact = importlib.import_module("benchmarks.gpu.exact")
    q, x = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    expected = {"ip": [25.0, 8.0, 3.0], "cosine": [1.0, 0.8, 0.6], "l2": [0.0, -13.0, -20.0]}
    order = {"ip": [1, 2, 0], "cosine": [1, 2, 0], "l2": [1, 2, 0]}
    for metric, scores in expected.items():
        best, rows = exact.topk(q, x, 3, metric)
        torch.testing.assert_close(best[0], torch.tensor(scores, dtype=torch.float64))
        assert rows[0].tolist() == order[metric]
        torch.testing.assert_close(exact.pair_scores(q, x, rows, metric), best)
    assert exact.recall(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0]])) == 0.5
    for scores, ids in (([2.0, 1.0], [0, 0]), ([1.0, 2.0], [0, 1]), ([2.0, 1.0], [0, 3])):
        with pytest.raises(AssertionError):
            exact.check_form(torch.tensor([scores]), torch.tensor([ids]), 3)


def test_a_readme_without_markers(tmp_path, modules):
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="gpu table"):
        modules["table"].write_readme(tmp_path, tmp_path / "README.md")
