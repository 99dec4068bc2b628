"""The import graph is the designed one, and the package needs neither Triton nor an extra."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Which modules of the package each module may import: benchmarks, tests → API → implementations.
ALLOWED = {
    "_types": set(),
    "_checks": set(),
    "_arrays": {"_types"},
    "_dispatch": set(),  # names the implementations as strings and imports the one it picks
    "reference": {"_types"},
    "cpu": {"_C", "_checks", "cpu"},
    "testing": set(),
    "engine": {"_dispatch"},
    "heads": {"_types", "_checks", "_dispatch", "reference", "engine"},
    "losses": {"_types", "_checks", "_dispatch", "reference", "engine", "heads", "losses"},
    "retrieval": {"_types", "_checks", "_arrays", "_dispatch"},
    "rotation": {"cpu"},
    "tune": {"_types", "_checks", "_arrays"},
    "_inputs": {"_arrays", "_checks", "_dispatch"},
    "_tensorfile": {"_arrays"},
    "manifest": {"_C"},
    "files": {"_C", "_tensorfile", "cpu", "manifest"},
    "gpu": {"_C", "cpu", "gpu", "kernels", "rotation"},
    "collection": {"_arrays", "_checks", "_dispatch", "_inputs", "cpu", "gpu", "rotation"},
    "index": {
        "_types",
        "_arrays",
        "_checks",
        "_inputs",
        "cpu",
        "collection",
        "files",
        "integrations",
        "tune",
    },  # fmt: skip
    "integrations": {
        "_arrays",
        "_checks",
        "_dispatch",
        "_types",
        "engine",
        "heads",
        "index",
        "integrations",
        "losses",
        "reference",
        "modules",
        "retrieval",
    },  # fmt: skip
    "modules": {"_checks", "heads", "losses"},
    "adaptive": {"_checks", "_types", "heads"},
    "evaluate": {"_checks", "_types", "evaluate", "heads", "modules", "retrieval"},
    "demo": {"demo", "evaluate", "index", "modules", "retrieval"},
    "reproduce": {"adaptive", "demo", "evaluate", "heads", "modules", "reproduce", "retrieval"},
    "readers": {"_parquet"},  # where it is needed
    "_parquet": {"readers"},
    "cli": {"_arrays", "_types", "cli", "demo", "index", "manifest", "readers", "reproduce"},
}


def imported(path: Path) -> set[str]:
    """Modules of mrl_fast that a file imports, by their first name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "mrl_fast"
        ):
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mrl_fast.")}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
    return names


@pytest.mark.parametrize("module", ALLOWED)
def test_layers(module):
    path = ROOT / "mrl_fast" / module
    files = [*path.rglob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
    extra = set().union(*map(imported, files)) - ALLOWED[module]
    assert not extra, f"{module} imports {sorted(extra)}"


def test_kernels_know_only_kernels():
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert len(files) > 3
    for path in files:
        assert imported(path) <= {"kernels"}, path
        top = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
        }
        assert "os" not in top, f"{path}: kernels read no environment"


def python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


def test_import_without_triton_and_extras():
    code = """
import sys
for name in (
    "triton", "faiss", "sklearn", "matplotlib", "rich", "typer", "langchain_core", "llama_index",
    "sentence_transformers", "pyarrow", "safetensors", "scipy", "transformers",
):
    sys.modules[name] = None
import torch, mrl_fast
x = torch.eye(5)
print(mrl_fast.prefix_topk(x, x, 1).ids.ravel().tolist())
try:
    mrl_fast.prefix_topk(x, x, 1, impl="triton")
except ValueError as error:
    print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "[0, 1, 2, 3, 4]"
    assert "impl: 'triton' needs the triton package" in done.stdout


def test_top_level_name_kernels_is_refused(tmp_path):
    done = python("import kernels", cwd=ROOT)
    assert done.returncode != 0 and "installed as mrl_fast.kernels" in done.stderr


def test_wheel_works_outside_the_checkout(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):  # a copy, so that no build folder is left behind
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    code = f"""
import sys
sys.path.insert(0, {str(wheel)!r} + ".dir")
import mrl_fast, mrl_fast.kernels, torch
assert ".whl.dir" in mrl_fast.__file__ and ".whl.dir" in mrl_fast.kernels.__file__
index = mrl_fast.MatryoshkaIndex((2, 8))
index.add(torch.eye(8))
print(index.search(torch.eye(8), 1).ids.ravel().tolist())
"""
    zipfile.ZipFile(wheel).extractall(f"{wheel}.dir")
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0, 1, 2, 3, 4, 5, 6, 7]"
