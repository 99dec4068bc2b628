"""Files, functions and signatures keep the sizes that one reads at a sitting."""

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mrl_fast
import mrl_fast.evaluate
import mrl_fast.integrations.sentence_transformers as drop_ins

ROOT = Path(__file__).parents[2]
CEILING, MEDIAN = 400, 150  # lines of a file
BODY, PARAMETERS = 60, 8  # lines of a function's code; what a signature takes
# Their signatures are what users call: the functions of __all__, and public methods of these.
CONTRACT = {*mrl_fast.__all__, *mrl_fast.evaluate.__all__, *drop_ins.__all__}
PUBLIC_CLASSES = (
    "mrl_fast/search/index/",
    "mrl_fast/search/sharded/",
    "mrl_fast/training/",
    "mrl_fast/integrations/",
)
COMMANDS = "mrl_fast/cli/commands/"

TRACKED = subprocess.run(
    ["git", "ls-files", "*.py", "*.cpp", "*.h"], cwd=ROOT, capture_output=True, text=True
).stdout.split()
FILES = {name: (ROOT / name).read_text() for name in TRACKED if (ROOT / name).exists()}
PYTHON = {name: ast.parse(text) for name, text in FILES.items() if name.endswith(".py")}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Place(NamedTuple):
    file: str
    owner: str  # the class, or ""
    node: Function

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.node.lineno} {self.owner}{'.' * bool(self.owner)}{self.node.name}"
        )


def functions(file: str) -> Iterator[Place]:
    def walk(node: ast.AST, owner: str) -> Iterator[Place]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield Place(file, owner, child)
            yield from walk(child, child.name if isinstance(child, ast.ClassDef) else owner)

    return walk(PYTHON[file], "")


def is_jitted(node: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def code_lines(node: Function) -> int:
    """From ``def`` to the end, without the docstring."""
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    text = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) and is_text else 0
    return node.end_lineno - node.lineno + 1 - text


def parameters(node: Function) -> int:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([a for a in given if a.arg not in ("self", "cls")])


CPP_TEXT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.S)
CPP_NAME = re.compile(r"(?:\w|\])\(")
CPP_BODY = re.compile(r"\)\s*(?:const\s*)?(?:->[\s\w:*&<>]+)?(?:\{|:\s*\w+[({])")  # or initialisers


def cpp_signatures(text: str) -> Iterator[tuple[int, int]]:
    """The line and the number of parameters of each function and lambda that has a body."""
    text = CPP_TEXT.sub(lambda match: "\n" * match[0].count("\n"), text)
    for found in CPP_NAME.finditer(text):
        at, depth, given = found.end(), 1, 0
        while depth and at < len(text):
            depth += (text[at] in "([{<") - (text[at] in ")]}>" and text[at - 1] != "-")
            given += depth == 1 and text[at] == ","
            at += 1
        if CPP_BODY.match(text, at - 1):
            yield text.count("\n", 0, found.start()) + 1, given + bool(text[found.end() : at - 1])


def is_contract(place: Place) -> bool:
    name = place.node.name
    if place.owner:  # a public class is one of the contract, or an integration's
        public = not name.startswith("_") or name == "__init__"
        return public and place.file.startswith(PUBLIC_CLASSES) and place.owner[0] != "_"
    return name in CONTRACT or (place.file.startswith(COMMANDS) and not name.startswith("_"))


def test_files_are_short():
    lines = {name: text.count("\n") for name, text in FILES.items()}
    assert len(lines) > 200
    long = {name: n for name, n in lines.items() if n > CEILING}
    assert not long
    assert statistics.median(lines.values()) <= MEDIAN


def test_functions_are_short():
    all_of_them = [place for file in PYTHON for place in functions(file)]
    assert len(all_of_them) > 1000
    long = {
        str(place): n
        for place in all_of_them
        if (n := code_lines(place.node)) > BODY and not is_jitted(place.node)
    }
    assert not long, "\n".join(f"{n:3d} {place}" for place, n in long.items())


def test_signatures_are_short():
    """Kernels and their launchers take what a device needs, and what users call is a contract."""
    wide = {
        str(place): n
        for file in PYTHON
        if not file.startswith("kernels/")
        for place in functions(file)
        if (n := parameters(place.node)) > PARAMETERS
        and not is_jitted(place.node)
        and not is_contract(place)
    }
    assert not wide, "\n".join(f"{n:3d} {place}" for place, n in wide.items())


def test_signatures_in_cpp_are_short():
    text = """f(int a, /* ( */ std::map<int, int> b) const { g(1, 2, 3); }
        X::X(int a) : a_(a) {}  // h(a, b, c) {
        auto l = [&](int a, const F<A, B>& b,
                     int c) { return "(,"; };
        void none() {}"""
    # An initialiser before a body looks like a function.
    assert list(cpp_signatures(text)) == [(1, 2), (2, 1), (2, 1), (3, 3), (5, 0)]
    wide, seen = {}, 0
    for name, text in FILES.items():
        if name.endswith((".cpp", ".h")) and not name.startswith("csrc/cpu/simd/"):
            for line, n in cpp_signatures(text):
                seen += 1
                if n > PARAMETERS:
                    wide[f"{name}:{line}"] = n
    assert seen > 400
    assert not wide, wide
