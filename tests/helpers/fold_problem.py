"""A fold's inputs, its specification over materialised scores, and the budgets of its results."""

from functools import cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mrl_fast.kernels import training as kernels

from mrl_fast.testing import assert_within_budget, rounding_bounds
from mrl_fast.training.spec import FoldSpec, Upstream
from tests.helpers.losses import generator

DIMS = (1, 3, 8, 12)  # slabs narrower than a block, starting anywhere
STATISTICS = ["row_max", "row_log", "hit", "soft_sum", "col_max", "col_log"]
GRADIENTS = ["dx", "dw", "db", "d_row_scale", "d_col_scale"]


def plain_fold(spec):
    """The specification. Any dtype, differentiable; scores ``[G, B, V]`` are in memory."""
    x, weight, dims, bias, row_scale, col_scale, target, soft, mask, *rules = spec[:15]
    period, exclude_own, own_boost, other_boost, link, columns = rules
    s = torch.stack([x[:, :d] @ weight[:, :d].T for d in dims])
    z = s if row_scale is None else s * row_scale[:, :, None] * col_scale[:, None, :]
    z = z if bias is None else z + bias
    B, V = len(x), len(weight)
    j = torch.arange(V, device=x.device)
    own = hit = torch.zeros(B, V, dtype=torch.bool, device=x.device)
    if target is not None:
        own, hit = (j % period)[None] == target[:, None], j[None] == target[:, None]
    boost = torch.where(own, own_boost, other_boost).where(~hit, 1.0)
    y = z + (z * boost - z).detach()
    y = z.where(boost == 1, y)
    excluded = torch.zeros_like(own) if mask is None else mask
    excluded = excluded | own if exclude_own else excluded
    y = y.masked_fill(excluded, -torch.inf)
    has_hit = target is not None and not exclude_own
    valid = hit.any(1)
    y_hit = y.gather(2, target.where(valid, 0).expand(len(dims), B)[:, :, None])[:, :, 0] if (
        has_hit) else None  # fmt: skip
    if link == "sigmoid":
        others = y.masked_fill(hit, -torch.inf) if has_hit else y
        row_log = -F.logsigmoid(-others).sum(2)
        y_hit = F.logsigmoid(y_hit).where(valid, torch.nan) if has_hit else None
        return torch.zeros_like(row_log), row_log, y_hit, None, None, None

    def folded(axis):
        top = y.detach().amax(axis, keepdim=True)
        shift = top.where(top != -torch.inf, 0.0)
        total = (y - shift).exp().sum(axis)
        return top.squeeze(axis), shift, total.where(total != 0, 1.0).log()

    row_max, shift, row_log = folded(2)
    y_hit = (y_hit - shift[:, :, 0] - row_log).where(valid, torch.nan) if has_hit else None
    soft_sum = None
    if soft is not None:
        logp = y - shift - row_log[:, :, None]
        soft_sum = logp.mul(soft).masked_fill(soft.expand(B, V) == 0, 0.0).sum(2)
    col_max, _, col_log = folded(1) if columns else (None, None, None)
    return row_max, row_log, y_hit, soft_sum, col_max, col_log


class Problem:
    """Inputs ``[B, > D]`` and a loss that is linear in whatever the fold returns."""

    OPTIONS = dict(
        B=20, V=37, dims=DIMS, scaled=False, bias=True, target=True, soft=None, mask=False,
        link="softmax", columns=False, period=None, exclude_own=False, own_boost=1.0,
        other_boost=1.0,
    )  # fmt: skip

    def __init__(self, device, **options):
        assert options.keys() <= self.OPTIONS.keys()
        o = SimpleNamespace(**self.OPTIONS | options)
        B, V, dims, soft = o.B, o.V, o.dims, o.soft
        g = generator()
        rand = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
        self.dims, self.link, self.columns = dims, o.link, o.columns
        self.rules = [o.period or V, o.exclude_own, o.own_boost, o.other_boost]
        G, D = len(dims), dims[-1] + 2
        self.x, self.weight, self.bias = rand(B, D), rand(V, D), rand(V) if o.bias else None
        self.row_scale = rand(G, B).mul(0.3).exp() / 3 if o.scaled else None
        self.col_scale = rand(G, V).mul(0.3).exp() if o.scaled else None
        classes = min(o.period or V, V)
        self.target = torch.randint(classes, (B,), generator=g).to(device) if o.target else None
        shape = {None: (0,), "row": (V,), "matrix": (B, V)}[soft]
        self.soft = (rand(*shape).relu() / 3) if soft else None
        self.mask = (rand(B, V) > 0.5) if o.mask else None
        if soft and o.mask:
            self.soft = self.soft.masked_fill(self.mask, 0.0)
        self.upstream = [rand(G, B), rand(G, B), rand(G, B), rand(G, V)]

    def tensors(self):
        return [self.x, self.weight, self.bias, self.row_scale, self.col_scale]

    def present(self, row_log, hit, soft_sum, col_log):
        parts = zip((row_log, hit, soft_sum, col_log), self.upstream, strict=True)
        return [(value, d) for value, d in parts if value is not None]

    def native(self, dtype):
        tensors = [
            None if t is None else t.detach().to(dtype).requires_grad_() for t in self.tensors()
        ]
        soft = None if self.soft is None else self.soft.to(dtype)
        x, weight, *terms = tensors
        out = plain_fold(self.spec()._replace(
            x=x, weight=weight, **dict(zip(("bias", "row_scale", "col_scale"), terms, strict=True)),
            soft=soft,
        ))  # fmt: skip
        loss = sum((v * d.to(dtype)).nansum() for v, d in self.present(*out[1:4], out[5]))
        leaves = [t for t in tensors if t is not None]
        found = iter(torch.autograd.grad(loss, leaves))
        grads = [None if t is None else next(found) for t in tensors]
        named = dict(zip(STATISTICS + GRADIENTS, [*out, *grads], strict=True))
        return {name: None if t is None else t.detach() for name, t in named.items()}

    def spec(self, compute_dtype=None):
        x, weight, bias, row_scale, col_scale = self.tensors()
        return FoldSpec(x, weight, self.dims, bias, row_scale, col_scale, self.target, self.soft,
                        self.mask, *self.rules, self.link, self.columns, compute_dtype)  # fmt: skip

    def forward(self, compute_dtype=None):
        out = kernels.fold_forward(self.spec(compute_dtype))
        return dict(zip(STATISTICS, out, strict=True))

    def backward(self, f, upstream=None, compute_dtype=None):
        d_row, d_hit, d_soft, d_col = upstream or self.upstream
        given = Upstream(
            f["row_max"], f["row_log"], f["col_max"], f["col_log"],
            d_row=d_row, d_hit=None if f["hit"] is None else d_hit,
            d_soft=None if self.soft is None else d_soft, d_col=d_col if self.columns else None,
        )  # fmt: skip
        out = kernels.fold_backward(self.spec(compute_dtype), given)
        return dict(zip(GRADIENTS, out, strict=True))

    def by_kernels(self):
        f = self.forward()
        return f | self.backward(f)

    def check(self, actual=None, names=None, kept=lambda name, t: t):
        """Checks the named results, or of each the part that ``kept`` gives, against the budget."""
        actual, exact = actual or self.by_kernels(), self.native(torch.double)
        native, bounds = self.native(torch.float), cache(self.bounds)
        for name in names or actual:
            check(name, kept(name, actual[name]), exact[name], native[name],
                  partial(lambda name: bounds()[name], name))  # fmt: skip

    def bounds(self):
        named = self.native(torch.double)
        present = [name for name, t in named.items() if t is not None]
        found = rounding_bounds(lambda: [self.native(torch.double)[name] for name in present])
        return dict(zip(present, found, strict=True))


def check(name, actual, exact, native, bound):
    assert (actual is None) == (exact is None), name
    if exact is None:
        return
    odd = ~exact.isfinite()  # the result must be the same infinity there, or NaN
    assert torch.equal(actual[odd].double().nan_to_num(), exact[odd].nan_to_num()), name
    assert not actual[~odd].isnan().any(), name
    actual, exact, native = (t.masked_fill(odd, 0.0) for t in (actual, exact, native))
    assert_within_budget(actual, exact, native, name=name, bound=bound)
