"""RAIVNLab/MRL's names: held to its semantics, stated here in plain PyTorch."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mrl_fast import AdaptiveClassifier, MRLLinear
from mrl_fast.integrations.raivn import FixedFeatureLayer, Matryoshka_CE_Loss, MRL_Linear_Layer
from mrl_fast.testing import assert_within_budget, rounding_bounds

NESTING = [3, 8, 20]
ROWS, WIDTH, CLASSES = 37, 24, 11  # x is wider than the longest prefix


@pytest.fixture(autouse=True)
def one_thread():
    """These problems are too small for two threads, which would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain_logits(state, x, efficient):
    """By the names of a checkpoint."""
    out = []
    for i, d in enumerate(NESTING):
        i = 0 if efficient else i
        logits = x[:, :d] @ state[f"nesting_classifier_{i}.weight"][:, :d].T
        bias = state.get(f"nesting_classifier_{i}.bias")
        out.append(logits if bias is None else logits + bias)
    return out


def plain_loss(outputs, target, importance=None, **options):
    losses = [F.cross_entropy(logits, target, **options) for logits in outputs]
    return sum(c * loss.sum() for c, loss in zip(importance or [1.0] * 3, losses, strict=True))


def checkpoint(efficient, bias, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    state = {}
    for i, d in enumerate(NESTING[-1:] if efficient else NESTING):
        state[f"nesting_classifier_{i}.weight"] = torch.randn(CLASSES, d, generator=g).to(dtype)
        if bias:
            state[f"nesting_classifier_{i}.bias"] = torch.randn(CLASSES, generator=g).to(dtype)
    return state


def batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(7)
    target = torch.randint(CLASSES, (ROWS,), generator=g)
    target[3] = 5
    return torch.randn(ROWS, WIDTH, generator=g).to(dtype).requires_grad_(), target


def loaded(efficient, bias, dtype=torch.float64):
    layer = MRL_Linear_Layer(NESTING, CLASSES, efficient, bias=bias, dtype=dtype)
    layer.load_state_dict(checkpoint(efficient, bias, dtype))
    return layer


KINDS = pytest.mark.parametrize(
    ("efficient", "bias"), [(False, True), (True, True), (False, False), (True, False)]
)
CLASS_WEIGHT = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "no bias": dict(bias=False),
    "importance": dict(relative_importance=[0.5, 1.0, 2.0]),
    "smoothing": dict(label_smoothing=0.1, ignore_index=5),
    "weight": dict(weight=CLASS_WEIGHT, label_smoothing=0.2),
    "sum": dict(reduction="sum", relative_importance=[1.0, 0.0, -1.0]),
    "none": dict(reduction="none", relative_importance=[0.5, 1.0, 2.0]),
}


@KINDS
def test_logits_of_a_checkpoint(efficient, bias):
    x, _ = batch()
    outputs = loaded(efficient, bias)(x)
    assert type(outputs) is tuple and len(outputs) == 3
    expected = torch.stack(plain_logits(checkpoint(efficient, bias), x, efficient))
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=1e-13, atol=1e-13)


@KINDS
def test_state_dict_both_ways(efficient, bias):
    state = checkpoint(efficient, bias, torch.float32)
    layer = MRL_Linear_Layer(nesting_list=NESTING, num_classes=CLASSES, efficient=efficient,
                             bias=bias)  # fmt: skip
    assert layer.load_state_dict(state).missing_keys == []
    ours = layer.state_dict()
    assert list(ours) == list(state)
    assert all(torch.equal(ours[name], state[name]) for name in state)
    before = layer.classifiers[-1].weight.clone()
    layer.reset_parameters()
    bound = NESTING[-1] ** -0.5  # nn.Linear's
    assert not torch.equal(layer.classifiers[-1].weight, before)
    assert layer.classifiers[-1].weight.abs().max() <= bound
    parallel = {f"module.{name}": value for name, value in state.items()}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(parallel)  # as torch: whose prefix it is strips it
    assert Matryoshka_CE_Loss([1, 2, 3]).state_dict() == {}  # theirs is a plain list


class Theirs(nn.Module):
    """What RAIVNLab/MRL's own layer has, by the same names."""

    def __init__(self, efficient, bias):
        super().__init__()
        self.nesting_list, self.num_classes, self.efficient = NESTING, CLASSES, efficient
        for i, d in enumerate(NESTING[-1:] if efficient else NESTING):
            layer = nn.Linear(d, CLASSES, bias=bias, dtype=torch.float64)
            setattr(self, f"nesting_classifier_{i}", layer)
        self.load_state_dict(checkpoint(efficient, bias))


@pytest.mark.parametrize("make", [loaded, Theirs])
@KINDS
def test_to_an_mrl_linear_and_back(efficient, bias, make):
    layer, (x, _) = make(efficient, bias), batch()
    head = MRLLinear.from_raivn(layer)
    expected = torch.stack(plain_logits(checkpoint(efficient, bias), x, efficient)).detach()
    torch.testing.assert_close(head(x).detach(), expected, rtol=1e-13, atol=1e-13)
    back = MRL_Linear_Layer.from_mrl_linear(head)
    assert list(back.state_dict()) == list(checkpoint(efficient, bias))
    torch.testing.assert_close(torch.stack(back(x)).detach(), expected, rtol=1e-13, atol=1e-13)
    for other in (head, back):  # shared: what trains one trains the other
        for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            assert mine is theirs
    found = AdaptiveClassifier(layer).set_thresholds([0.6, 0.7]).predict(x.detach())
    assert set(found.dims.tolist()) == set(NESTING)
    stage = torch.searchsorted(torch.tensor(NESTING), found.dims)
    assert torch.equal(found.labels, expected.argmax(-1)[stage, torch.arange(ROWS)])


def test_what_is_not_taken_for_a_layer():
    layer, head = loaded(True, True), MRLLinear(NESTING, CLASSES)
    with pytest.raises(
        TypeError, match="layer: expected an MRL_Linear_Layer of .* got Linear with"
    ):
        MRLLinear.from_raivn(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="head: expected an MRLLinear, got MRL_Linear_Layer"):
        MRL_Linear_Layer.from_mrl_linear(layer)
    for module in (layer, head):
        module.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(
        TypeError, match="layer: expected .* without hooks, got .*MRL_Linear.* with the"
    ):
        AdaptiveClassifier(layer)
    with pytest.raises(
        TypeError, match="head: expected .* without hooks, got .*MRLLinear with the hook"
    ):
        MRL_Linear_Layer.from_mrl_linear(head)


def test_a_class_out_of_range_is_named():
    x, target = batch()
    layer = loaded(False, True)
    target[3], criterion = CLASSES, Matryoshka_CE_Loss(ignore_index=-1)
    for output in (layer(x), (layer, x)):
        with pytest.raises(
            ValueError, match=rf"target: expected .*{CLASSES}\) or -1, got {CLASSES}"
        ):
            criterion(output, target)
    target[3] = -1
    assert criterion(layer(x), target).isfinite()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("efficient", [False, True], ids=["MRL", "MRL-E"])
def test_loss_and_gradients(efficient, options):
    x, target = batch()
    options = dict(options)
    layer = loaded(efficient, options.pop("bias", True))
    leaves = [x, *layer.parameters()]
    criterion = Matryoshka_CE_Loss(**options)
    importance = options.pop("relative_importance", None)
    loss = plain_loss(plain_logits(dict(layer.named_parameters()), x, efficient), target,
                      importance, **options)  # fmt: skip
    expected = [loss, *torch.autograd.grad(loss, leaves)]
    for output in (layer(x), (layer, x), torch.stack(layer(x))):
        loss = criterion(output=output, target=target)
        assert loss.shape == ()
        actual = [loss, *torch.autograd.grad(loss, leaves)]
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
        per_dim = criterion.per_dim.reshape(3, -1).sum(1)
        c = torch.tensor(importance or [1.0] * 3, dtype=torch.float64)
        torch.testing.assert_close((c * per_dim).sum(), loss.detach())


@pytest.mark.parametrize("deferred", [False, True], ids=["logits", "deferred"])
@pytest.mark.parametrize("efficient", [False, True], ids=["MRL", "MRL-E"])
def test_float32_error_budget(efficient, deferred):
    """Confident predictions included: half of the rows are about certain."""

    def gradients(dtype, ours):
        x, target = batch(dtype)
        with torch.no_grad():
            x[::2] *= 16  # exact in every dtype
        layer = loaded(efficient, True, dtype)
        layer.deferred = deferred
        leaves = [x, *layer.parameters()]
        if ours:
            loss = Matryoshka_CE_Loss([0.1, 0.2, 0.7])(layer(x), target)
        else:
            outputs = plain_logits(dict(layer.named_parameters()), x, efficient)
            importance = torch.tensor([0.1, 0.2, 0.7]).tolist()  # as fp32 has them
            loss = plain_loss(outputs, target, importance)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    exact = gradients(torch.float64, ours=False)
    native = gradients(torch.float32, ours=False)
    actual = gradients(torch.float32, ours=True)
    bounds = rounding_bounds(lambda: gradients(torch.float64, ours=False))
    for i, (*triple, bound) in enumerate(zip(actual, exact, native, bounds, strict=True)):
        assert_within_budget(*triple, name=f"{i}", bound=lambda bound=bound: bound)


def network(efficient=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), loaded(efficient, True, torch.float32))


def step(model, criterion, autocast=False):
    """A line of RAIVN's training loop: the loss and the model's gradients."""
    x, target = batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = criterion(model(x), target)
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def defer(model):
    model[-1].deferred = True
    return model


@pytest.mark.parametrize("efficient", [False, True], ids=["MRL", "MRL-E"])
def test_deferring_changes_no_loop(efficient):
    model, criterion = network(efficient), Matryoshka_CE_Loss(label_smoothing=0.1)
    expected = step(model, criterion)
    deferred = defer(copy.deepcopy(model))
    x, _ = batch(torch.float32)
    layer, features = deferred(x)
    assert layer is deferred[-1] and features.shape == (ROWS, WIDTH)
    torch.testing.assert_close(step(deferred, criterion), expected)
    assert len(deferred.eval()(x)) == 3  # evaluation sees logits
    torch.testing.assert_close(torch.stack(deferred(x)), torch.stack(model(x)))
    assert list(deferred.state_dict()) == list(model.state_dict())

    rough = step(model, criterion, autocast=True)
    actual = step(deferred.train(), criterion, autocast=True)
    for a, r, e in zip(actual, rough, expected, strict=True):
        bound = 2 * (r - e).abs().max() + 2**-8 * e.abs().max()
        assert (a - e).abs().max() <= bound
    with torch.autocast("cpu", torch.bfloat16):
        output = deferred(x)
    with pytest.raises(TypeError, match="expected torch.bfloat16 as x, got torch.float32"):
        criterion(output, batch()[1])  # outside, where the forward's dtype is not known


def test_deferring_compiles_as_one_graph():
    model, criterion = defer(network()), Matryoshka_CE_Loss([1.0, 2.0, 3.0])
    x, target = batch(torch.float32)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        compiled = torch.compile(
            lambda x: criterion(model(x), target), fullgraph=True, backend="aot_eager"
        )
        loss = compiled(x)
    torch.testing.assert_close(loss, criterion(model(x), target))
    actual = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(list(actual), step(model, criterion)[1:])


def test_deferring_under_ddp(tmp_path):
    model, criterion = defer(network()), Matryoshka_CE_Loss()
    expected = step(copy.deepcopy(model), criterion)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second would miss gradients that the first did not reduce
            torch.testing.assert_close(step(parallel, criterion), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("bias", [True, False])
def test_fixed_feature_layer(bias):
    x, _ = batch()
    layer = FixedFeatureLayer(8, CLASSES, bias=bias, dtype=torch.float64)
    assert list(layer.state_dict()) == (["weight", "bias"] if bias else ["weight"])
    expected = x[:, :8] @ layer.weight.T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[:, :8]), expected)
    with pytest.raises(ValueError, match="x: expected width >= 8, got 7"):
        layer(x[:, :7])


def test_logits_may_be_written_to():
    layer = MRL_Linear_Layer(NESTING, CLASSES)
    logits = layer(torch.randn(ROWS, WIDTH))
    logits[0][:, 0] = -1.0
    logits[1].mul_(2)
    sum(part.sum() for part in logits).backward()
    assert not layer.nesting_classifier_0.weight.grad[0].any()


@pytest.mark.parametrize("deferred", [False, True])
def test_hooks_of_a_classifier_run(deferred):
    """weight_norm makes the weight in one, from parameters that training changes."""
    layer = MRL_Linear_Layer(NESTING, CLASSES)
    layer.deferred = deferred
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and used
        nn.utils.weight_norm(layer.nesting_classifier_0)
    with torch.no_grad():
        layer.nesting_classifier_0.weight_g.mul_(3)
    x = torch.randn(ROWS, WIDTH)
    torch.testing.assert_close(layer(x)[0], layer.nesting_classifier_0(x[:, : NESTING[0]]))


def test_soft_targets_and_maps_go_to_pytorch():
    """What nn.CrossEntropyLoss takes beside classes [B], on logits."""
    g = torch.Generator().manual_seed(0)
    soft = torch.rand(ROWS, CLASSES, generator=g).softmax(1)
    outputs = torch.rand(3, ROWS, CLASSES, generator=g)
    torch.testing.assert_close(Matryoshka_CE_Loss()(outputs, soft), plain_loss(outputs, soft))
    maps = torch.rand(3, 2, CLASSES, 4, 5, generator=g)
    target = torch.randint(CLASSES, (2, 4, 5), generator=g)
    rows = Matryoshka_CE_Loss([1.0, 2.0, 3.0], reduction="none")
    torch.testing.assert_close(
        rows(maps, target), plain_loss(maps, target, [1.0, 2.0, 3.0], reduction="none")
    )
    assert rows.per_dim.shape == (3, 2, 4, 5)
    layer = loaded(True, True)
    with pytest.raises(TypeError, match="target: expected torch.int64, got torch.float32"):
        Matryoshka_CE_Loss()((layer, batch()[0]), soft)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_importance_follows_the_logits():
    x, target = batch(torch.float32)
    layer = loaded(True, True, torch.float32)
    criterion = Matryoshka_CE_Loss([1.0, 2.0, 3.0])  # never moved
    expected = criterion(layer(x), target)
    layer, x, target = layer.cuda(), x.detach().cuda(), target.cuda()
    for output in (layer(x), (layer, x)):
        torch.testing.assert_close(criterion(output, target).cpu(), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MRL_Linear_Layer([8, 4]), ValueError, "nesting_list: expected strictly ascending"),
        (lambda: MRL_Linear_Layer(8), TypeError, "nesting_list: expected a sequence"),
        (lambda: MRL_Linear_Layer([8], 0), ValueError, "num_classes: expected an integer >= 1"),
        (lambda: MRL_Linear_Layer([8], bais=True), TypeError, "bais"),
        (lambda: MRL_Linear_Layer([8])(torch.ones(2, 7)), ValueError, "x: expected width >= 8"),
        (lambda: Matryoshka_CE_Loss(wieght=None), TypeError, "wieght"),
        (lambda: Matryoshka_CE_Loss(3), ValueError, "relative_importance: expected finite numbers"),
        (lambda: Matryoshka_CE_Loss([1, None]), ValueError, "expected finite numbers, got .1, Non"),
        (lambda: Matryoshka_CE_Loss([1, float("inf")]), ValueError, "expected finite numbers"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda layer, x: layer, TypeError, "output: expected G logits, or an MRL_Linear_Layer"),
        (lambda layer, x: (layer, x, x), ValueError, r"output: expected \(layer, features\), got"),
        (lambda layer, x: (layer, x), ValueError, "relative_importance: expected 3 numbers, one a"),
        (lambda layer, x: layer(x), ValueError, "relative_importance: expected 3 numbers, one a"),
    ],
)
def test_bad_output(output, error, message):
    x, target = batch()
    with pytest.raises(error, match=message):
        Matryoshka_CE_Loss([1.0, 2.0])(output(loaded(False, True), x), target)
