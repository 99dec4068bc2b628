"""Modules and losses are copied, pickled and saved, and follow none of torch's defaults."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mrl_fast import (
    AdaptiveClassifier,
    MatryoshkaCrossEntropyLoss,
    MatryoshkaInfoNCELoss,
    MatryoshkaLoopLoss,
    MRLLinear,
    matryoshka_info_nce,
)
from mrl_fast.integrations.raivn import Matryoshka_CE_Loss, MRL_Linear_Layer
from tests.helpers.changed_heads import CLASSES, DIMS, batch, changed, lora

# --- copies ---


def modules():
    x, target = batch()
    head, called = changed(True, lambda layer: layer), changed(False, lora)
    queries, documents = x.detach(), x.detach().flip(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loop's, of its first call
        loop = MatryoshkaLoopLoss(nn.TripletMarginLoss(), DIMS, dim_weights=[1, 2, 3])
        loop([queries, documents, documents.flip(0)])
    return {
        "head": (head, lambda m: m(queries)),
        "separate": (called, lambda m: m(queries)),
        "cross entropy": (
            MatryoshkaCrossEntropyLoss(dim_weights=[1, 2, 3], class_weight=torch.rand(CLASSES)),
            lambda m: m(head, queries, target),
        ),
        "info nce": (
            MatryoshkaInfoNCELoss(DIMS, learn_scale=True, directions=("doc_to_query",
                                  "query_to_doc")),
            lambda m: m(queries, documents),
        ),
        "loop": (loop, lambda m: m([queries, documents, documents.flip(0)])),
        "cascade": (
            AdaptiveClassifier(head).calibrate(queries, target),
            lambda m: m(queries).confidence,
        ),
        "called cascade": (
            AdaptiveClassifier(called).calibrate(queries, target),
            lambda m: m(queries).confidence,
        ),
        "raivn": (MRL_Linear_Layer(DIMS, CLASSES), lambda m: torch.stack(m(queries))),
        "raivn loss": (Matryoshka_CE_Loss([1, 2, 3]), lambda m: m(head(queries), target)),
    }  # fmt: skip


def saved(module, tmp_path):
    torch.save(module, tmp_path / "module")
    return torch.load(tmp_path / "module", weights_only=False)


@pytest.mark.parametrize("name", modules())
def test_modules_are_copied_pickled_and_saved(name, tmp_path):
    module, call = modules()[name]
    expected = call(module)  # a loss then holds per_dim
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        saved(module, tmp_path),
    ):
        assert torch.equal(call(other), expected)
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                tensor.zero_()
    assert torch.equal(call(module), expected)


# --- torch's global state ---


@pytest.mark.parametrize("name", ["separate", "called cascade", "loop", "raivn loss"])
@pytest.mark.parametrize("state", ["float64", "bfloat16", "meta", "inference"])
def test_results_do_not_depend_on_torchs_defaults(name, state):
    module, call = modules()[name]
    expected = call(module).detach()
    if state == "inference":
        with torch.inference_mode():
            assert torch.equal(call(module), expected)
        return
    before = torch.get_default_dtype()
    try:
        if state == "meta":
            with torch.device("meta"):
                actual = call(module)
        else:
            torch.set_default_dtype(getattr(torch, state))
            actual = call(module)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(actual.detach(), expected)


def test_options_that_are_tensors_do_not_depend_on_torchs_defaults():
    x, target = batch()
    head = changed(True, lambda layer: layer)
    made = {}
    before = torch.get_default_dtype()
    for dtype, device in [(before, "cpu"), (torch.float16, "meta")]:
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                made[device] = (
                    MatryoshkaCrossEntropyLoss(dim_weights=[0.1, 0.2, 0.3]),
                    MatryoshkaInfoNCELoss(DIMS, learn_scale=True, dim_weights=[0.1, 0.2, 0.3]),
                    MatryoshkaLoopLoss(F.mse_loss, DIMS, dim_weights=[0.1, 0.2, 0.3]),
                    AdaptiveClassifier(head),
                    Matryoshka_CE_Loss([0.1, 0.2, 0.3]),
                )
        finally:
            torch.set_default_dtype(before)
    for ours, theirs in zip(*made.values(), strict=True):
        tensors = [[*m.parameters(), *m.buffers()] for m in (ours, theirs)]
        torch.testing.assert_close(*tensors, rtol=0, atol=0, equal_nan=True)
    assert made["cpu"][2].weights == made["meta"][2].weights


def test_a_cascade_made_under_inference_is_calibrated_outside():
    x, target = batch()
    head = changed(True, lambda layer: layer)
    with torch.inference_mode():
        classifier = AdaptiveClassifier(head)
    expected = AdaptiveClassifier(head).calibrate(x, target).thresholds
    assert torch.equal(classifier.calibrate(x, target).thresholds, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MatryoshkaCrossEntropyLoss(dim_weights=3),
        lambda: MatryoshkaInfoNCELoss(DIMS, dim_weights=3),
        lambda: MatryoshkaLoopLoss(F.mse_loss, DIMS, dim_weights=3),
    ],
)
def test_bad_weights(make):
    with pytest.raises(TypeError, match="dim_weights: expected a sequence, got int"):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(reduction="avg"), ValueError, "reduction: expected one of 'mean', .* got 'avg'"),
        (dict(label_smoothing=1.5), ValueError, r"label_smoothing: expected .* \[0, 1\], got 1.5"),
        (dict(class_weight=[1, -2]), ValueError, r"class_weight\[1\]: expected .* >= 0, got -2"),
        (dict(class_weight=torch.ones(2, 2)), ValueError, r"class_weight: expected shape \[4\]"),
        (dict(class_weight=torch.ones(2).int()), TypeError, "class_weight: expected a floating"),
        (dict(class_weight=3), TypeError, "class_weight: expected a sequence, got int"),
        (dict(dim_weights=[torch.nan]), ValueError, r"dim_weights\[0\]: expected .* got nan"),
        (dict(dim_weights=[1, -1]), ValueError, r"dim_weights\[1\]: expected .* >= 0, got -1"),
    ],
)
def test_options_are_checked_when_the_loss_is_made(options, error, message):
    with pytest.raises(error, match=message):
        MatryoshkaCrossEntropyLoss(**options)


def test_class_weights_may_be_a_list():
    x, target = batch()
    weights = [1.0 + i for i in range(CLASSES)]
    for change in (lambda layer: layer, lora):
        head = changed(True, change)
        like = MatryoshkaCrossEntropyLoss(class_weight=torch.tensor(weights))(head, x, target)
        assert torch.equal(MatryoshkaCrossEntropyLoss(class_weight=weights)(head, x, target), like)
        with pytest.raises(ValueError, match=r"class_weight: expected shape \[11\], got \[2\]"):
            MatryoshkaCrossEntropyLoss(class_weight=[1, 2])(head, x, target)
    loss_fn = MatryoshkaCrossEntropyLoss(class_weight=weights, ignore_index=0, label_smoothing=0.1)
    shown = "class_weight=[11], ignore_index=0, label_smoothing=0.1, reduction='mean'"
    assert str(loss_fn) == f"MatryoshkaCrossEntropyLoss({shown})"


def test_what_is_no_head_is_named():
    x, target = batch()
    head, layer = MRLLinear(DIMS, CLASSES), MRL_Linear_Layer(DIMS, CLASSES)
    for arguments, message in [
        ((x, head), r"a tensor of shape \[17, 24\]; the order is loss\(head, features, target\)"),
        ((head(x), x), r"a tensor of shape \[3, 17, 11\]; the order is"),
        ((list(head.heads), x), r"list; AdaptiveClassifier\(layers\).head is one"),
        ((head.heads, x), r"ModuleList; AdaptiveClassifier\(layers\).head is one"),
        ((layer, x), r"tuple; .*MRLLinear.from_raivn\(layer\) .*Matryoshka_CE_Loss takes"),
        ((3, x), "int"),
    ]:
        with pytest.raises(TypeError, match=f"head: expected .* got {message}"):
            MatryoshkaCrossEntropyLoss()(*arguments, target)
    with pytest.raises(ValueError, match="x: expected width >= 20, got 19"):
        MatryoshkaCrossEntropyLoss()(head, x[:, :19], target)
    assert MatryoshkaCrossEntropyLoss()(AdaptiveClassifier([*head.heads]).head, x, target) > 0


def test_descending_dims_are_refused_by_what_to_pass():
    x = torch.randn(4, 64)
    message = r"dims: expected .*, got \[64, 16, 32\]: .* by position, so pass \[16, 32, 64\]"
    for call in (
        lambda dims: MatryoshkaInfoNCELoss(dims),
        lambda dims: MatryoshkaLoopLoss(torch.dot, dims),
        lambda dims: matryoshka_info_nce(x, x, dims),
    ):
        with pytest.raises(ValueError, match=message):
            call([64, 16, 32])
        with pytest.raises(ValueError, match=r"dims: expected strictly .*, got \[16, 16\]$"):
            call([16, 16])
