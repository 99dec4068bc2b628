"""Stages that ``tune`` chose, in use: when they hold, what is said when they do not, and by which
stages a result came."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch

from mrl_fast import MatryoshkaIndex, SearchResult
from mrl_fast.search.disk import manifest as manifests
from mrl_fast.search.semantic import semantic_search
from mrl_fast.shared.types import ExactResult, Tuned
from tests.helpers.index_model import vectors

DIMS = (5, 20)
STAGES = [(5, 40), (20, 10)]
Q = vectors(3, 20, 1)


@pytest.fixture
def index():
    index = MatryoshkaIndex(DIMS)
    index.add(vectors(200, 20, 0))
    index._tuned = Tuned(STAGES, 10, 200, 0.9)
    return index


def said(call):
    """The result, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    return result, [str(w.message) for w in caught]


def test_a_lapse_is_said_once_for_each_reason(index):
    assert said(lambda: index.search(Q, 10))[1] == []
    result, (more_k,) = said(lambda: index.search(Q, 11))
    assert isinstance(result, ExactResult) and result.ids.shape == (3, 11)
    assert "searched exactly" in more_k and "tuned for k up to 10 and k=11 was asked" in more_k
    assert "index.tune(samples, k=11)" in more_k
    index.add(vectors(20, 20, 2))
    assert said(lambda: index.search(Q, 10))[1] == []  # a tenth more
    assert said(lambda: index.search(Q, 11))[1] == []
    index.add(vectors(1, 20, 3))
    result, (grown,) = said(lambda: index.search(Q, 10))
    assert isinstance(result, ExactResult)
    assert "tuned with 200 vectors and now holds 221" in grown
    assert "index.tune(samples, k=10)" in grown
    assert said(lambda: [index.search(Q, k) for k in (1, 10, 11)])[1] == []


def test_who_says_what_is_wanted_is_not_warned(index):
    for how in ({"exact": True}, {"stages": [(5, 40), (20, 11)]}):
        assert said(lambda how=how: index.search(Q, 11, **how))[1] == []
    index._tuned = Tuned(None, 10, 200, 0.9)  # exact search was the fastest
    assert said(lambda: index.search(Q, 11))[1] == []


@pytest.mark.parametrize("allowed", [torch.arange(0, 200, 2), torch.arange(200) % 2 == 0])
def test_tuned_stages_are_not_those_of_some_vectors(index, allowed):
    expected = index.search(Q, 10, exact=True, allowed=allowed)
    index.add(vectors(21, 20, 2))  # lapsed, too: to tune again would not help
    index.remove(torch.arange(200, 221))
    result, (why,) = said(lambda: index.search(Q, 10, allowed=allowed))
    assert result.stages is None and torch.equal(result.ids, expected.ids)
    assert "showed holds for all vectors, not for those of allowed=: pass stages= or exact" in why
    assert said(lambda: index.search(Q, 11, allowed=allowed))[1] == []
    assert index.search(Q, 10).stages == STAGES
    staged, none = said(lambda: index.search(Q, 10, stages=STAGES, allowed=allowed))
    assert staged.stages == STAGES and none == []


def test_a_lapse_is_said_where_the_package_was_called(index):
    _, (message,) = said(lambda: semantic_search(Q, index, top_k=11))
    assert "k=11" in message


def test_tuned_again_it_says_so_again(index):
    assert len(said(lambda: index.search(Q, 11))[1]) == 1
    index.tune(vectors(256, 20, 4), 10, 0.5, progress=False)
    index._tuned = index._tuned._replace(stages=STAGES)
    assert len(said(lambda: index.search(Q, 11))[1]) == 1


def test_tuned_says_whether_it_is_in_force(index):
    assert MatryoshkaIndex(DIMS).tuned is None
    assert index.tuned == (STAGES, 10, 200, 0.9, True)
    text = "5:40 20:10 for k up to 10 at recall 0.9, tuned with 200 vectors"
    assert str(index.tuned) == text
    index.add(vectors(20, 20, 2))
    assert index.tuned.in_force
    index.add(vectors(1, 20, 3))
    assert not index.tuned.in_force and index.tuned.rows == 200
    lapsed = "; lapsed, as more than a tenth were added since: searches are exact"
    assert str(index.tuned) == text + lapsed
    index.remove([0])
    assert index.tuned.in_force
    report = index.tune(vectors(256, 20, 4), 5, 0.5, progress=False)
    assert index.tuned == (report.stages, 5, 220, 0.5, True)
    assert "lapsed" not in str(Tuned(None, 1, 5, in_force=False))
    assert str(Tuned(None, 1, 5)) == "exact search for k up to 1, tuned with 5 vectors"


def test_a_result_says_by_which_stages_it_came(index, tmp_path):
    index.save(tmp_path)
    same = [index, MatryoshkaIndex.load(tmp_path), pickle.loads(pickle.dumps(index))]
    for one in [*same, copy.copy(index)]:
        assert one.tuned == index.tuned
        scores, ids = result = one.search(Q, 4)
        assert scores is result.scores and ids is result.ids and isinstance(result, SearchResult)
        assert result.stages == [(5, 40), (20, 4)]
        assert one.search(Q.numpy(), 4, stages=[(5, 9), (20, 8)]).stages == [(5, 9), (20, 4)]
        assert one.search(Q, 4, exact=True).stages is None
    out = SearchResult(np.empty((3, 4), np.float32), np.empty((3, 4), np.int64))
    given = index.search(Q.numpy(), 4, out=out)
    assert given.ids is out.ids and given.stages == [(5, 40), (20, 4)]
    again = pickle.loads(pickle.dumps(index.search(Q, 4)))
    assert again.stages == [(5, 40), (20, 4)] and torch.equal(again.ids, given_ids(index))


def given_ids(index):
    return index.search(Q, 4).ids


def test_a_folder_that_was_saved_without_the_recall(index, tmp_path):
    index.save(tmp_path)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["tuned"] == {"stages": [[5, 40], [20, 10]], "k": 10, "rows": 200, "recall": 0.9}
    del manifest["tuned"]["recall"]
    file.write_text(json.dumps(manifests.signed(manifest)))
    assert MatryoshkaIndex.load(tmp_path).tuned == (STAGES, 10, 200, None, True)


def test_any_number_is_a_recall(index, tmp_path):
    for recall in (np.float64(0.5), np.float32(0.5)):
        index.tune(vectors(300, 20, 1), 5, recall, seconds=1, progress=False)
        assert type(index.tuned.recall) is float
        assert pickle.loads(pickle.dumps(index)).tuned == index.tuned
        index.save(tmp_path / "s")
    with pytest.raises(ValueError, match="recall: expected a number"):
        index.tune(vectors(300, 20, 1), 5, True)
