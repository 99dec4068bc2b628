"""The cascade against a plain loop over rows, and its calibration against every threshold."""

from types import SimpleNamespace

import pytest
import torch

from mrl_fast import AdaptiveClassifier, MRLLinear, matryoshka_predict
from mrl_fast.evaluate import accuracy

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
    classifier.thresholds[0] = 0.8
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
    classifier.thresholds.copy_(torch.tensor([0.6, 0.8, 0.95]))
    labels, confidence, dims = classifier.predict(x)
    expected = [predict_row(classifier, row) for row in x]
    assert list(zip(labels.tolist(), confidence.tolist(), dims.tolist(), strict=True)) == expected
    assert set(dims.tolist()) == {3, 5, 16, 40}
    for rows in (torch.randperm(300)[:97], torch.arange(7), torch.tensor([], dtype=torch.int64)):
        for part, whole in zip(
            classifier.predict(x[rows]), (labels, confidence, dims), strict=True
        ):
            assert torch.equal(part, whole[rows])


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
            stops = stages[0].confidence[0] > level
            labels = torch.where(stops, stages[0].labels[0], stages[1].labels[0])
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
    assert AdaptiveClassifier(head).calibrate(x, y).predict(x).dims.tolist() == [1] * 4
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
        assert accuracy(held_out.labels[None], y)[0] >= full - tolerance
        costs.append(classifier.cost(prediction).dims)
        if tolerance == 0.001:
            assert accuracy(prediction.labels[None], answers)[0] >= test - 0.003
            assert costs[-1] <= 64 / 3
    assert costs[0] >= costs[1] > costs[2] == DIMS[0]
    paper = AdaptiveClassifier(head).calibrate(x, y)
    assert accuracy(paper.predict(unseen).labels[None], answers)[0] >= test - 0.01


def test_thresholds_are_saved():
    head, x, y = random_head(tied=False)
    classifier = AdaptiveClassifier(head)
    with pytest.raises(RuntimeError, match="thresholds: expected calibrate before predict"):
        classifier.predict(x)
    assert classifier.calibrate(x, y) is classifier
    other = AdaptiveClassifier(MRLLinear(head.dims, 30))
    other.load_state_dict(classifier.state_dict())
    for mine, theirs in zip(classifier(x), other(x), strict=True):
        assert torch.equal(mine, theirs)


def test_one_prefix_is_the_plain_head():
    head = MRLLinear((8,), 5)
    x = torch.randn(20, 8)
    labels, confidence, dims = AdaptiveClassifier(head).predict(x)
    plain = matryoshka_predict(x, head.weight, (8,), bias=head.bias)
    assert torch.equal(labels, plain.labels[0]) and torch.equal(confidence, plain.confidence[0])
    assert dims.tolist() == [8] * 20


def test_a_row_of_nan_goes_to_the_end():
    head, x, y = random_head(tied=True)
    classifier = AdaptiveClassifier(head).calibrate(x, y)
    x[3] = torch.nan
    labels, confidence, dims = classifier.predict(x)
    assert (labels[3], dims[3]) == (0, 40) and confidence[3].isnan()


def test_bad_input():
    head, x, y = random_head(tied=False)
    classifier = AdaptiveClassifier(head)
    for change, error, message in [
        (dict(x=x[:0], y=y[:0]), ValueError, "x: expected at least one row, got none"),
        (dict(x=x[0]), ValueError, r"x: expected shape \[rows, width\], got \[40\]"),
        (dict(x=x[:, :39]), ValueError, "dims: expected widths of at most 39"),
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
    with pytest.raises(ValueError, match="dims: expected widths of at most 39"):
        classifier.predict(x[:, :39])
    with pytest.raises(TypeError, match="head: expected weight, bias and dims, got Linear with no"):
        AdaptiveClassifier(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="prediction: expected rows that ended at one of"):
        classifier.cost(classifier.predict(x[:0]))
