"""Evaluation on vectors whose answers are known, by hand or by scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import ndcg_score

from mrl_fast import SearchResult, funnel_search, prefix_topk
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


def two_classes(count, seed):
    """Column 0 says nothing about the class, column 1 everything."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    noise = torch.randn(count, generator=generator)
    return torch.stack([noise, 10.0 * labels - 5.0], dim=1), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_accuracy_by_prefix(dtype):
    (train, train_labels), (test, test_labels) = two_classes(200, 0), two_classes(100, 1)
    sets = (train.to(dtype), train_labels, test.to(dtype), test_labels)
    nearest = nearest_neighbour_accuracy(*sets, (1, 2))
    assert 0.3 < nearest[0] < 0.7 and nearest[1] == 1.0
    linear = linear_probe_accuracy(*sets, (1, 2), steps=100, batch=64)
    assert 0.3 < linear[0] < 0.7 and linear[1] == 1.0
    few = few_shot_accuracy(*sets, (1, 2), shots=5)
    assert 0.3 < few[0] < 0.7 and few[1] == 1.0


def test_votes_and_their_ties():
    train = torch.tensor([[1.0], [2.0], [3.0], [4.5], [20.0]])
    labels, test = ints(7, 3, 3, 7, 5), torch.tensor([[0.0], [19.0]])
    for k, winners in [(1, (7, 5)), (2, (7, 5)), (3, (3, 5)), (4, (7, 3)), (5, (7, 7))]:
        for i in range(2):
            row, winner = test[i : i + 1], ints(winners[i])
            args = train, labels, row, winner, (1,)
            assert nearest_neighbour_accuracy(*args, k=k, metric="l2") == [1.0], (k, i)


def test_probe_is_reproducible_and_leaves_the_generator_alone():
    train, test = two_classes(60, 0), two_classes(40, 1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = linear_probe_accuracy(*train, *test, (1, 2), steps=5, seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert linear_probe_accuracy(*train, *test, (1, 2), steps=5, seed=3) == first
    assert linear_probe_accuracy(0 * train[0], train[1], *test, (2,), steps=5)[0] == 0.5


def test_few_shots_are_class_means():
    (train, labels), (test, answers) = blobs(90, 3, 0), blobs(70, 3, 1)
    names = ints(2, 90, 40)  # labels need not be consecutive
    rows = torch.cat([(labels == c).nonzero()[:20, 0] for c in range(3)])
    train, labels = train[rows], labels[rows]  # 20 of each: every draw is all of them
    expected = []
    for dim in (1, 3, 12):
        unit = F.normalize(train[:, :dim])
        order = names.argsort()  # equally near: the lowest label
        means = torch.stack([F.normalize(unit[labels == c].mean(0), dim=0) for c in order])
        best = order[(F.normalize(test[:, :dim]) @ means.T).argmax(1)]
        expected.append((best == answers).double().mean().item())
    sets = train, names[labels], test, names[answers]
    assert few_shot_accuracy(*sets, (1, 3, 12), shots=20, episodes=2) == pytest.approx(expected)
    assert 0.7 < expected[2] < 1
    # of one shot the draws differ, and the mean is over them
    episodes = [few_shot_accuracy(*sets, (12,), shots=1, episodes=n, seed=4)[0] for n in (1, 2, 2)]
    assert episodes[1] == episodes[2] != episodes[0]
    assert (episodes[1] * 140) == pytest.approx(round(episodes[1] * 140))
    assert few_shot_accuracy(*sets, (12,), shots=1, episodes=2, seed=5)[0] != episodes[1]
    with pytest.raises(ValueError, match="shots: .* got 21, and 20 of label 2 in train_labels"):
        few_shot_accuracy(*sets, (12,), shots=21)


def test_predictions_table():
    labels, superclass = ints(0, 1, 2, 3), ints(0, 0, 1, 1)
    predicted = torch.stack([ints(0, 0, 0, 0), ints(1, 1, 3, 2), ints(0, 3, 3, 3)])
    assert accuracy(predicted, labels) == [0.25, 0.25, 0.5]
    assert oracle_accuracy(predicted, labels) == 0.75
    assert superclass_accuracy(predicted, labels, superclass) == [0.5, 1.0, 0.75]


def test_retrieval_table():
    database_labels = ints(1, 1, 2, 2, 2)
    ids = torch.stack([ints(0, 2, 1), ints(2, 0, 3), ints(4, -1, -1), ints(0, 1, 2)])
    found = retrieval_of(ids, ints(1, 1, 2, 9), database_labels)
    log = [1 / math.log2(i) for i in (2, 3, 4)]
    # precision at the hits: 1, 2/3; 1/2; 1; none relevant
    assert found.map == pytest.approx(((1 + 2 / 3) / 3 + (1 / 2) / 3 + 1 / 3 + 0) / 4)
    assert found.precision == pytest.approx((2 / 3 + 1 / 3 + 1 / 3 + 0) / 4)
    gained = (log[0] + log[2]) / (log[0] + log[1]), log[1] / (log[0] + log[1]), 1 / sum(log)
    assert found.ndcg == pytest.approx(sum(gained) / 4)
    assert found.top1 == 0.5
    assert found.mrr == (1 + 1 / 2 + 1 + 0) / 4
    assert found.recall == pytest.approx((2 / 2 + 1 / 2 + 1 / 3 + 0) / 4)
    trec = retrieval_of(ids, ints(1, 1, 2, 9), database_labels, divisor="relevant")
    assert trec.map == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2) / 2 + 1 / 3 + 0) / 4)
    assert trec[1:] == found[1:]


def test_a_query_is_not_its_own_answer():
    x, labels = blobs(60, 3, 0)
    x[7] = x[3]  # twins: each is the other's nearest
    labels[7] = labels[3]
    (found,) = retrieval(x, labels, x, labels, (12,), k=4, exclude_self=True)
    scores = F.normalize(x) @ F.normalize(x).T
    ids = scores.fill_diagonal_(-9).topk(4).indices
    hits = (labels[ids] == labels[:, None]).double()
    assert found.precision == pytest.approx(hits.mean().item())
    assert found.top1 == hits[:, 0].mean().item() < 1
    rank = torch.arange(1, 5)
    expected = (hits.cumsum(1) / rank * hits).sum(1) / 4
    assert found.map == pytest.approx(expected.mean().item())
    twins = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [2.0, 0.0]])
    sets = twins, ints(0, 0, 1, 1)
    (found,) = retrieval(*sets, *sets, (2,), k=2, exclude_self=True, divisor="relevant")
    assert found == (1.0, 0.5, 1.0, 1.0, 1.0, 1.0)
    # the only one of its label: nothing is relevant; itself cut off by others: the last goes
    lonely = retrieval_of(torch.stack([ints(0, 1), ints(0, 2), ints(0, 1)]), ints(0, 1, 1),
                          ints(0, 1, 1), exclude_self=True)  # fmt: skip
    assert lonely == (0, 0, 0, 0, 0, 0)


def test_by_prefix_any_search_is_judged_alike():
    (x, labels), (queries, query_labels) = blobs(300, 5, 0), blobs(40, 5, 1)
    by_dim = retrieval(queries, query_labels, x, labels, (2, 12), k=5)
    for dim, found in zip((2, 12), by_dim, strict=True):
        ids = (F.normalize(queries[:, :dim]) @ F.normalize(x[:, :dim]).T).topk(5).indices
        assert retrieval_of(ids, query_labels, labels) == found
    assert by_dim[0].map < by_dim[1].map < 1
    ids = funnel_search(queries, x, [(6, 300), (12, 5)], metric="cosine").ids
    assert retrieval_of(ids, query_labels, labels) == by_dim[1]
    (nearest,) = nearest_neighbour_accuracy(x, labels, queries, query_labels, (12,))
    assert by_dim[1].top1 == nearest
    (wide,) = retrieval(queries, query_labels, x[:3], labels[:3], (12,), k=5)  # k > N
    assert 0 < wide.precision <= 3 / 5


@pytest.mark.parametrize("k", [1, 3, 10, 20])
def test_graded_judgements_as_scikit_learn(k):
    generator = torch.Generator().manual_seed(k)
    grades = torch.randint(0, 4, (30, 12), generator=generator)
    grades[torch.rand(30, 12, generator=generator) < 0.5] = 0
    grades[4] = 0  # nothing is relevant
    scores = torch.rand(30, 12, generator=generator)
    names = torch.randperm(900, generator=generator)[:12]  # ids of any choice
    ids = names[scores.argsort(1, descending=True)][:, :k]
    ids = F.pad(ids, (0, k - ids.shape[1]), value=-1)
    pairs = grades.nonzero()[torch.randperm(int((grades > 0).sum()), generator=generator)]
    qrels = Qrels(pairs[:, 0], names[pairs[:, 1]], grades[pairs[:, 0], pairs[:, 1]])
    for gain, true in (("linear", grades), ("exponential", 2**grades - 1)):
        expected = ndcg_score(true.numpy(), scores.numpy(), k=k)
        assert judged(ids, qrels, gain=gain).ndcg == pytest.approx(expected)
    hits = np.zeros((30, k))
    found = np.take_along_axis(grades.numpy() > 0, scores.numpy().argsort(1)[:, ::-1], 1)[:, :k]
    hits[:, : found.shape[1]] = found
    sums = (hits.cumsum(1) / np.arange(1, k + 1) * hits).sum(1)
    relevant = np.maximum((grades > 0).sum(1).numpy(), 1)
    result = judged(ids, qrels)
    assert result.map == pytest.approx((sums / k).mean())
    assert judged(ids, qrels, divisor="relevant").map == pytest.approx((sums / relevant).mean())
    assert result.precision == pytest.approx(hits.mean())
    assert result.top1 == pytest.approx(hits[:, 0].mean())
    first = np.where(hits.any(1), 1 / (1 + hits.argmax(1)), 0)
    assert result.mrr == pytest.approx(first.mean())
    assert result.recall == pytest.approx((hits.sum(1) / relevant).mean())


def test_pairs():
    """Query i belongs to row i: a perfect model reaches 1 by all but mAP over k and precision."""
    x = torch.eye(12)
    pairs = range(12)
    (found,) = retrieval(x, pairs, x, pairs, (12,))
    assert found == pytest.approx((0.1, 0.1, 1, 1, 1, 1))
    moved = x.roll(1, 0)  # its row is among those of score 0, in their order
    (found,) = retrieval(x, pairs, moved, pairs, (12,), divisor="relevant")
    places = [*range(2, 13), 12]
    reached = [1 / place if place <= 10 else 0 for place in places]
    assert found.map == found.mrr == pytest.approx(sum(reached) / 12)
    assert found.recall == sum(place <= 10 for place in places) / 12


def test_grades_of_one_are_labels():
    labels, query_labels = ints(0, 1, 0, 1, 0), ints(0, 1)
    ids = torch.stack([ints(4, 3, -1), ints(0, 1, 3)])
    qrels = Qrels.of({0: {0: 1, 2: 1, 4: 1, 3: 0}, 1: {1: 1, 3: 1}})
    for divisor in ("k", "relevant"):
        assert judged(ids, qrels, divisor=divisor) == retrieval_of(
            ids, query_labels, labels, divisor=divisor
        )


def test_recall_counts_ties_and_nothing_else():
    database = torch.tensor([[3.0], [2.0], [2.0], [1.0]])
    query = torch.ones(1, 1)
    exact = prefix_topk(query, database, 2)
    assert isinstance(exact, SearchResult) and exact.ids.tolist() == [[0, 1]]
    for ids, expected in [
        ([0, 1], 1.0),
        ([2, 0], 1.0),
        ([0, 3], 0.5),
        ([0, -1], 0.5),
        ([3, -1], 0),
    ]:
        assert recall_at_k(torch.tensor([ids]), exact, query, database) == expected


def test_recall_by_dim():
    x, queries = blobs(300, 5, 0)[0], blobs(40, 5, 1)[0]
    for metric in ("cosine", "ip"):
        f = F.normalize if metric == "cosine" else torch.Tensor.clone
        best = (f(queries) @ f(x).T).topk(10).indices
        expected = []
        for dim in (1, 5, 12):
            found = (f(queries[:, :dim]) @ f(x[:, :dim]).T).topk(10).indices
            expected.append((found[:, :, None] == best[:, None]).double().sum().item() / 400)
        recall = recall_by_dim(queries, x, (5, 12), metric=metric)
        assert recall == pytest.approx(expected[1:]) and recall[1] == 1 > recall[0] > 0.1
    same = torch.ones(20, 4)
    assert recall_by_dim(same[:2], same, (1, 4), k=3) == [1.0, 1.0]  # all tie


def test_bad_vectors_and_labels():
    x, labels = blobs(20, 3, 0)
    sets = dict(train=x, train_labels=labels, test=x, test_labels=labels, dims=(2, 12))
    for measure in (nearest_neighbour_accuracy, linear_probe_accuracy, few_shot_accuracy):
        for name, value, error, message in [
            ("test", x[:0], ValueError, "test: expected at least one row, got none"),
            ("train", x[:0], ValueError, "train: expected at least one row, got none"),
            ("train", ["text"], TypeError, "train: expected numbers, got list of str"),
            ("test", x[:, :5], ValueError, "test: expected width 12 as train, got 5"),
            ("test", x / 0, ValueError, "test: expected finite values"),
            ("test_labels", labels - 3, ValueError, "test_labels: expected labels from 0 on, got"),
            ("train_labels", labels[:3], ValueError, r"train_labels: expected shape \[20\]"),
            ("train_labels", labels.numpy() / 1, TypeError, "train_labels: .* got numpy.float"),
            (
                "train_labels",
                [*"ab"] * 10,
                TypeError,
                "test_labels: expected strings, as",
            ),
            ("train_labels", ["a", 1] * 10, TypeError, r"train_labels\[0\]: .* got str"),
            ("dims", (2, 13), ValueError, "dims: expected widths of at most 12"),
            ("dims", (4, 4), ValueError, "dims: expected no width twice"),
        ]:
            with pytest.raises(error, match=message):
                measure(**(sets | {name: value}))


def test_bad_results_and_judgements():
    x, labels = blobs(20, 3, 0)
    sets = dict(train=x, train_labels=labels, test=x, test_labels=labels, dims=(2, 12))
    ids = torch.stack([ints(0, 1), ints(2, -1)])
    two, exact = ints(0, 1), prefix_topk(x[:2], x, 2)
    qrels = Qrels(ints(0, 1), ints(5, 9), ints(1, 2))
    for call, error, message in [
        (lambda: nearest_neighbour_accuracy(**sets, k=21), ValueError, "k: expected .* got 21"),
        (lambda: few_shot_accuracy(**sets, shots=0), ValueError, "shots: expected an integer >= 1"),
        (lambda: accuracy(two, two), ValueError, r"predicted: expected shape \[G, M\]"),
        (lambda: accuracy(ids[:, :0], two[:0]), ValueError, r"predicted: .*, got \[2, 0\]"),
        (lambda: accuracy(ids.float(), two), TypeError, "predicted: .* got torch.float32"),
        (lambda: oracle_accuracy(ids, ints(1)), ValueError, r"labels: expected shape \[2\]"),
        (
            lambda: superclass_accuracy(ids.abs(), two, ints(0, 0)),
            ValueError,
            r"predicted: expected classes in \[0, 2\) as in superclass, got 2",
        ),
        (lambda: superclass_accuracy(ids, two, ints()), ValueError, "superclass: expected at leas"),
        (lambda: superclass_accuracy(ids, two, ints(0, 0, 0)), ValueError, "predicted: .*, got -1"),
        (lambda: retrieval(x, labels, x[:3], labels, (2,)), ValueError, "database_labels: expecte"),
        (lambda: retrieval(x[:0], labels[:0], x, labels, (2,)), ValueError, "queries: expected at"),
        (lambda: retrieval_of(ids, two, two), ValueError, r"ids: .* rows in \[0, 2\) or -1, got 2"),
        (lambda: retrieval_of(ids - 1, two, labels), ValueError, "ids: .* got -2"),
        (lambda: retrieval_of(ids[0], two, labels), ValueError, r"ids: expected shape \[B, k\]"),
        (
            lambda: retrieval_of(torch.stack([two, ints(3, 3)]), two, labels),
            ValueError,
            "ids: expected an id once a query, got 3 twice in row 1",
        ),
        (
            lambda: retrieval_of(ids, two, labels, exclude_self=True),
            ValueError,
            "ids: with exclude_self, expected at least 2 columns and a query a row",
        ),
        (lambda: retrieval_of(ids, two, labels, divisor="N"), ValueError, "divisor: .* got 'N'"),
        (lambda: judged(ids, qrels, gain="log"), ValueError, "gain: expected one of"),
        (lambda: judged(ids[:1], qrels), ValueError, r"qrels.queries: .* in \[0, 1\), got 1"),
        (lambda: judged(ids, qrels._replace(grades=-two)), ValueError, "qrels.grades: .* got -1"),
        (lambda: judged(ids, Qrels.of({})), ValueError, "qrels.queries: expected at least one"),
        (
            lambda: judged(ids, Qrels(ints(0, 0), ints(9, 9), two)),
            ValueError,
            "qrels: expected a pair judged once, got two of query 0, id 9",
        ),
        (lambda: recall_at_k(ids[:, :1], exact, x[:2], x), ValueError, "exact: expected scores of"),
        (lambda: recall_at_k(ids[:0], exact, x[:0], x), ValueError, r"ids: .* got \[0, 2\]"),
        (lambda: recall_by_dim(x, x, (2,), k=21), ValueError, r"k: expected an integer in \[1, 20"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_probe_sees_no_offset_and_needs_no_gradients():
    train, test = two_classes(300, 0), two_classes(100, 1)
    expected = linear_probe_accuracy(*train, *test, (1, 2), steps=20, batch=64)
    offset = torch.tensor([3.0, 1024.0])
    moved = [(x + offset, labels) for x, labels in (train, test)]
    assert linear_probe_accuracy(*moved[0], *moved[1], (1, 2), steps=20, batch=64) == expected
    tracked = train[0].requires_grad_(), train[1]
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert linear_probe_accuracy(*tracked, *test, (1, 2), steps=20, batch=64) == expected
    with torch.inference_mode():
        made = two_classes(300, 0)
        assert linear_probe_accuracy(*made, *test, (1, 2), steps=20, batch=64) == expected


@pytest.mark.parametrize("state", ["float64", "float16", "meta", "inference"])
def test_judgements_do_not_depend_on_torchs_defaults(state):
    def judge():
        ids = torch.tensor([[4, 3, -1], [0, 1, 3]], device="cpu")
        labels = torch.tensor([0, 1, 0, 1, 0], device="cpu")
        qrels = Qrels.of({0: {0: 1, 2: 2, 4: 1, 3: 0}, 1: {1: 1, 3: 3}})
        return (
            retrieval_of(ids, labels[:2], labels),
            judged(ids, qrels, gain="exponential"),
            accuracy(ids[:, :2], labels[:2]),
        )

    expected, before = judge(), torch.get_default_dtype()
    try:
        if state == "meta":
            with torch.device("meta"):
                assert judge() == expected
        elif state == "inference":
            with torch.inference_mode():
                assert judge() == expected
        else:
            torch.set_default_dtype(getattr(torch, state))
            assert judge() == expected
    finally:
        torch.set_default_dtype(before)


def test_sparse_tensors_are_refused_by_name():
    x, labels = torch.eye(4), torch.arange(4)
    with pytest.raises(TypeError, match="database: expected a dense tensor, got torch.sparse_coo"):
        recall_by_dim(x, x.to_sparse(), (2, 4), k=2)
    with pytest.raises(TypeError, match="train: expected a dense tensor, got torch.sparse_coo"):
        linear_probe_accuracy(x.to_sparse(), labels, x, labels, (2, 4))
    with pytest.raises(TypeError, match="test_labels: expected a dense tensor, got torch.sparse"):
        few_shot_accuracy(x, labels, x, labels.to_sparse(), (2, 4), shots=1)
