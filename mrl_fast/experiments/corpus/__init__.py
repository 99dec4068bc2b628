"""A text corpus that every machine with Python holds: what installed packages say of themselves."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path, PurePath
from typing import NamedTuple

EXTRACT = Path(__file__).with_name("extract.py")
TESTS = {"test", "tests", "testing", "_testing"}
# Pinned by constraints.txt, so that every checkout reads the same text.
PACKAGES = (
    "Jinja2", "Pygments", "SQLAlchemy", "accelerate", "aiohttp", "anyio", "attrs", "click",
    "datasets", "dill", "faiss-cpu", "fonttools", "fsspec", "griffelib", "httpx",
    "huggingface_hub", "hypothesis", "joblib", "langchain-core", "langsmith", "llama-index-core",
    "llama-index-workflows", "markdown-it-py", "matplotlib", "mpmath", "multiprocess", "narwhals",
    "networkx", "nltk", "numpy", "onnx", "onnx-ir", "onnxscript", "pandas", "peft", "pillow",
    "platformdirs", "protobuf", "psutil", "pyarrow", "pydantic", "pyparsing", "pytest",
    "python-dateutil", "requests", "rich", "scikit-learn", "scipy", "sentence-transformers",
    "setuptools", "sympy", "torch", "transformers", "triton", "typer", "urllib3", "websockets",
)  # fmt: skip


class Entry(NamedTuple):
    """A sentence, and where it stands."""

    package: str
    name: str  # the "Class.method" it describes; for comments and private names, the module
    sentence: str


class Corpus(NamedTuple):
    """What was read, in the order of packages, files and lines.

    Attributes:
        names: Documented public names, each with its docstring's first sentence. A sentence that
            describes several names is kept once, with the first of them.
        others: The other distinct sentences of all docstrings and comments, where everything was
            asked for.
        files: How many files were read.
        unparsed: Those of them that this Python cannot parse, as paths within site-packages.
        missing: Packages that are not installed.
    """

    names: list[Entry]
    others: list[Entry]
    files: int
    unparsed: list[str]
    missing: list[str]


class Source(NamedTuple):
    package: str
    path: str
    shown: str  # within site-packages


def read_corpus(
    packages: Sequence[str] = PACKAGES,
    *,
    everything: bool = False,
    cache: Path | None = None,
    on_file: Callable[[int, int], object] = lambda done, files: None,
) -> Corpus:
    """Reads the documentation of installed packages, in processes that parse and import nothing.

    Args:
        packages: Names of distributions; an installed one with no Python files is allowed.
        everything: Read all sentences and comments too, not first sentences alone.
        cache: A folder that keeps what was read, by packages and their versions.
        on_file: Called with the number of files done and the number of all.

    Raises:
        ValueError: None of the packages is installed.
    """
    found, missing = installed(packages)
    if not found:
        raise ValueError(f"packages: expected one that is installed, got {', '.join(packages)}")
    known = [(name, found[name].version) for name in sorted(found)]
    recipe = [EXTRACT.read_text(), Path(__file__).read_text(), sys.version_info[:2], known]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = cache and cache / f"corpus-{'everything' if everything else 'names'}-{digest}.json"
    if path and (corpus := load(path)):
        return corpus._replace(missing=missing)
    sources = [source for name in sorted(found) for source in sources_of(found[name])]
    corpus = collect(sources, extract_all([s.path for s in sources], everything, on_file))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(corpus), encoding="utf-8")
        os.replace(partial, path)
    return corpus._replace(missing=missing)


def installed(packages: Sequence[str]) -> tuple[dict[str, metadata.Distribution], list[str]]:
    """Distributions by name, and the names that are not installed."""
    found, missing = {}, []
    for name in packages:
        try:
            found[name] = metadata.distribution(name)
        except (metadata.PackageNotFoundError, ValueError):  # ValueError: an empty name
            missing.append(name)
    return found, missing


def sources_of(package: metadata.Distribution) -> list[Source]:
    """The Python files of a package, less its tests."""
    name = package.metadata["Name"]
    return sorted(
        Source(name, str(package.locate_file(file)), str(file))
        for file in package.files or ()
        if file.suffix == ".py" and not is_test(file)
    )


def is_test(path: PurePath) -> bool:
    name = path.stem
    return not TESTS.isdisjoint(path.parts) or name.startswith("test_") or name.endswith("_test")


Findings = list[tuple[str, str, list[str]]]  # as extract.Found


def extract_all(
    paths: list[str], everything: bool, on_file: Callable[[int, int], object]
) -> list[Findings | None]:
    """What each file documents; None where it does not parse."""
    workers = max(1, min(os.cpu_count() or 1, len(paths)))
    found: list[Findings | None] = [None] * len(paths)
    done = 0
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(EXTRACT)]
    command += ["--everything"] * everything
    processes = [
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(workers)
    ]

    def follow(worker: int) -> None:
        nonlocal done
        process, mine = processes[worker], range(worker, len(paths), workers)
        assert process.stdin and process.stdout
        with process.stdin as stream:
            json.dump([paths[i] for i in mine], stream)
        for i, line in zip(mine, process.stdout, strict=False):
            found[i] = json.loads(line)
            done += 1  # threads may lose a few counts: only the progress bar reads them
            on_file(done, len(paths))
        if code := process.wait():
            raise RuntimeError(f"a process that reads packages ended with code {code}")

    try:
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(follow, range(workers)))
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream
                stream.close()
    return found


def collect(sources: list[Source], found: list[Findings | None]) -> Corpus:
    names: dict[str, Entry] = {}
    others: dict[str, Entry] = {}
    unparsed = []
    for source, findings in zip(sources, found, strict=True):
        if findings is None:
            unparsed.append(source.shown)
            continue
        package, module = source.package, module_of(source.shown)
        for name, summary, sentences in findings:
            if summary:
                names.setdefault(summary, Entry(package, name, summary))
            for sentence in sentences:
                others.setdefault(sentence, Entry(package, name or module, sentence))
    rest = [entry for sentence, entry in others.items() if sentence not in names]
    return Corpus([*names.values()], rest, len(sources), unparsed, [])


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def load(path: Path) -> Corpus | None:
    """The corpus in a cached file; None where there is none, or a damaged one."""
    try:
        names, others, *rest = json.loads(path.read_text(encoding="utf-8"))
        return Corpus([Entry(*e) for e in names], [Entry(*e) for e in others], *rest)
    except (FileNotFoundError, ValueError, TypeError):
        return None
