"""Exported and traced models are made of PyTorch's own ops, and run where mrl_fast is not."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from mrl_fast import AdaptiveClassifier, MRLLinear, matryoshka_logits, matryoshka_predict
from mrl_fast.integrations.raivn import FixedFeatureLayer, MRL_Linear_Layer

DIMS, CLASSES, WIDTH = (3, 8, 20), 11, 24


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, DIMS[-1]))

    def forward(self, x):
        return (matryoshka_logits(x, self.weight, DIMS), *matryoshka_predict(x, self.weight, DIMS))


class Doubled(nn.Linear):  # no plain linear layer
    def forward(self, x):
        return 2 * super().forward(x)


def called(layer):
    for name, child in list(layer.named_modules()):
        if isinstance(child, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, Doubled(child.in_features, CLASSES))
    return layer


def cascade(head, thresholds):
    classifier = AdaptiveClassifier(head).set_thresholds(thresholds)
    for parameter in classifier.parameters():
        nn.init.normal_(parameter)
    return classifier


MODELS = {
    "tied": lambda: MRLLinear(DIMS, CLASSES, tied=True),
    "separate": lambda: MRLLinear(DIMS, CLASSES),
    "no bias": lambda: MRLLinear(DIMS, CLASSES, bias=False),
    "called": lambda: called(MRLLinear(DIMS, CLASSES, tied=True)),
    "called MRL": lambda: called(MRL_Linear_Layer(list(DIMS), CLASSES)),
    "functional": Functional,
    "MRL": lambda: MRL_Linear_Layer(list(DIMS), CLASSES),
    "MRL-E": lambda: MRL_Linear_Layer(list(DIMS), CLASSES, efficient=True),
    "FF": lambda: FixedFeatureLayer(DIMS[1], CLASSES),
    "cascade": lambda: cascade(MRLLinear(DIMS, CLASSES, tied=True), [0.285, 0.32]),
    "called cascade": lambda: cascade(called(MRLLinear(DIMS, CLASSES, tied=True)), [0.62, 0.71]),
}


def model(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, WIDTH), nn.ReLU(), MODELS[name]()).eval()


def inputs(rows):
    return torch.randn(rows, 9, generator=torch.Generator().manual_seed(rows))


def tensors(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


def run_elsewhere(tmp_path, load):
    """What the saved model gives in a process that cannot import mrl_fast."""
    torch.save(inputs(13), tmp_path / "x.pt")
    code = f"""
import sys, warnings
sys.modules["mrl_fast"] = None
warnings.simplefilter("ignore")
import torch
x = torch.load({str(tmp_path / "x.pt")!r})
out = ({load})(x)
torch.save([out] if isinstance(out, torch.Tensor) else list(out), {str(tmp_path / "out.pt")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "out.pt")


def traced(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)  # of a size that became a constant
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(module, x)


@pytest.mark.parametrize("name", MODELS)
def test_trace(name, tmp_path):
    module = model(name)
    with torch.no_grad():
        trace = traced(module, inputs(4))
        assert "mrl_fast::" not in str(trace.inlined_graph)
        torch.testing.assert_close(tensors(trace(inputs(13))), tensors(module(inputs(13))))
    if name == "MRL":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(trace, tmp_path / "model.pt")
        found = run_elsewhere(tmp_path, f"torch.jit.load({str(tmp_path / 'model.pt')!r})")
        torch.testing.assert_close(found, tensors(module(inputs(13))))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_export(name, strict, tmp_path):
    module = model(name)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(module, (inputs(4),), dynamic_shapes=shapes, strict=strict)
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called and not [target for target in called if "mrl_fast" in str(target)]
    assert not [target for target in called if "grad" in str(target)]  # it could not be loaded
    expected = tensors(module(inputs(13)))
    torch.testing.assert_close(tensors(exported.module()(inputs(13))), expected)
    if name == "MRL" and not strict:
        assert not [target for target in called if "pad" in str(target)]  # only for called heads
        torch.export.save(exported, tmp_path / "model.pt2")
        load = f"torch.export.load({str(tmp_path / 'model.pt2')!r}).module()"
        torch.testing.assert_close(run_elsewhere(tmp_path, load), expected)


TORCHSCRIPT = [(name, False) for name in ("tied", "separate", "MRL", "MRL-E", "cascade")]
DYNAMO = [("MRL", True), ("MRL-E", True)]  # tests/house/test_examples.py has a head and a cascade


@pytest.mark.parametrize(("name", "dynamo"), TORCHSCRIPT + DYNAMO)
def test_onnx(name, dynamo):
    """Standard operators, with the same values for another batch, by ONNX's own evaluator."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    module, file = model(name), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(
                module, (inputs(4),), dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            written = program.model_proto
        else:
            torch.onnx.export(
                module, (inputs(4),), file, dynamo=False, input_names=["x"],
                dynamic_axes={"x": {0: "batch"}},
            )  # fmt: skip
            written = onnx.load_model_from_string(file.getvalue())
    assert {node.domain for node in written.graph.node} <= {"", "ai.onnx"}
    evaluator = ReferenceEvaluator(written)
    found = evaluator.run(None, {evaluator.input_names[0]: inputs(13).numpy()})
    expected = tensors(module(inputs(13)))
    torch.testing.assert_close([torch.from_numpy(x) for x in found], expected)


@pytest.mark.parametrize("name", ["cascade", "called cascade"])
def test_rows_of_a_cascade_end_everywhere(name):
    """Nor does a threshold that exports are tested with lie on a confidence."""
    module = model(name)
    assert set(module(inputs(13)).dims.tolist()) == set(DIMS)
    confidence = module[-1]._every_prefix(module[:2](inputs(13)))[1]
    assert (confidence[:-1] - module[-1].thresholds[:, None]).abs().min() > 0.01


def test_a_cascade_in_half_precision():
    """As by the kernels: scores that bfloat16 would round to the same are told apart."""
    torch.manual_seed(0)
    classifier = cascade(MRLLinear(DIMS, 200, tied=True), [0.0, 0.0])
    classifier.head.bfloat16()
    x = torch.randn(300, WIDTH).bfloat16()
    confidence = classifier._every_prefix(x)[1].sort(1).values
    classifier.set_thresholds(confidence[:-1, 149:151].mean(1))  # between two
    trace = traced(classifier, x[:5])
    labels, confidence, dims = trace(x)
    expected = classifier.predict(x)
    assert confidence.dtype == torch.float32 and not confidence.requires_grad
    assert torch.equal(labels, expected.labels) and torch.equal(dims, expected.dims)
    assert set(dims.tolist()) == set(DIMS)
    torch.testing.assert_close(confidence, expected.confidence)


def test_a_cascade_without_thresholds_is_exported_at_full_width():
    """torch.export cannot read a buffer; a trace is refused, as it is checked by a call."""
    head, x = MRLLinear(DIMS, CLASSES), torch.randn(30, WIDTH)
    classifier = AdaptiveClassifier(head)
    labels, _, dims = torch.export.export(classifier, (x,), strict=False).module()(x)
    assert torch.equal(labels, head(x)[-1].argmax(1)) and dims.unique().tolist() == [DIMS[-1]]
    with pytest.raises(torch.jit.TracingCheckError, match="thresholds: none are set; call"):
        traced(classifier, x)


def test_a_deferred_layer_is_exported_in_training_mode():
    layer = MRL_Linear_Layer(list(DIMS), CLASSES)
    layer.deferred = True
    x = torch.randn(4, WIDTH)
    exported = torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(tensors(exported.module()(x)), tensors(layer.eval()(x)))


def test_an_implementation_that_was_asked_for_is_exported():
    class Chosen(Functional):
        def forward(self, x):
            return matryoshka_logits(x, self.weight, DIMS, impl="cpp")

    exported = torch.export.export(Chosen().eval(), (torch.randn(4, WIDTH),), strict=False)
    assert any("mrl_fast.nested_logits" in str(node.target) for node in exported.graph.nodes)
