"""The import graph is the designed one, and the package needs neither Triton nor an extra."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The parts of the package that a part may import, itself included. training and search never import
# one another; evaluate, integrations, experiments and cli stand on top: nothing below imports them.
WINGS = {"shared", "training", "search"}
ALLOWED = {
    "shared": {"shared", "_C"},
    "training": {"shared", "training"},
    "search": {"shared", "search", "kernels"},
    "evaluate": WINGS | {"evaluate"},
    "integrations": WINGS | {"integrations"},
    "experiments": WINGS | {"evaluate", "experiments"},
    "cli": {"shared", "search", "cli", "experiments"},
}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"mrl_fast.{name}" if name.startswith("kernels") else name


SOURCES = [*(ROOT / "mrl_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
FILES = {module_of(path): path for path in sorted(SOURCES)}


def imported(path: Path) -> set[str]:
    """Modules of mrl_fast that a file imports, lazily too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in FILES else node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "mrl_fast"}


def part(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("wing", ALLOWED)
def test_layers(wing):
    files = {module: path for module, path in FILES.items() if part(module) == wing}
    assert files
    for module, path in files.items():
        extra = set(map(part, imported(path))) - ALLOWED[wing]
        assert not extra, f"{module} imports {sorted(extra)}"


def test_every_part_has_a_rule():
    assert {part(module) for module in FILES} - {""} == {*ALLOWED, "kernels", "testing"}


def test_only_one_module_imports_the_extension():
    users = {module for module, path in FILES.items() if "mrl_fast._C" in imported(path)}
    assert users == {"mrl_fast.shared.native"}


def test_kernels_know_only_kernels_of_their_wing():
    for module, path in FILES.items():
        if part(module) != "kernels" or module == "mrl_fast.kernels":
            continue
        wing = module.split(".")[2]
        for name in imported(path):
            assert name.split(".")[1:3] in (["kernels", "shared"], ["kernels", wing]), module
        read = {
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        }
        assert "os" not in read, f"{module}: kernels read no environment"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: imported(path) - {module} for module, path in FILES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done or module not in graph:
            return
        for name in graph[module]:
            visit(name, (*way, module))
        done.add(module)

    for module in graph:
        visit(module, ())


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


def test_the_checkout_on_the_path_does_not_pass_for_the_package_kernels(tmp_path):
    """As in an IDE, or with ``python -c``; transformers asks for PyPI's package of that name."""
    pytest.importorskip("transformers")
    code = """
import transformers
from transformers.integrations import hub_kernels
from transformers.utils.import_utils import is_kernels_available
assert not is_kernels_available()
import kernels
try:
    kernels.scan
except AttributeError as error:
    print(error)
import mrl_fast, mrl_fast.kernels.search
"""
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "installed as mrl_fast.kernels" in done.stdout
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("answer = 42")
    found = python(
        f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.answer)",
        cwd=ROOT,
    )
    assert found.stdout.strip() == "42", found.stderr


def test_wheel_works_outside_the_checkout(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):  # a copy, so that no build folder is left behind
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    if (ROOT / "build/objects").exists():  # only what is older than its sources is compiled
        shutil.copytree(ROOT / "build/objects", source / "build/objects")
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
