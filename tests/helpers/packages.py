"""Packages that are installed only as far as importlib.metadata sees."""

import random
from collections.abc import Mapping
from itertools import product
from pathlib import Path

SYLLABLES = "ba de fi go hu ka le mi no pu ra se ti vo wu ya ze".split()
WORDS = ["".join(pair) for pair in product(SYLLABLES, SYLLABLES)]


def install(
    folder: Path, name: str, files: Mapping[str, str | bytes], version: str = "1.0"
) -> None:
    """Makes a distribution in a folder of sys.path, with Python files and their RECORD."""
    for file, text in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    info = folder / f"{name}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def documented_functions(count: int = 1800) -> str:
    """A module of functions of three random words each; their sentences have plurals of these, and
    five words that are only in the way."""
    functions = []
    for i in range(count):
        a, b, c, *others = random.Random(i).sample(WORDS, 8)
        functions.append(
            f"def {a}_{b}_{c}():\n"
            f'    """With {a}s we find {b}s or {c}s but no {" ".join(others)}."""\n'
        )
    return "\n".join(functions)
