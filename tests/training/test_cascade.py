"""The cascade against a plain loop over rows, and its calibration against every threshold."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from mrl_fast import AdaptiveClassifier, AdaptiveReport, MRLLinear, matryoshka_predict
from mrl_fast.evaluate import accuracy
from mrl_fast.training.thresholds import report_on

PAPER = pytest.mark.filterwarnings("ignore:AdaptiveClassifier.calibrate")  # heads are random
DIMS = (2, 4, 8, 16, 32, 64)


def mixture(rows, seed):
    """200 classes in 20 superclasses, columns of falling variance: as nested training leaves them.
    The head of each prefix is the one with the fewest errors, and its softmax the truth."""
    generator = torch.Generator().manual_seed(0)
    scale = 14 / torch.arange(1, 65) ** 1.5
    centres = torch.randn(20, 64, generator=generator).repeat_interleave(10, 0)
    means = scale * (centres + 0.5 * torch.randn(200, 64, generator=generator))
    weight = [means[:, :d].contiguous() for d in DIMS]
    bias = [-w.square().sum(1) / 2 for w in weight]
    generator.manual_seed(seed)
    labels = torch.randint(200, (rows,), generator=generator)
    x = means[labels] + torch.randn(rows, 64, generator=generator)
    return SimpleNamespace(weight=weight, bias=bias, dims=DIMS), x, labels


def random_head(tied, dtype=torch.float32):
    torch.manual_seed(1)
    head = MRLLinear((3, 5, 16, 40), 30, tied=tied)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    x, y = torch.randn(300, 40), torch.randint(30, (300,))
    return head.to(dtype), x.to(dtype), y


def predict_row(classifier, row):
    """The paper's cascade, one row at a time."""
    head = classifier.head
    for g, dim in enumerate(head.dims):
        tied = isinstance(head.weight, torch.Tensor)
        weight = head.weight if tied else head.weight[g]
        bias = head.bias if tied else head.bias[g]
        label, confidence = matryoshka_predict(row[None], weight, (dim,), bias=bias)
        if g == len(head.dims) - 1 or confidence > classifier.thresholds[g]:
            return label.item(), confidence.item(), dim


def test_table():
    # logits (w x, 0) of two classes: a softmax of 1 / (1 + exp(-|w x|))
    weight = [torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 10.0], [0.0, 0.0]])]
    classifier = AdaptiveClassifier(SimpleNamespace(weight=weight, bias=None, dims=(1, 2)))
    classifier.set_thresholds([0.8])
    x = torch.tensor([[2.0, -1.0], [-2.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]])
    labels, confidence, dims = classifier.predict(x)
    assert labels.tolist() == [0, 1, 1, 0, 0]
    assert dims.tolist() == [1, 1, 2, 2, 2]
    expected = torch.tensor([2.0, 2.0, 9.0, 9.0, 0.0]).sigmoid()
    torch.testing.assert_close(confidence, expected)
    cost = classifier.cost(classifier(x))
    assert cost == pytest.approx((8 / 5, 11 / 5, 22 / 5, 16 / 5))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_a_loop_over_rows_whatever_the_batch(tied, dtype):
    head, x, y = random_head(tied, dtype)
    classifier = AdaptiveClassifier(head)
    classifier.set_thresholds([0.6, 0.8, 0.95])
    labels, confidence, dims = classifier.predict(x)
    expected = [predict_row(classifier, row) for row in x]
    assert list(zip(labels.tolist(), confidence.tolist(), dims.tolist(), strict=True)) == expected
    assert set(dims.tolist()) == {3, 5, 16, 40}
    for rows in (torch.randperm(300)[:97], torch.arange(7), torch.tensor([], dtype=torch.int64)):
        for part, whole in zip(
            classifier.predict(x[rows]), (labels, confidence, dims), strict=True
        ):
            assert torch.equal(part, whole[rows])


@PAPER
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
def test_thresholds_of_the_paper(tied):
    head, x, y = random_head(tied)
    y = torch.where(torch.rand(300) < 0.5, head(x)[-1].argmax(1), y)
    classifier = AdaptiveClassifier(head).calibrate(x, y, grid=40)
    levels, chosen = torch.linspace(0, 1, 40), []
    for g in range(3):
        for level in levels:  # only g and g + 1, each row one by one
            cascade = AdaptiveClassifier(head)
            cascade.thresholds[:] = 1.0
            cascade.thresholds[:g] = -0.0
            stages = [cascade._predict(x, h) for h in (g, g + 1)]
            (first, confidence), (second, _) = stages
            labels = torch.where(confidence > level, first, second)
            chosen.append((int((labels == y).sum()), -float(level)))
    best = [max(chosen[40 * g : 40 * g + 40]) for g in range(3)]
    assert classifier.thresholds.tolist() == [-level for _, level in best]
    assert len(set(classifier.thresholds.tolist())) > 1


def test_a_confidence_that_is_the_threshold_goes_on():
    # two equal scores: class 0 with exactly 0.5 by the first column, class 1 by the second
    weight = [torch.zeros(2, 1), torch.tensor([[0.0, 0.0], [0.0, 9.0]])]
    head = SimpleNamespace(weight=weight, bias=None, dims=(1, 2))
    x, y = torch.ones(4, 2), torch.ones(4, dtype=torch.int64)
    for tolerance in (None, 0.0):
        classifier = AdaptiveClassifier(head).calibrate(x, y, grid=5, tolerance=tolerance)
        assert classifier.thresholds.tolist() == [0.5]
        assert classifier.predict(x).dims.tolist() == [2, 2, 2, 2]
    assert AdaptiveClassifier(head).calibrate(x, 1 - y).thresholds.tolist() == [0.0]
    weight[0] += 3e38
    classifier = AdaptiveClassifier(head).calibrate(9 * x, y)  # NaN goes on from any threshold
    assert classifier.thresholds.tolist() == [0.0]
    assert classifier.predict(9 * x).dims.tolist() == [2, 2, 2, 2]


def test_a_tolerance_sees_beyond_the_next_prefix():
    # the second prefix adds nothing, only the third is right
    weight = [torch.zeros(2, 1), torch.zeros(2, 2), torch.eye(3)[1:]]
    head = SimpleNamespace(weight=weight, bias=None, dims=(1, 2, 3))
    x, y = torch.tensor([[0.0, 0.0, 9.0]] * 4), torch.ones(4, dtype=torch.int64)
    with pytest.warns(
        UserWarning, match="0.000 of the holdout is right, where the full width has 1"
    ):
        paper = AdaptiveClassifier(head).calibrate(x, y)
    assert paper.predict(x).dims.tolist() == [1] * 4
    classifier = AdaptiveClassifier(head).calibrate(x, y, tolerance=0.0)
    assert classifier.predict(x).labels.tolist() == [1] * 4


def test_calibration_reaches_its_target():
    head, x, y = mixture(30_000, seed=1)
    _, unseen, answers = mixture(30_000, seed=2)
    full = matryoshka_predict(x, head.weight, DIMS, bias=head.bias).labels
    test = matryoshka_predict(unseen, head.weight, DIMS, bias=head.bias).labels
    full, test = accuracy(full, y)[-1], accuracy(test, answers)[-1]
    assert 0.85 < full < 0.9
    costs = []
    for tolerance in (0.0, 0.001, 1.0):
        classifier = AdaptiveClassifier(head).calibrate(x, y, tolerance=tolerance)
        held_out, prediction = classifier.predict(x), classifier.predict(unseen)
        report = classifier.report
        assert report.accuracy == pytest.approx(accuracy(held_out.labels[None], y)[0])
        assert report.accuracy >= full - tolerance
        assert report.expected_dims == pytest.approx(classifier.cost(held_out).dims)
        assert report.full_accuracy == pytest.approx(full)
        costs.append(classifier.cost(prediction).dims)
        if tolerance == 0.001:
            assert accuracy(prediction.labels[None], answers)[0] >= test - 0.003
            assert costs[-1] <= 64 / 3
    assert costs[0] >= costs[1] > costs[2] == DIMS[0]
    paper = AdaptiveClassifier(head).calibrate(x, y)
    assert accuracy(paper.predict(unseen).labels[None], answers)[0] >= test - 0.01


def test_report_by_hand():
    right = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 0, 1]]).bool()
    confidence = torch.tensor(
        [[0.9, 0.6, 0.4, 0.3, 0.5], [0.1, 0.1, 0.9, 0.7, 0.8], [0.2, 0.2, 0.2, 0.2, 0.2]]
    )
    report = report_on(right, confidence, torch.tensor([0.5, 0.75]), (2, 4, 8))
    assert report == AdaptiveReport(
        dims=(2, 4, 8),
        thresholds=(0.5, 0.75),
        shares=(0.4, 0.4, 0.2),
        accuracies=(0.5, 0.5, 0.0),
        prefix_accuracies=(0.4, 0.6, 0.8),
        rows=5,
        accuracy=0.4,
        expected_dims=4.0,
        standard_error=pytest.approx((0.24 / 5) ** 0.5),  # rows differ by 0, −1, 0, 0, −1
    )
    assert report.full_accuracy == 0.8
    assert str(report).split("\n") == [
        "   dim  threshold  rows ended  accuracy  if all did",
        "     2     0.5000      40.00%    0.5000      0.4000",
        "     4     0.7500      40.00%    0.5000      0.6000",
        "     8                 20.00%    0.0000      0.8000",
        "5 rows: accuracy 0.4000 at 4.0 dims a row; the full width: 0.8000 at 8; "
        "standard error of the difference: 0.2191",
    ]
    none = report_on(right, confidence, torch.tensor([0.0, 0.0]), (2, 4, 8))
    assert str(none).split("\n")[2:4] == [
        "     4     0.0000       0.00%         –      0.6000",
        "     8                  0.00%         –      0.8000",
    ]


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_loss_of_more_than_a_point_is_told(wrong):
    # the first prefix says class 0 of every row, the second too, the third is right
    weight = [torch.zeros(2, 1), torch.zeros(2, 2), torch.eye(3)[1:]]
    head = SimpleNamespace(weight=weight, bias=None, dims=(1, 2, 3))
    y = (torch.arange(100) < wrong).long()
    x = torch.stack([torch.zeros(100), 1.0 - y, y], dim=1)
    classifier = AdaptiveClassifier(head)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classifier.calibrate(x, y)
    report = classifier.report
    assert (report.accuracy, report.full_accuracy) == (pytest.approx(1 - wrong / 100), 1.0)
    assert len(caught) == wrong - 1
    for warning in caught:
        assert issubclass(warning.category, UserWarning) and warning.filename == __file__
        for part in (
            "0.980 of the holdout",
            "full width has 1.000",
            "tolerance=0.01",
            "report",
            "on the holdout within",
        ):
            assert part in str(warning.message)
    assert classifier.calibrate(x, y, tolerance=0.01).report.accuracy >= 0.99
    cheapest = classifier.calibrate(x, y, tolerance=0.5).report  # says nothing: it was asked for
    assert cheapest.accuracy == pytest.approx(1 - wrong / 100) and cheapest.expected_dims == 1.0


@PAPER
def test_thresholds_are_saved():
    head, x, y = random_head(tied=False)
    classifier = AdaptiveClassifier(head)
    message = "thresholds: none are set; call calibrate or set_thresholds before predict"
    with pytest.raises(RuntimeError, match=message):
        classifier.predict(x)
    assert classifier.calibrate(x, y) is classifier
    report = classifier.report
    other = AdaptiveClassifier(MRLLinear(head.dims, 30))
    other.load_state_dict(classifier.state_dict())
    assert other.report is None  # no part of the state
    for copied in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert copied.report == report
        other.load_state_dict(copied.state_dict())
    for mine, theirs in zip(classifier(x), other(x), strict=True):
        assert torch.equal(mine, theirs)
    classifier.load_state_dict(other.set_thresholds([0.1, 0.2, 0.3]).state_dict())
    assert classifier.report is None  # it was of other thresholds


def test_thresholds_by_hand():
    head, x, _ = random_head(tied=True)
    classifier = AdaptiveClassifier(head)
    for thresholds in ([0, 0.25, 1], torch.tensor([0.0, 0.25, 1.0]), numpy.array([0, 0.25, 1])):
        assert classifier.set_thresholds(thresholds) is classifier
        assert classifier.thresholds.tolist() == [0.0, 0.25, 1.0]
    assert classifier.predict(x).dims.unique().tolist() == [3]
    count = r"thresholds: expected 3 numbers, one for each dim but the last, got "
    for thresholds, error, message in [
        ([0.5, 0.5], ValueError, count + "2"),
        (torch.zeros(4), ValueError, count + "4"),
        (0.5, TypeError, count + "float"),
        (torch.tensor(0.5), TypeError, count + "Tensor"),
        ("0.5", TypeError, count + "str"),
        ([0.5, 0.5, 1.5], ValueError, r"thresholds\[2\]: expected a number in \[0, 1\], got 1.5"),
        ([0.5, -0.1, 0.5], ValueError, r"thresholds\[1\]: expected a number in \[0, 1\], got -0.1"),
        ([torch.nan, 0.5, 0.5], ValueError, r"thresholds\[0\]: expected a number .* got nan"),
        ([0.5, None, 0.5], TypeError, r"thresholds\[1\]: expected a number .* got NoneType"),
        (torch.zeros(1, 3), ValueError, count + r"shape \[1, 3\]"),
        (numpy.zeros((3, 1)), ValueError, count + r"shape \[3, 1\]"),
    ]:
        with pytest.raises(error, match=message):
            classifier.set_thresholds(thresholds)
        with pytest.raises(error, match=message):
            classifier.thresholds = thresholds
        assert classifier.thresholds.tolist() == [0.0, 0.25, 1.0]
    with pytest.raises(TypeError, match=count + "NoneType"):
        classifier.thresholds = None


def test_assigned_thresholds_are_a_buffer_as_before():
    head, x, _ = random_head(tied=True)
    classifier, numbers = AdaptiveClassifier(head), [0.5, 0.25, 1.0]
    expected = AdaptiveClassifier(head).set_thresholds(numbers)
    for value in (numbers, torch.tensor(numbers, dtype=torch.float64), numpy.array(numbers)):
        classifier.set_thresholds([0, 0, 0])
        classifier.thresholds = value
        assert classifier.thresholds.dtype == torch.float32
        assert classifier.state_dict().keys() == expected.state_dict().keys()
        assert torch.equal(classifier(x).dims, expected(x).dims)
    with torch.inference_mode():
        classifier.thresholds = numbers
    classifier.set_thresholds(numbers)  # writes to it
    classifier.double().float()
    for assign in (False, True):  # a state of none is one too
        for state in (expected.state_dict(), AdaptiveClassifier(head).state_dict()):
            with torch.device("meta"):
                empty = MRLLinear((3, 5, 16, 40), 30, tied=True)
            other = AdaptiveClassifier(empty if assign else copy.deepcopy(head))
            other.load_state_dict(state, assign=assign)
            torch.testing.assert_close(other.thresholds, state["thresholds"], equal_nan=True)
            assert other.thresholds.device.type == "cpu"


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList])
def test_a_list_of_layers(kind):
    head, x, _ = random_head(tied=False)
    expected = AdaptiveClassifier(head).set_thresholds([0.6, 0.8, 0.95])
    classifier = AdaptiveClassifier(kind(head.heads)).set_thresholds([0.6, 0.8, 0.95])
    assert classifier.head.heads[0] is head.heads[0]
    for mine, theirs in zip(classifier.predict(x), expected.predict(x), strict=True):
        assert torch.equal(mine, theirs)
    assert classifier.state_dict().keys() == expected.state_dict().keys()
    for layers, error, message in [
        ([], ValueError, "head: expected at least one prefix width, got none"),
        ([nn.Linear(8, 3), nn.Linear(4, 3)], ValueError, r"head: expected strictly .* \[8, 4\]"),
        ([nn.Linear(4, 3), nn.Linear(8, 5)], ValueError, r"head\[1\]: expected 3 classes .* got 5"),
        ([nn.Linear(4, 3), nn.ReLU()], TypeError, r"head\[1\]: expected an nn.Linear, got ReLU"),
    ]:
        with pytest.raises(error, match=message):
            AdaptiveClassifier(kind(layers))


def test_one_prefix_is_the_plain_head():
    head = MRLLinear((8,), 5)
    x = torch.randn(20, 8)
    labels, confidence, dims = AdaptiveClassifier(head).predict(x)
    plain = matryoshka_predict(x, head.weight, (8,), bias=head.bias)
    assert torch.equal(labels, plain.labels[0]) and torch.equal(confidence, plain.confidence[0])
    assert dims.tolist() == [8] * 20


@PAPER
def test_a_row_of_nan_goes_to_the_end():
    head, x, y = random_head(tied=True)
    classifier = AdaptiveClassifier(head).calibrate(x, y)
    x[3] = torch.nan
    labels, confidence, dims = classifier.predict(x)
    assert (labels[3], dims[3]) == (0, 40) and confidence[3].isnan()


@PAPER
def test_bad_input():
    head, x, y = random_head(tied=False)
    classifier = AdaptiveClassifier(head)
    for change, error, message in [
        (dict(x=x[:0], y=y[:0]), ValueError, "x: expected at least one row, got none"),
        (dict(x=x[0]), ValueError, r"x: expected shape \[rows, width\], got \[40\]"),
        (dict(x=x[:, :39]), ValueError, "x: expected width >= 40, got 39"),
        (dict(x=x / 0), ValueError, "x: expected finite values"),
        (dict(y=y[:9]), ValueError, r"y: expected shape \[300\], got \[9\]"),
        (dict(y=y.int()), TypeError, "y: expected torch.int64, got torch.int32"),
        (dict(y=y - 1), ValueError, r"y: expected classes in \[0, 30\), got -1"),
        (dict(y=y + 1), ValueError, r"y: expected classes in \[0, 30\), got 30"),
        (dict(grid=1), ValueError, "grid: expected an integer >= 2, got 1"),
        (dict(tolerance=-0.1), ValueError, r"tolerance: expected a number in \[0, 1\], got -0.1"),
        (dict(tolerance="a"), TypeError, r"tolerance: expected a number in \[0, 1\], got str"),
    ]:
        with pytest.raises(error, match=message):
            classifier.calibrate(**(dict(x=x, y=y) | change))
    classifier.calibrate(x, y)
    with pytest.raises(ValueError, match="x: expected width >= 40, got 39"):
        classifier.predict(x[:, :39])
    with pytest.raises(TypeError, match="head: expected an MRLLinear, .* got Linear with no dims"):
        AdaptiveClassifier(torch.nn.Linear(3, 4))
    with pytest.raises(TypeError, match="prediction: expected what predict returned, got Tensor"):
        classifier.cost(classifier.predict(x).dims)
    with pytest.raises(ValueError, match="prediction: expected rows that ended at one of"):
        classifier.cost(classifier.predict(x[:0]))


@PAPER
def test_calibration_on_features_with_a_gradient_says_nothing(recwarn):
    head, x, y = random_head(tied=True)
    classifier = AdaptiveClassifier(head).calibrate(x.requires_grad_(), y, tolerance=0.0)
    assert not recwarn.list and not classifier.thresholds.requires_grad
