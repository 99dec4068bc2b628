"""Cross-entropy and InfoNCE over any shape, nesting, dtype and stride."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from mrl_fast import matryoshka_cross_entropy, matryoshka_info_nce
from mrl_fast.testing import assert_within_budget, rounding_bounds

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@st.composite
def problems(draw):
    width = draw(st.integers(1, 150))
    dims = sorted(draw(st.sets(st.integers(1, width), min_size=1, max_size=6)))
    rows, classes = draw(st.integers(1, 130)), draw(st.integers(1, 200))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    strided = draw(st.sampled_from(["rows", "columns", "slice"]))
    return rows, classes, width, tuple(dims), dtype, strided, draw(st.integers(0, 2**31))


def laid(x, how):
    """The same values, as a slice of something wider or with columns apart."""
    if how == "columns":
        return x.T.contiguous().T
    if how == "slice":
        return F.pad(x, (3, 2), value=torch.nan)[:, 3:-2]
    return x


@settings(max_examples=60, deadline=None)
@given(problems())
def test_any_cross_entropy_and_info_nce(problem):
    rows, classes, width, dims, dtype, strided, seed = problem
    g = torch.Generator().manual_seed(seed)
    x, w, p = (
        torch.randn(n, width, generator=g).to(dtype) for n in (rows, classes, rows + classes)
    )
    target = torch.randint(classes, (rows,), generator=g)

    def run(dtype, impl):
        results = []
        for other, loss in (
            (w, lambda a, b: matryoshka_cross_entropy(a, b, target, dims, impl=impl)),
            (p, lambda a, b: matryoshka_info_nce(a, b, dims, impl=impl)),
        ):
            a = laid(x.to(dtype), strided).detach().requires_grad_()
            b = laid(other.to(dtype), strided).detach().requires_grad_()
            out = loss(a, b)
            out.loss.backward()
            results += [out.per_dim, a.grad, b.grad]
        return results

    exact, native = run(torch.float64, "reference"), run(dtype, "reference")
    bounds = cache(lambda: rounding_bounds(lambda: run(torch.float64, "reference")))

    def bound(i):
        """The fused gradient subtracts the radial part from a direct one as large as scale / norm;
        PyTorch from sums of unit vectors, which may have cancelled."""
        norms = (x, p)[i == 5][:, : dims[0]].double().norm(dim=1, keepdim=True)
        radial = 8 * torch.finfo(torch.float32).eps * 20 / norms.clamp_min(1e-6)
        return bounds()[i] + (radial if i > 3 else 0.0)

    for i, (a, e, n) in enumerate(zip(run(dtype, "cpp"), exact, native, strict=True)):
        assert_within_budget(a, e, n, name=f"result {i}", bound=partial(bound, i))
