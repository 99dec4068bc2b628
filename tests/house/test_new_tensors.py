"""New tensors name their dtype and device: torch's defaults may be anything, and change meanwhile.

``x.new_*``, ``*_like`` and the functions of ``mrl_fast.shared.memory`` follow their arguments.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ["shared", "training", "search", "integrations", "evaluate", "cli"]
FOLDERS = [*(f"mrl_fast/{part}" for part in PARTS), "kernels"]
MAKERS = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor",
    "tensor", "zeros",
}  # fmt: skip
EXCEPTIONS: set[tuple[str, str]] = set()  # (file, the call as it is written)


def unnamed(source: str) -> list[tuple[int, str]]:
    """Line and text of every call that leaves a new tensor's dtype or device to torch."""
    found, options = [], {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            calls = [part for part in ast.walk(node.value) if isinstance(part, ast.Call)]
            dicts = [call for call in calls if getattr(call.func, "id", None) == "dict"]
            given = {keyword.arg for call in dicts for keyword in call.keywords}
            if isinstance(node.value, ast.BinOp) and isinstance(node.value.left, ast.Name):
                given |= options.get(node.value.left.id, set())
            options[node.targets[0].id] = given
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [(node.lineno, a.name) for a in node.names if a.name in MAKERS]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        named = {keyword.arg for keyword in node.keywords}
        for keyword in node.keywords:  # **options, where the file gives them both
            if keyword.arg is None and isinstance(keyword.value, ast.Name):
                named |= options.get(keyword.value.id, set())
        if of_torch and node.func.attr in MAKERS and not {"dtype", "device"} <= named:
            found.append((node.lineno, ast.unparse(node)))
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_new_tensors_name_dtype_and_device(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = []
    for path in files:
        file = str(path.relative_to(ROOT))
        for line, text in unnamed(path.read_text()):
            if (file, text) not in EXCEPTIONS:
                wrong.append(f"{file}:{line}: {text}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.empty(3)", 1),
        ("torch.zeros(3, dtype=torch.float32)", 1),
        ("torch.tensor([1], device='cpu')", 1),
        ("torch.arange(3, dtype=torch.int64, device=x.device)", 0),
        ("f(torch.full((2,), torch.eye(3), dtype=d, device=e))", 1),
        ("from torch import rand", 1),
        (
            "o = dict(dtype=d, device=e)\ntorch.empty(3, **o)\np = o | dict(dtype=f)\n"
            "torch.ones(3, **p)",
            0,
        ),
        ("o = dict(dtype=d)\ntorch.empty(3, **o)", 1),
        ("torch.empty(3, **o)", 1),
        ("torch.zeros_like(x), x.new_empty(3), memory.empty(3), np.zeros(3)", 0),
    ],
)
def test_the_gate_sees(source, count):
    assert len(unnamed(source)) == count
