"""The Triton loss engine below the public ops: strides, chunks, hidden columns, masked classes."""

import pytest
import torch
import torch.nn.functional as F
from mrl_fast.kernels import tiling

from mrl_fast import kernels
from mrl_fast.testing import assert_within_budget

DIMS = (1, 3, 8, 12)  # slabs narrower than a block, starting anywhere


class Problem:
    """Inputs ``[B, > D]``, and what PyTorch makes of them prefix by prefix."""

    def __init__(self, device, *, B=20, V=37, dims=DIMS, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.dims, self.width = dims, dims[-1] + 2
        self.x = torch.randn(B, self.width, generator=g).to(device)
        self.weight = torch.randn(V, self.width, generator=g).to(device)
        self.bias = torch.randn(V, generator=g).to(device)
        self.target = torch.randint(V, (B,), generator=g).to(device)
        self.soft = torch.rand(V, generator=g).to(device)
        self.grad = torch.randn(len(dims), B, V, generator=g).to(device)
        self.d_target, self.d_soft = torch.randn(2, len(dims), B, generator=g).to(device)

    def native(self, dtype):
        """Logits and their gradients; the two log-probabilities and their gradients."""
        leaves = [t.to(dtype).requires_grad_() for t in (self.x, self.weight, self.bias)]
        x, weight, bias = leaves
        z = torch.stack([F.linear(x[:, :d], weight[:, :d], bias) for d in self.dims])
        from_z = torch.autograd.grad(z, leaves, self.grad.to(dtype), retain_graph=True)
        logp = z.log_softmax(-1)
        hit = logp.gather(2, self.target.expand(len(self.dims), -1)[:, :, None])[:, :, 0]
        soft = logp @ self.soft.to(dtype)
        loss = (hit * self.d_target + soft * self.d_soft).sum()
        return [
            z.detach(),
            *from_z,
            hit.detach(),
            soft.detach(),
            *torch.autograd.grad(loss, leaves),
        ]

    def engine(self):
        head = self.x, self.weight, self.bias
        z = kernels.logits_forward(*head, self.dims)
        from_z = kernels.logits_backward(self.grad, *head, self.dims)
        row_max, log_sum, hit, soft = kernels.cross_entropy_forward(
            *head, self.target, self.soft, self.dims
        )
        from_loss = kernels.cross_entropy_backward(
            *head, self.target, self.soft, row_max, log_sum, self.dims, self.d_target, self.d_soft
        )
        return [z, *from_z, hit, soft, *from_loss]

    def check(self):
        exact, native = self.native(torch.double), self.native(torch.float)
        for name, *results in zip(NAMES, self.engine(), exact, native, strict=True):
            assert_within_budget(*results, name=name)


NAMES = ["logits", "dx of logits", "dw of logits", "db of logits"]
NAMES += ["logp_target", "logp_soft", "dx", "dw", "db"]


# one program; ragged in every axis; one row; two classes; blocks of columns that end on a slab
@pytest.mark.parametrize(
    ("B", "V", "dims"),
    [(16, 16, (16,)), (20, 37, DIMS), (1, 40, (5, 6)), (18, 2, (2, 20)), (17, 33, (16, 32))],
    ids=str,
)
def test_shapes(B, V, dims, triton_device):
    Problem(triton_device, B=B, V=V, dims=dims).check()


def test_any_stride(triton_device):
    problem = Problem(triton_device)
    expected = problem.engine()
    for name in ("x", "weight"):
        t = getattr(problem, name)
        setattr(problem, name, t.T.contiguous().T)  # columns apart
    for name in ("bias", "soft", "target"):
        t = getattr(problem, name)
        setattr(problem, name, torch.stack([t, t.flip(0)], dim=1)[:, 0])
    for name, actual, exact in zip(NAMES, problem.engine(), expected, strict=True):
        torch.testing.assert_close(actual, exact, msg=name)
    problem.x = problem.x[:1].expand(20, -1)  # rows on one another
    problem.check()


def test_chunks_of_rows_and_classes(triton_device, monkeypatch):
    monkeypatch.setattr(tiling, "WORKSPACE_BYTES", 1)  # the least is 128 × 128
    problem = Problem(triton_device, B=140, V=150, dims=(2, 5))
    assert tiling.chunk_steps(140, 150, 8) == (128, 128) and tiling.row_step(24) == 128
    problem.check()


@pytest.mark.parametrize("rows", [1, 100, 8192, 1_000_000])
@pytest.mark.parametrize("classes", [1, 1000, 262_144, 10_000_000])
@pytest.mark.parametrize("bytes_a_score", [2, 14, 4 * 64])
def test_chunks_fit_the_workspace(rows, classes, bytes_a_score):
    row_step, class_step = tiling.chunk_steps(rows, classes, bytes_a_score)
    held = min(rows, row_step) * min(classes, class_step) * bytes_a_score
    assert held <= tiling.WORKSPACE_BYTES
    if held < tiling.WORKSPACE_BYTES // 2:  # small only where the problem is
        assert rows <= row_step and classes <= class_step
    assert row_step % 128 == class_step % 128 == 0


def test_hidden_columns_stay_hidden(triton_device):
    problem = Problem(triton_device)
    expected = problem.engine()
    for hidden in (torch.inf, torch.nan):
        problem.x[:, DIMS[-1] :] = hidden
        problem.weight[:, DIMS[-1] :] = hidden
        for name, actual, exact in zip(NAMES, problem.engine(), expected, strict=True):
            assert torch.equal(actual, exact), name
    dx, dw = expected[-3], expected[-2]
    assert (dx[:, DIMS[-1] :] == 0).all() and (dw[:, DIMS[-1] :] == 0).all()
    problem.weight[:, 8] = torch.inf  # seen by the widest prefix only
    z = kernels.logits_forward(problem.x, problem.weight, problem.bias, DIMS)
    assert torch.equal(z[:3], expected[0][:3]) and not z[3].isfinite().any()


def test_whole_tiles_of_masked_classes(triton_device):
    problem = Problem(triton_device, V=300, dims=(2, 5))
    problem.bias[130:] = -torch.inf  # 128 classes or more in a row, as of a padded vocabulary
    problem.target %= 130
    head = problem.x, problem.weight, problem.bias
    row_max, log_sum, hit, _ = kernels.cross_entropy_forward(*head, problem.target, None, (2, 5))
    dx, dw, db = kernels.cross_entropy_backward(
        *head, problem.target, None, row_max, log_sum, (2, 5), problem.d_target, None
    )
    assert (dw[130:] == 0).all() and (db[130:] == 0).all()
    problem.weight, problem.bias = problem.weight[:130], problem.bias[:130]
    problem.soft, problem.grad = problem.soft[:130] * 0, problem.grad[:, :, :130]
    actual = dict(logp_target=hit, dx=dx, dw=dw[:130], db=db[:130])
    exact = dict(zip(NAMES, problem.native(torch.double), strict=True))
    native = dict(zip(NAMES, problem.native(torch.float), strict=True))
    for name, value in actual.items():
        assert_within_budget(value, exact[name], native[name], name=name)


def test_a_target_that_is_no_class_gives_nan(triton_device):
    problem = Problem(triton_device)
    problem.target[3], problem.target[4] = 37, -1  # a GPU is not asked to check
    _, _, hit, _ = kernels.cross_entropy_forward(
        problem.x, problem.weight, None, problem.target, None, DIMS
    )
    bad = torch.zeros(20, dtype=torch.bool, device=hit.device)
    bad[3:5] = True
    assert torch.equal(hit.isnan(), bad.expand(4, -1))


def test_the_most_probable_class_is_exactly_at_the_maximum(triton_device):
    problem = Problem(triton_device)
    for g, d in enumerate(DIMS):
        z = kernels.logits_forward(problem.x, problem.weight, problem.bias, DIMS)[g]
        row_max, log_sum, hit, _ = kernels.cross_entropy_forward(
            problem.x, problem.weight, problem.bias, z.argmax(-1), None, DIMS
        )
        assert torch.equal(hit[g], -log_sum[g]), d  # (z − row_max) is 0, not about 0


def test_tiny_and_absent_gradients(triton_device):
    problem = Problem(triton_device)
    for dtype in (torch.float32, torch.float16):
        head = [t.to(dtype) for t in (problem.x, problem.weight, problem.bias)]
        row_max, log_sum, _, _ = kernels.cross_entropy_forward(*head, problem.target, None, DIMS)
        forward = *head, problem.target, None, row_max, log_sum, DIMS
        large = kernels.cross_entropy_backward(*forward, problem.d_target, None)
        small = kernels.cross_entropy_backward(*forward, problem.d_target * 2.0**-12, None)
        assert (small[0].float() * 2.0**12 - large[0].float()).abs().max() < 2e-3
        zero = kernels.cross_entropy_backward(*forward, problem.d_target * 0, None)
        assert all((t == 0).all() for t in zero)
        nan = kernels.cross_entropy_backward(*forward, problem.d_target * torch.nan, None)
        assert nan[0][:, : DIMS[-1]].isnan().all()  # as a GradScaler has to see it


def test_no_rows(triton_device):
    problem = Problem(triton_device, B=0)
    results = problem.engine()
    shapes = [(4, 0, 37), (0, 14), (37, 14), (37,), (4, 0), (4, 0), (0, 14), (37, 14), (37,)]
    assert [tuple(t.shape) for t in results] == shapes
    assert all((t == 0).all() for t in results)
