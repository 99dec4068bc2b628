"""The error of a scan's sums, as a part of the margin that its selection allows for."""

from __future__ import annotations

import torch
from mrl_fast.kernels.search import metrics, plan, scan, scan_shape
from mrl_fast.kernels.shared.tiling import operand
from torch import Tensor


def scan_error(q: Tensor, x: Tensor) -> Tensor:
    """The largest of |a bucket's best sum − the exact one| / margin, a scalar: at most 1.

    Args:
        q: ``[B, dim]``, of more bits than the rows at most.
        x: ``[N, dim]``; every bucket of it has to come back, once.
    """
    q, x, N = operand(q), operand(x), len(x)
    coarse, config = plan.scan_queries(q, x, "ip"), scan_shape.scan_config(len(q), x)
    seeds, tiles = config.BLOCK_N // scan_shape.BUCKET, -(-N // config.BLOCK_N)
    hits, count, _, theta = plan.buffers(coarse.q, tiles * seeds, tiles * seeds)
    terms, norm = metrics.row_terms(x, "ip")
    one = scan.Scan(config, coarse.q, x, "ip", terms, coarse.norms, norm, low=coarse.low)
    one(hits, count, theta, 0, tiles, window=1)
    best = (hits >> 32).int().view(torch.float32).double()
    bucket, i = hits & 0xFFFFFFFF, torch.arange(scan_shape.BUCKET, device=q.device)
    some = bucket[0] != 0xFFFFFFFF
    whole = some.sum() * scan_shape.BUCKET >= N
    once = (bucket[0].sort().values.diff() > 0)[some[1:] & some[:-1]].all()
    bucket = bucket[0].where(some, 0)
    within = (bucket % seeds)[:, None]
    rows = (i // 2 * config.groups + within // 4) * 8 + within % 4 * 2 + i % 2
    rows = rows + (bucket // seeds * config.BLOCK_N)[:, None]
    exact = q.double() @ x.double().T
    exact = exact[:, rows.clamp(max=N - 1)].where(rows < N, -torch.inf).amax(2)
    margin = coarse.margin.error(coarse.norms, norm)
    if coarse.errors is not None:
        margin = margin + coarse.errors * norm
    error = ((best - exact).abs() / margin[:, None]).where(some, 0.0).amax()
    return torch.where(whole & once, error, torch.inf)
