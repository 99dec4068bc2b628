"""What tests/helpers/suites.py and tests/README.md name is there."""

import ast
import re
from pathlib import Path

import pytest

from tests.helpers import suites

ROOT = Path(__file__).parents[2]
GUARANTEE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:::(\w+))?`")
README = (ROOT / "tests/README.md").read_text()


def functions(file: str) -> set[str]:
    """Names of a test file's functions, those of its classes as ``Class::name``."""
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        found |= {f"{node.name}::{f.name}" for f in inner if isinstance(f, ast.FunctionDef)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
    return found


def test_every_test_that_the_readme_names_exists():
    named = [line for line in README.split("\n") if "`tests/" in line and line.startswith("|")]
    assert len(named) > 30
    for line in named:
        found = GUARANTEE.findall(line)
        assert found, f"no test is named in {line}"
        for file, *name in found:
            test = "::".join(filter(None, name))
            assert (ROOT / file).exists() and test in functions(file), f"{file}::{test}"


@pytest.mark.parametrize("file", sorted({*suites.QUICK, *suites.FIRST}))
def test_every_file_of_a_suite_exists(file):
    assert (ROOT / file).exists()


@pytest.mark.parametrize("test", [test for test, cases in suites.SHORT.items() if cases])
def test_every_shortened_test_keeps_a_case(test, request):
    collected = [item.nodeid for item in request.session.items]
    if not any(node.startswith(test.split("::")[0]) for node in collected):
        pytest.skip("its file is not part of this run")
    assert any(suites.test_of(node) == test and not suites.is_slow(node) for node in collected)


def test_every_folder_is_described():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} <= set(re.findall(r"^\| `(\w+)/` \|", README, re.M))
