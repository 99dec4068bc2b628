"""The GPU programme comes to its end on tiny shapes, here in Triton's interpreter, and tells."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def modules():
    """Of benchmarks/, imported after conftest.py has chosen the interpreter."""
    names = "cache", "measure", "rows", "run", "stages", "table"
    return {name: importlib.import_module(f"benchmarks.gpu.{name}") for name in names}


def program(out, *options):
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--tiny", "--out", out, *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(out.rglob("*.log")))
    return done, f"{done.stderr}\n{done.stdout}\n{logs}"


def check_rows(specs, state):
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
        eight_bits = row["dtype"] in ("int8", "fp8")  # whose rival needs a GPU
        assert eight_bits or rivals, row
        assert all(row["providers"][name]["ratio"] > 0 for name in rivals), row


def test_the_programme(tmp_path, modules):
    done, told = program(tmp_path)
    assert done.returncode == 0, told
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"commit", "date", "device", "torch", "triton", "python"} <= results[
        "environment"
    ].keys()
    runs = {run["name"]: run for run in results["runs"]}
    planned = [command.name for stage in modules["stages"].TINY for command in stage.commands]
    assert runs.keys() == {*planned}
    assert all(run["exit_code"] == 0 and not run["failed"] for run in runs.values()), told
    groups = modules["rows"].GROUPS
    for name, group in {"rows": "main", "index": "index"}.items():
        check_rows([*groups[group](tiny=True)], runs[name]["found"])
    cases = runs["kernels"]["found"]
    assert len(cases) > 20 and all(case["status"] == "ok" for case in cases)
    assert any(case["name"].startswith("margin fp32 on fp16") for case in cases)
    assert all(rows and rows[0]["us"] > 0 for rows in runs["profile"]["found"].values())
    assert "passed" in runs["tests"]["last_line"]
    table = (tmp_path / "table.md").read_text()
    for name in ("rows", "index"):
        assert all(f"| {row['name']} |" in table for row in runs[name]["found"]["rows"])
    assert f"| kernels | {len(cases)} of {len(cases)} |" in table
    assert "## Kernels of info_nce, a step" in table
    assert "passed" in (tmp_path / "log.txt").read_text()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- gpu table -->\nold\n<!-- /gpu table -->\nafter\n")
    modules["table"].write_readme(tmp_path, readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- gpu table -->\n") and text.endswith("table -->\nafter\n")
    assert "old" not in text and "`info_nce-bf16-b32768" in text and "`topk-bf16" in text


def test_the_second_form_repeats_what_failed(tmp_path):
    """A case, a row and a test that failed, of all that there are."""
    wrong = {"kernels": ["phases l2 fp8 2q 21d"], "rows": ["rerank-bf16-d1024-c200-q1024"]}
    runs = [
        {"name": name, "failed": name in wrong, "wrong": wrong.get(name, []), "stage": "everything"}
        for name in ("kernels", "rows", "index", "tests", "profile")
    ]
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs}))
    done, told = program(tmp_path, "--again")
    assert done.returncode == 0, told
    again = json.loads((tmp_path / "again/results.json").read_text())["runs"]
    found = {run["name"]: run["found"] for run in again}
    assert [case["name"] for case in found.pop("kernels")] == wrong["kernels"]
    assert [row["name"] for row in found.pop("rows")["rows"]] == wrong["rows"]
    assert not found


def test_stages_end_in_time(modules):
    stages = modules["stages"]
    ends = [stage.until for stage in stages.STAGES]
    assert ends == sorted(ends) and ends[-1] == stages.SECONDS == 530
    names = [command.name for stage in stages.STAGES for command in stage.commands]
    assert len(names) == len({*names})
    order = [stage.name for stage in stages.STAGES]
    assert order.index("kernels") < order.index("memcheck") < order.index("rows")
    everything = {"runs": [{"name": n, "failed": True, "wrong": ["one"]} for n in names]}
    again = stages.again(everything)
    assert [stage.name for stage in again] == order
    assert again[-1].until <= stages.AGAIN_SECONDS - 5
    tests = next(c for stage in again for c in stage.commands if c.kind == "tests")
    assert tests.args[-1] == "one" and "tests/" not in " ".join(tests.args)
    assert not stages.again({"runs": [{"name": n, "failed": False} for n in names]})


def stage_of(modules, tmp_path, code, **options):
    """A stage of one command, a module with this code."""
    (tmp_path / "made_for_a_test.py").write_text(code)
    command = modules["stages"].Command("it", "made_for_a_test", **options)
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    stage = modules["stages"].Stage("one", modules["run"].GRACE_SECONDS + 1.5, (command,))
    begin = time.monotonic()
    (found,) = modules["run"].run_stage(stage, begin, tmp_path, variables)
    return found, time.monotonic() - begin


def test_a_command_that_hangs_is_ended(tmp_path, modules, monkeypatch):
    monkeypatch.setattr(modules["run"], "GRACE_SECONDS", 1.0)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    found, seconds = stage_of(modules, tmp_path, code)
    assert found["failed"] and found["exit_code"] == modules["run"].TIMED_OUT
    assert 1 < seconds < 10


def test_a_command_that_only_informs_fails_nothing(tmp_path, modules):
    code = "print('a hazard'); raise SystemExit(9)"
    found, _ = stage_of(modules, tmp_path, code, informs=True)
    assert not found["failed"] and found["exit_code"] == 9 and found["last_line"] == "a hazard"
    found, _ = stage_of(modules, tmp_path, code)
    assert found["failed"]


def test_a_test_that_failed_is_named(tmp_path, modules):
    code = "print('FAILED tests/kernels/test_topk.py::test_a[x-1] - assert'); raise SystemExit(1)"
    found, _ = stage_of(modules, tmp_path, code, kind="tests")
    assert found["wrong"] == ["tests/kernels/test_topk.py::test_a[x-1]"]


def test_a_case_that_errs_or_is_not_a_number_fails(monkeypatch, tmp_path):
    kernels = importlib.import_module("benchmarks.gpu.kernels")

    def broken():
        raise RuntimeError("a fault")

    made = [("good", 1.0, lambda: 0.5), ("bad", 1.0, lambda: 2.0),
            ("nan", 1.0, lambda: math.nan), ("broken", 1.0, broken)]  # fmt: skip
    monkeypatch.setattr(kernels, "cases", lambda *_: iter(made))
    assert kernels.main(["--json", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["status"] for row in found] == ["ok", "failed", "failed", "failed"]
    assert found[3]["why"] == "RuntimeError: a fault"
    assert kernels.main(["--only", "good"]) == 0
    sizes = importlib.import_module("benchmarks.gpu.sizes")
    one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
    assert sizes.worst([one, one], [one, 2 * one]) == 0.5
    assert math.isnan(sizes.worst([nan, one], [one, one]))


def commands_of_the_stub():
    stages = importlib.import_module("benchmarks.gpu.stages")
    return {c.name: c for c in stages.compiled() if c.kind != "tests"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stub stands in for a GPU")
@pytest.mark.parametrize("name", commands_of_the_stub())
def test_a_command_launches_what_it_is_for(name, tmp_path):
    """At its own shapes, by the stub: cases, rows and calls are made, their kernels launched."""
    command = commands_of_the_stub()[name]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = ["-m", "benchmarks.gpu.stub", "count", str(tmp_path / "counts.json"), *command.calls]
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["code"] in (0, None), done.stdout
    kernels = {"_scan_kernel", "_narrow_kernel", "_decode_kernel"}
    if name == "probe":
        kernels = {"_keys_kernel", "_decode_kernel"}
    elif "low" in name:
        kernels |= {"_split_kernel"}
    elif name in ("rows", "profile"):
        kernels |= {"_statistics_kernel", "_score_gradients_kernel"}
    assert kernels <= counts["kernels"].keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stub stands in for a GPU")
def test_a_cache_travels(tmp_path, modules, monkeypatch):
    """Made by the stub, packed, unpacked where libtriton differs: there nothing is compiled."""
    cache = modules["cache"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "there"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks.gpu.stub", "compile", str(tmp_path / "counts.json")]

    def probe():
        done = subprocess.run(
            [*words, "benchmarks.gpu.cache", "probe"],
            env=environment, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "counts.json").read_text())

    first = probe()
    assert (first["hits"], first["compiled"], first["code"]) == (0, first["launches"], 0)
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "there")
    monkeypatch.setattr(cache, "ARCHIVE", tmp_path / "cache.tar.xz")
    assert 0 < cache.pack() < cache.MOST_BYTES
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    cache.unpack()
    there = [file for file in (tmp_path / "there").rglob("*") if file.is_file()]
    assert {file.suffix for file in there} <= {".cubin", ".json", ".c"}
    (tmp_path / "sitecustomize.py").write_text(
        "from triton.runtime import cache\ncache.triton_key = lambda: 'another libtriton'\n"
    )
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    second = probe()
    assert (second["hits"], second["compiled"]) == (first["compiled"], 0)


def row_of(measure, name, result):
    """A row whose provider returns this, and is to return 1."""

    def make():
        calls = {"mrl_fast": lambda: result, "rival": lambda: 1.0, "compiled": lambda: 1.0}
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
    assert good["providers"].keys() == {"mrl_fast", "rival"}  # what is compiled has its own stage
    assert modules["table"].short(bad)[2] == "**failed**"
    assert any("error 1.0" in cell for cell in modules["table"].cells(bad))
    file = tmp_path / "compiled.json"
    file.write_text(json.dumps({"ceilings": ceilings, "rows": []}))
    made = [row_of(measure, "good", 1.0)]
    assert rows.run(made, file, tiny=True, seconds=1, until=100, provider="compiled") == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["providers"].keys() == {"mrl_fast", "compiled"}


def test_rows_go_on_after_one_that_ended_the_process(tmp_path, modules):
    measure, rows = modules["measure"], modules["rows"]
    file = tmp_path / "rows.json"
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
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="gpu table"):
        modules["table"].write_readme(tmp_path, tmp_path / "README.md")
