"""Heads that are no plain linear layer: values and gradients are those of the module's own call.

The expected value of a prefix is always the layer itself on that prefix, by PyTorch's own modules.
"""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mrl_fast import (
    AdaptiveClassifier,
    MatryoshkaCrossEntropyLoss,
    MRLLinear,
    matryoshka_cross_entropy,
)
from mrl_fast.integrations.raivn import Matryoshka_CE_Loss, MRL_Linear_Layer
from tests.helpers.changed_heads import (
    CALLED,
    CLASSES,
    DIMS,
    FUSED,
    ROWS,
    batch,
    by_calls,
    changed,
    doubled_gradient,
    hook_weight_norm,
    lora,
    parametrized_weight_norm,
    pruned,
    quantized,
    replaced_forward,
    scaled_input,
    scaled_output,
)

CHANGES = pytest.mark.parametrize("change", FUSED + CALLED, ids=lambda change: change.__name__)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])


def gradients(loss, x, head):
    leaves = [x, *(p for p in head.parameters() if p.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@TIED
@CHANGES
def test_values_and_gradients_are_those_of_the_call(tied, change):
    head, (x, target) = changed(tied, change), batch()
    c = torch.tensor([1.0, 2.0, 3.0])
    if change is quantized:  # has no gradients
        x = x.detach()
        loss_fn = MatryoshkaCrossEntropyLoss(dim_weights=c.tolist())
        expected = sum(
            F.cross_entropy(y, target) * w for y, w in zip(by_calls(head, x), c, strict=True)
        )
        torch.testing.assert_close(loss_fn(head, x, target), expected)
        torch.testing.assert_close(head(x), torch.stack(by_calls(head, x)))
        return
    per_dim = torch.stack([F.cross_entropy(logits, target) for logits in by_calls(head, x)])
    expected = gradients((c * per_dim).sum(), x, head)
    torch.testing.assert_close(head(x), torch.stack(by_calls(head, x)))
    loss_fn = MatryoshkaCrossEntropyLoss(dim_weights=c.tolist())
    actual = gradients(loss_fn(head, x, target), x, head)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss_fn.per_dim, per_dim.detach())
    assert all(grad.any() for grad in actual)
    losses = torch.stack([F.cross_entropy(logits, target) for logits in head(x)])
    logits = gradients((c * losses).sum(), x, head)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@TIED
@CHANGES
def test_a_weight_that_is_not_all_is_not_shown(tied, change):
    head = changed(tied, change)
    if change in FUSED:
        weight = [head.weight] if tied else head.weight
        assert all(torch.equal(w, h.weight) for w, h in zip(weight, head.heads, strict=True))
        return
    for name in ("weight", "bias"):
        with pytest.raises(TypeError, match=r"heads\[0\]: expected an nn.Linear without hooks"):
            getattr(head, name)
        assert name not in dir(head)


def test_a_plain_head_keeps_no_logits_in_memory(monkeypatch):
    def refuse(self, x):
        raise AssertionError("called")

    x, target = batch()
    for change in (lambda head: head, parametrized_weight_norm):
        head = changed(True, change)
        expected = MatryoshkaCrossEntropyLoss()(head, x, target)
        with monkeypatch.context() as patched:
            patched.setattr(F, "linear", refuse)
            assert torch.equal(MatryoshkaCrossEntropyLoss()(head, x, target), expected)


@TIED
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("change", [None, *FUSED], ids=["plain", "weight norm", "spectral norm"])
def test_plain_layers(tied, bias, change):
    """Linear layers and nothing else, with the head's values, and none of its memory."""
    torch.manual_seed(0)
    head, (x, _) = MRLLinear(DIMS, CLASSES, tied=tied, bias=bias), batch()
    if change is not None:
        head.heads = nn.ModuleList(map(change, head.heads))
    head = head.double().requires_grad_(False)
    expected = by_calls(head, x.double())
    layers = head.plain()
    assert [type(module) for module in layers.modules()] == [nn.ModuleList, *[nn.Linear] * 3]
    assert [layer.in_features for layer in layers] == list(DIMS)
    assert all((layer.bias is not None) == bias for layer in layers)
    for parameter in head.parameters():
        parameter.zero_()
    for layer, d, logits in zip(layers, DIMS, expected, strict=True):
        torch.testing.assert_close(layer(x[:, :d].double()), logits)
        assert layer.weight.requires_grad and layer.weight.is_leaf


# what the message says that it saw, and what to do
SEEN = {
    lora: r"got tests\.helpers\.changed_heads\.LoraLinear; first merge or remove what was added",
    hook_weight_norm: r"with the hook torch\.nn\.utils\.weight_norm\.WeightNorm; .*remove_weight_",
    pruned: r"with the hook torch\.nn\.utils\.prune\.RandomUns.*; torch\.nn\.utils\.prune\.remove",
    scaled_input: r"got torch\.nn\..*Linear with the hook .*scaled_input.*<lambda>; first merge",
    scaled_output: r"with the hook .*scaled_output.*<lambda>; first merge or remove",
    doubled_gradient: r"with the hook .*doubled_gradient.*<lambda>; first merge or remove",
    replaced_forward: r"Linear with a forward of its own; first merge or remove",
    quantized: r"got torch\.ao\..*Linear; take the head as it was before quantization",
}


@TIED
@pytest.mark.parametrize("change", CALLED, ids=lambda change: change.__name__)
def test_no_plain_layers_of_what_a_weight_does_not_tell(tied, change):
    with pytest.raises(TypeError, match=rf"heads\[0\]: expected .*{SEEN[change]}"):
        changed(tied, change).plain()
    head = scaled_output(changed(tied, lambda layer: layer))
    with pytest.raises(TypeError, match="head: expected an MRLLinear without hooks or own forward"):
        head.plain()


@TIED
@pytest.mark.parametrize("change", [parametrized_weight_norm, hook_weight_norm, lora, quantized])
def test_no_layer_of_raivn_with_a_state_that_is_not_theirs(tied, change):
    seen = SEEN.get(change, r"got param.*weight.original0 in .*remove_parametrizations\(layer")
    with pytest.raises(TypeError, match=rf"heads\[0\]: expected an nn.Linear .*{seen}"):
        MRL_Linear_Layer.from_mrl_linear(changed(tied, change))


def test_hooks_of_the_whole_head_run():
    x, target = batch()
    head = changed(True, lambda layer: layer)
    plain = F.cross_entropy(2 * head(x)[1], target)
    head.register_forward_hook(lambda module, args, out: 2 * out)
    loss_fn = MatryoshkaCrossEntropyLoss()
    loss_fn(head, x, target)
    torch.testing.assert_close(loss_fn.per_dim[1], plain.detach())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_options_of_the_loss_hold_for_logits(reduction):
    x, target = batch()
    target[::3] = 5
    options = dict(class_weight=torch.rand(CLASSES), ignore_index=5, label_smoothing=0.2,
                   reduction=reduction, dim_weights=[1.0, 0.5, 2.0])  # fmt: skip
    head, loss_fn = changed(True, lambda layer: layer), MatryoshkaCrossEntropyLoss(**options)
    expected = loss_fn(head, x, target)
    per_dim = loss_fn.per_dim
    called = nn.Sequential(head)
    torch.testing.assert_close(loss_fn(called, x, target), expected)
    torch.testing.assert_close(loss_fn.per_dim, per_dim)
    half = loss_fn(called.bfloat16(), x.bfloat16(), target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.05)
    target[1] = CLASSES
    with pytest.raises(ValueError, match=r"target: expected classes in \[0, 11\) or 5, got 11"):
        loss_fn(called.float(), x, target)
    with pytest.raises(TypeError, match="target: expected torch.int64, got torch.float32"):
        loss_fn(called, x, target.float())
    with pytest.raises(TypeError, match=r"returns logits \[G, B, V\], got \[17, 24\]"):
        loss_fn(nn.Identity(), x, target)


def test_a_bias_of_some_heads_only():
    x, _ = batch()
    head = MRLLinear(DIMS, CLASSES)
    head.heads[0] = nn.Linear(DIMS[0], CLASSES, bias=False)
    torch.testing.assert_close(head(x), torch.stack(by_calls(head, x)))
    assert head.bias[0] is None and head.bias[1] is head.heads[1].bias


@TIED
def test_bad_input_of_a_called_head(tied):
    head = changed(tied, scaled_output)
    with pytest.raises(ValueError, match="x: expected width >= 20, got 19"):
        head(torch.randn(4, 19))
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got torch.int64"):
        head(torch.ones(4, 20, dtype=torch.int64))


@TIED
@pytest.mark.parametrize("change", [lora, scaled_output, quantized])
def test_a_cascade_calls_the_head(tied, change):
    head, (x, target) = changed(tied, change), batch()
    expected = torch.stack(by_calls(head, x)).detach().softmax(-1).max(-1)
    classifier = AdaptiveClassifier(head).calibrate(x, target, tolerance=0.0)
    assert not classifier.thresholds.isnan().any()
    thresholds = expected.values[:-1].median(dim=1).values  # half of the rows go on
    classifier.set_thresholds(thresholds)
    labels, confidence, dims = classifier.predict(x)
    stops = expected.values > F.pad(thresholds, (0, 1), value=-1.0)[:, None]
    stage = stops.byte().argmax(0)  # the first
    rows = torch.arange(ROWS)
    assert torch.equal(dims, torch.tensor(DIMS)[stage]) and len(dims.unique()) == 3
    assert torch.equal(labels, expected.indices[stage, rows])
    torch.testing.assert_close(confidence, expected.values[stage, rows])
    assert not confidence.requires_grad
    assert classifier.cost(classifier.predict(x)).dims == dims.double().mean()


@pytest.mark.parametrize("deferred", [False, True], ids=["logits", "deferred"])
@pytest.mark.parametrize("efficient", [False, True], ids=["MRL", "MRL-E"])
@pytest.mark.parametrize("change", [lora, pruned, scaled_output, parametrized_weight_norm])
def test_layers_of_raivn(efficient, deferred, change):
    x, target = batch()
    torch.manual_seed(0)
    layer = MRL_Linear_Layer(DIMS, CLASSES, efficient)
    for name, child in list(layer.named_children()):
        setattr(layer, name, change(child))
    like = MRLLinear(DIMS, CLASSES, tied=efficient)
    like.heads = nn.ModuleList(layer.children())
    losses = [F.cross_entropy(logits, target) for logits in by_calls(like, x)]
    expected = gradients(sum(losses), x, layer)
    layer.deferred = deferred
    for output in (layer(x), (layer, x)):
        actual = gradients(Matryoshka_CE_Loss()(output, target), x, layer)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if change is not parametrized_weight_norm:
        with pytest.raises(TypeError, match=r"classifiers\[0\]: expected an nn.Linear without"):
            assert layer.head


def test_called_heads_compile_as_one_graph():
    x, target = batch()
    for change in (lora, scaled_output, parametrized_weight_norm):
        head, loss_fn = changed(False, change), MatryoshkaCrossEntropyLoss()
        expected = gradients(loss_fn(head, x, target), x, head)
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own compiler
            compiled = torch.compile(
                lambda x, h=head, f=loss_fn: f(h, x, target), fullgraph=True, backend="aot_eager"
            )
            actual = gradients(compiled(x), x, head)
        torch.testing.assert_close(actual, expected)


# --- sharded heads ---


def train_of_a_rank(rank, folder):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    x, target = batch()
    mine = slice(rank * 8, rank * 8 + 8)
    found = {}
    for name in ("head", "layers", "none"):
        for tied in (True, False):
            head = changed(tied, lambda layer: layer)
            wrapped = {"head": [head], "layers": head.heads, "none": [nn.Sequential(head)]}
            for module in wrapped[name]:
                fully_shard(module, mesh=mesh)
            try:
                MatryoshkaCrossEntropyLoss()(head, x[mine].detach(), target[mine]).backward()
            except TypeError as error:
                found[name, tied] = str(error)
                continue
            found[name, tied] = [p.grad.full_tensor() for p in head.parameters()]
            try:
                matryoshka_cross_entropy(x, list(head.parameters())[0], target, DIMS)
            except TypeError as error:
                found["functional"] = str(error)
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that are still there abort an ordinary exit at times


def test_a_head_that_fully_shard_wraps(tmp_path):
    code = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('ranks', {__file__!r})\n"
        "ranks = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(ranks)\n"
        f"ranks.train_of_a_rank(int(sys.argv[1]), {str(tmp_path)!r})\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [child.wait(240) for child in children] == [0, 0]
    x, target = batch()
    for rank in range(2):
        found = torch.load(tmp_path / str(rank))
        for tied in (True, False):
            head = changed(tied, lambda layer: layer)
            loss = sum(F.cross_entropy(y, target[:16]) for y in head(x[:16]))
            expected = torch.autograd.grad(loss, list(head.parameters()))
            for name in ("head", "layers"):
                torch.testing.assert_close(found[name, tied], list(expected))
            assert "heads[0]: expected parameters that are whole" in found["none", tied]
        assert "weight: expected parameters that are whole" in found["functional"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
def test_lora_of_peft(tied):
    """Adapters change the logits and the loss, and get the gradients of the plain formula."""
    peft = pytest.importorskip("peft")
    x, target = batch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), MRLLinear(DIMS, CLASSES, tied=tied))
    wrapped = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=wrapped, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    head = adapted.base_model.model[1]
    expected = by_calls(head, x)
    for logits, prefix in zip(adapted(x), expected, strict=True):
        torch.testing.assert_close(logits, prefix)
    loss = MatryoshkaCrossEntropyLoss()(head, x, target)
    plain = sum(F.cross_entropy(logits, target) for logits in expected)
    torch.testing.assert_close(loss, plain)
    found, wanted = gradients(loss, x, head), gradients(plain, x, head)
    assert any("lora" in name for name, p in head.named_parameters() if p.requires_grad)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    for refused in (head.plain, lambda: MRL_Linear_Layer.from_mrl_linear(head)):
        with pytest.raises(
            TypeError, match=r"got peft\..*Linear; merge_and_unload\(\) of the PEFT"
        ):
            refused()
    whole = peft.get_peft_model(MRLLinear(DIMS, CLASSES, tied=tied), peft.LoraConfig(
        target_modules=["heads.0"]))  # fmt: skip
    with pytest.raises(TypeError, match="base_model.model is the head that may be called"):
        AdaptiveClassifier(whole)
    assert AdaptiveClassifier(whole.base_model.model).set_thresholds([0.5, 0.5])(x).labels.numel()
