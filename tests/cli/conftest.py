"""Files of vectors and an index that most commands are tried on."""

import pytest

from tests.helpers.cli_index import BASE, QUERIES, build, saved


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "base.npy", BASE)


@pytest.fixture
def queries(tmp_path):
    return saved(tmp_path / "queries.npy", QUERIES)


@pytest.fixture
def built(tmp_path, base):
    return build(tmp_path / "index", base)
