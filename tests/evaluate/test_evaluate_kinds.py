"""What evaluation may be given: numpy, lists, integers of any width, strings, dims in any order."""

import numpy as np
import pytest
import torch

from mrl_fast import SearchResult, prefix_topk
from mrl_fast.evaluate import (
    Qrels,
    accuracy,
    few_shot_accuracy,
    judged,
    linear_probe_accuracy,
    nearest_neighbour_accuracy,
    oracle_accuracy,
    recall_at_k,
    recall_by_dim,
    retrieval,
    retrieval_of,
    superclass_accuracy,
)
from tests.helpers.labelled import blobs, ints

KINDS = {
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "int32": lambda x: x.int() if x.dtype == torch.int64 else x,
    "uint8": lambda x: x.byte().numpy() if x.dtype == torch.int64 and x.min() >= 0 else x,
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_any_kind(kind):
    make = KINDS[kind]
    (train, labels), (test, answers) = blobs(60, 3, 0), blobs(20, 3, 1)
    sets = train, labels, test, answers
    given = [make(x) for x in sets]
    dims = (12, 3) if kind == "list" else np.array([12, 3])
    for measure, options in (
        (nearest_neighbour_accuracy, dict(k=3)),
        (linear_probe_accuracy, dict(steps=5)),
        (few_shot_accuracy, dict(shots=2, episodes=2)),
        (retrieval, dict(k=3)),
    ):
        expected = measure(*sets, (3, 12), **options)
        assert measure(*given, dims, **options) == expected[::-1]  # in the dims' order
    assert recall_by_dim(given[2], given[0], dims) == recall_by_dim(test, train, (3, 12))[::-1]
    exact = prefix_topk(test, train, 4)
    ids = prefix_topk(test, train, 4, dim=6).ids
    rounded = SearchResult(*map(make, exact))
    assert recall_at_k(make(ids), rounded, given[2], given[0]) == recall_at_k(
        ids, exact, test, train
    )
    assert recall_at_k(make(exact.ids[:1]), SearchResult(*(x[:1] for x in exact)),
                       make(test[0]), given[0]) == 1  # fmt: skip
    assert retrieval_of(make(ids), given[3], given[1]) == retrieval_of(ids, answers, labels)
    qrels = Qrels(ints(0, 1, 1), ints(5, 9, 2), ints(1, 2, 3))
    assert judged(make(ids), Qrels(*map(make, qrels))) == judged(ids, qrels)
    predicted = torch.stack([answers, answers.roll(1)])
    assert accuracy(make(predicted), given[3]) == accuracy(predicted, answers)
    assert oracle_accuracy(make(predicted), given[3]) == oracle_accuracy(predicted, answers)
    classes = ints(0, 1, 1)
    assert superclass_accuracy(make(predicted), given[3], make(classes)) == superclass_accuracy(
        predicted, answers, classes
    )


def strings_of_pandas(names):
    return pytest.importorskip("pandas").Series(names, index=range(7, 7 + len(names)))


def column(values):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"label": values})["label"]


def encoded(names):
    return np.array(names, dtype="S8")


@pytest.mark.parametrize("make", [list, np.array, strings_of_pandas, column, encoded])
def test_labels_may_be_strings(make):
    """They count as their places in their order do, whatever labels either set lacks."""
    (train, labels), (test, answers) = blobs(60, 3, 0), blobs(20, 3, 1)
    names, numbers = ["cat", "ant", "zebra", "bee"], ints(2, 0, 3, 1)  # bees are in neither
    answers[5] = 3  # but one

    def named(x):
        return make([names[i] for i in x.tolist()])

    for measure, options in (
        (nearest_neighbour_accuracy, dict(k=3)),
        (linear_probe_accuracy, dict(steps=5)),
        (few_shot_accuracy, dict(shots=2, episodes=2)),
        (retrieval, dict(k=3)),
    ):
        found = measure(train, named(labels), test, named(answers), (3, 12), **options)
        assert found == measure(train, numbers[labels], test, numbers[answers], (3, 12), **options)
    predicted = torch.stack([answers, answers.roll(1)])
    listed = [[names[i] for i in row] for row in predicted.tolist()]
    assert accuracy(listed, named(answers)) == accuracy(np.array(listed), named(answers))
    assert accuracy(listed, named(answers)) == accuracy(predicted, answers)
    assert oracle_accuracy(listed, named(answers)) == 1
    found = superclass_accuracy(predicted, answers, make(["mammal", "insect", "mammal", "insect"]))
    assert found == superclass_accuracy(predicted, answers, ints(0, 1, 0, 1)) and found[1] < 1
    few = ["ant"] * 59 + ["bee"]
    with pytest.raises(
        ValueError, match="shots: .* got 2, and 1 of label b?'?bee'? in train_labels"
    ):
        few_shot_accuracy(train, make(few), test, named(answers), (3,), shots=2)


def test_judgements_may_be_dicts():
    """Of grades, or the relevant ids alone, as sentence-transformers' evaluator takes them."""
    ids = torch.stack([ints(5, 2, 9), ints(9, 1, 3)])
    graded = {0: {5: 3, 9: 1}, 1: {1: 2, 4: 0}}
    expected = judged(ids, Qrels(ints(0, 0, 1, 1), ints(5, 9, 1, 4), ints(3, 1, 2, 0)))
    assert judged(ids, graded) == judged(ids, Qrels.of(graded)) == expected
    narrow = {
        np.int32(q): {np.int64(i): np.uint8(g) for i, g in of.items()} for q, of in graded.items()
    }
    assert judged(ids, narrow) == expected
    alike = judged(ids, {0: {5: 1, 9: 1}, 1: {1: 1}})
    for listed in (set, list, tuple, frozenset):
        assert judged(ids, {0: listed([5, 9]), 1: {1: 1}}) == alike
    assert [x.tolist() for x in Qrels.of({3: {7}, 4: {}})] == [[3], [7], [1]]


def test_judgements_of_other_kinds_are_refused():
    ids, x = torch.stack([ints(0, 1), ints(2, -1)]), torch.eye(3)
    exact = prefix_topk(x[:2], x, 2)
    for call, error, message in [
        (
            lambda: Qrels.of({"q7": {5: 1}}),
            TypeError,
            "judgements: expected integers, got the quer",
        ),
        (lambda: judged(ids, {0: {"500": 1}}), TypeError, "judgements: .* got the id '500': repla"),
        (lambda: judged(ids, {0: ["500"]}), TypeError, "judgements: .* got the id '500'"),
        (
            lambda: Qrels.of({0: "500"}),
            TypeError,
            r"judgements\[0\]: expected a dict or .* got str",
        ),
        (lambda: Qrels.of({0: 500}), TypeError, r"judgements\[0\]: expected .* ids, got int"),
        (lambda: Qrels.of({0: {5: 0.5}}), TypeError, r"judgements\[0\]\[5\]: .* integer, got flo"),
        (lambda: Qrels.of({-1: {5: 1}}), ValueError, "judgements: query: .* got -1"),
        (lambda: Qrels.of({0: {1 << 63: 1}}), ValueError, "judgements: id: expected .* in"),
        (lambda: Qrels.of([(0, 5, 1)]), TypeError, "judgements: expected a dict, got list"),
        (
            lambda: judged(ids, [(0, 5, 1)]),
            TypeError,
            "qrels: expected Qrels or a dict .* got list",
        ),
        (lambda: recall_at_k(ids, exact.scores, x[:2], x), TypeError, "exact: .* got Tensor"),
        (lambda: recall_at_k(ids, tuple(exact), x[:2], x), TypeError, "exact: .* got tuple"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_labels_may_be_bools_or_columns():
    x = torch.eye(4)
    labels = [True, False, True, True]
    expected = retrieval(x, ints(1, 0, 1, 1), x, ints(1, 0, 1, 1), (4,), k=3)
    for make in (list, tuple, np.array, torch.tensor, column, strings_of_pandas):
        assert retrieval(x, make(labels), x, make(labels), (4,), k=3) == expected, make
    assert accuracy(np.array([labels]), labels) == [1]
    assert retrieval(x, column([1, 0, 1, 1]), x, labels, (4,), k=3) == expected
    assert retrieval(x, [*"babb"], x, column([*"babb"]), (4,), k=3) == expected
    assert retrieval(x, [b"b", b"a", b"b", b"b"], x, [*"babb"], (4,), k=3) == expected
    with pytest.raises(TypeError, match=r"query_labels\[0\]: expected an integer, got float"):
        retrieval(x, column([0.5] * 4), x, labels, (4,))


def test_queries_are_taken_as_search_takes_them():
    """Of another dtype, of a prefix alone, and a single one."""
    (x, labels), (queries, answers) = blobs(60, 3, 0), blobs(20, 3, 1)
    expected = recall_by_dim(queries, x, (4, 8, 12))
    assert recall_by_dim(queries.double(), x, (4, 8, 12)) == expected
    assert recall_by_dim(queries.numpy().astype("f8"), x, (4, 8, 12)) == expected
    cut = queries[:, :8], x[:, :8].contiguous()
    assert recall_by_dim(cut[0], x, (4, 8)) == recall_by_dim(*cut, (4, 8)) != expected[:2]
    found = retrieval(queries, answers, x, labels, (8, 4), k=3)
    assert retrieval(cut[0], answers, x, labels, (8, 4), k=3) == found
    assert retrieval(queries[0], answers[:1], x, labels, (8,), k=3) == retrieval(
        queries[:1], answers[:1], x, labels, (8,), k=3
    )
    sets = labels, queries.half(), answers, (12,)
    assert nearest_neighbour_accuracy(x, *sets) == nearest_neighbour_accuracy(
        x, labels, queries.half().float(), answers, (12,)
    )
    with pytest.raises(ValueError, match="dims: expected widths of at most 8"):
        retrieval(cut[0], answers, x, labels, (12,))
    with pytest.raises(ValueError, match="database: expected width 12 as queries, got 8"):
        retrieval(queries, answers, cut[1], labels, (4,))
