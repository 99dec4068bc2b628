"""The corpus: what is read of a package, in which order, and what is not."""

import pytest

from mrl_fast.experiments import corpus
from mrl_fast.experiments.corpus import Entry, read_corpus
from mrl_fast.experiments.corpus.extract import extract, sentences_of, summary_of
from tests.helpers.packages import install

MODULE = '''#!/usr/bin/env python
"""Tools for the garden and the house.

They may be lent to others.
"""

# Rakes come before spades here,
# as they always did.
import os  # never read, as it follows code

class Rake:
    """Gather the :class:`~garden.Leaf` leaves of a `lawn`. It has ten teeth."""

    def pull(self):
        """Pull it over the grass, e.g. A lawn
        of two lines.

        Args:
            speed: Metres a second, at most two.
        """
        def inner():
            """Nobody sees this inner thing."""

    def _hide(self):
        """Hide it behind the shed."""

if os.name:
    async def water(hose):
        """Water all of the plants."""

def brief():
    """Too short."""

def _private():
    class Public:
        """Not public after all, is it."""
'''

FILES = {
    "garden/__init__.py": MODULE,
    "garden/again.py": 'def sprinkle():\n    """Water all of the plants."""\n',
    "garden/broken.py": "def f(:\n",
    "garden/latin.py": b'"""Caf\xe9 with no coding line."""\n',
    "garden/notes.txt": "no Python at all",
    "garden/tests/helper.py": 'def f():\n    """Help the tests of this package."""\n',
    "garden/test_rake.py": 'def f():\n    """Test the rake of this package."""\n',
}
NAMES = [
    Entry("garden", "Rake", "Gather the garden.Leaf leaves of a lawn."),
    Entry("garden", "Rake.pull", "Pull it over the grass, e.g. A lawn of two lines."),
    Entry("garden", "water", "Water all of the plants."),
]
OTHERS = [
    Entry("garden", "garden", "Tools for the garden and the house."),
    Entry("garden", "garden", "They may be lent to others."),
    Entry("garden", "Rake", "It has ten teeth."),
    Entry("garden", "Rake.pull", "speed: Metres a second, at most two."),
    Entry("garden", "garden", "Nobody sees this inner thing."),
    Entry("garden", "garden", "Hide it behind the shed."),
    Entry("garden", "garden", "Not public after all, is it."),
    Entry("garden", "garden", "Rakes come before spades here, as they always did."),
]


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "site")
    install(tmp_path / "site", "garden", FILES)
    return tmp_path / "site"


def test_names(site):
    read = read_corpus(["garden", "nowhere-to-be-found"])
    assert read.names == NAMES and read.others == []
    assert read.files == 4 and read.missing == ["nowhere-to-be-found"]
    assert read.unparsed == ["garden/broken.py", "garden/latin.py"]


def test_everything(site):
    read = read_corpus(["garden"], everything=True)
    assert read.names == NAMES  # the same whatever else is read
    assert read.others == OTHERS


def test_order_is_that_of_packages_and_files(site):
    install(site, "barn", {"barn.py": 'def milk():\n    """Milk one of the cows."""\n'})
    expected = [Entry("barn", "milk", "Milk one of the cows."), *NAMES]
    for packages in (["garden", "barn"], ["barn", "garden"]):
        assert read_corpus(packages).names == expected


def test_progress(site):
    seen = []
    read_corpus(["garden"], on_file=lambda done, files: seen.append((done, files)))
    assert seen[-1] == (4, 4) and len(seen) == 4


def test_cache(site, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = read_corpus(["garden"], cache=cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    with monkeypatch.context() as held:
        held.setattr(corpus, "extract_all", None)
        assert read_corpus(["garden"], cache=cache) == first
    file.write_bytes(whole[:100])
    assert read_corpus(["garden"], cache=cache) == first and file.read_bytes() == whole
    install(
        site, "garden", {"garden/new.py": 'def f():\n    """What the update brings."""\n'}, "2.0"
    )
    assert [e.name for e in read_corpus(["garden"], cache=cache).names] == ["f"]
    assert len(read_corpus(["garden"], everything=True, cache=cache).others) == 0


def test_nothing_installed():
    with pytest.raises(ValueError, match="packages: expected one that is installed, got nowhere-1"):
        read_corpus(["nowhere-1"])


def test_a_reader_that_ends_early_is_an_error(site, monkeypatch, tmp_path):
    (tmp_path / "extract.py").write_text("import sys\nsys.stdin.read()\nsys.exit(3)\n")
    monkeypatch.setattr(corpus, "EXTRACT", tmp_path / "extract.py")
    with pytest.raises(RuntimeError, match="ended with code 3"):
        read_corpus(["garden"])


def test_pinned():
    """What is read by default is what constraints.txt pins."""
    from pathlib import Path

    lines = (Path(__file__).parents[2] / "constraints.txt").read_text().split("\n")
    pinned = {line.split("==")[0].lower() for line in lines}
    assert {name.lower() for name in corpus.PACKAGES} <= pinned
    assert len(set(corpus.PACKAGES)) == len(corpus.PACKAGES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two three. Four five six!", ["One two three.", "Four five six!"]),
        ("Two words", []),
        ("Read another one, e.g. Knuth: Sorting.", ["Read another one, e.g. Knuth: Sorting."]),
        ("Of ``code`` and *stress* there is *some*.", ["Of code and stress there is some."]),
        ("Use :func:`~os.path.join`, :ref:`this one <label>`.", ["Use os.path.join, this one."]),
        (">>> print(one, two, three)\nits output is here", []),
        ("First of all:\n\n- one small item\n- another small item\n  of two lines",
         ["First of all:", "one small item", "another small item of two lines"]),
        ("Parameters\n----------\nx : array of floats\n    What is sorted.\ny : array of integers",
         ["x : array of floats", "What is sorted.", "y : array of integers"]),
        ("x = foo(a, b)[1:2] ** {3: 4}; y = (5, 6, 7)", []),
        ("Le café est très bon.", []),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert list(sentences_of(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sort all rows. Then stop.\n\nMore of it.", "Sort all rows."),
        ("\nSort all rows\nof a table", "Sort all rows of a table"),
        ("Sort.\n\nThis is no summary.", ""),
        ("", ""),
    ],
)
def test_summary(text, expected):
    assert summary_of(text) == expected


@pytest.mark.parametrize("source", ["def f(:", "x = '\x00'", "(" * 3000])
def test_no_python(source):
    with pytest.raises((SyntaxError, ValueError, RecursionError)):
        extract(source, everything=False)
