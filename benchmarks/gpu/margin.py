"""The error of a scan's sums, as a part of the margin that its selection allows for."""

from __future__ import annotations

import torch
from mrl_fast.kernels.search import metrics, plan, queries, scan, scan_shape
from mrl_fast.kernels.shared.tiling import operand
from torch import Tensor

NOTHING = 0xFFFFFFFF  # where a bucket has no rows


def scan_error(q: Tensor, x: Tensor) -> Tensor:
    """The largest of |a bucket's best sum − the exact one| / margin, a scalar: at most 1.

    Args:
        q: ``[B, dim]``, of more bits than the rows at most.
        x: ``[N, dim]``; every bucket of it has to come back, once.
    """
    N = len(x)
    if q.dtype == x.dtype:
        q, x = operand(q), operand(x)
    coarse, config = queries.scan_queries(q, x, "ip"), scan_shape.scan_config(len(q), x)
    seeds, tiles = config.BLOCK_N // scan_shape.BUCKET, -(-N // config.BLOCK_N)
    to = plan.buffers(coarse.q, tiles * seeds)
    terms, norm = metrics.row_terms(x, "ip")
    one = scan.Scan(config, coarse, x, "ip", terms, norm)
    one(to.hits, to.count, to.theta, 0, tiles, window=1)
    best = (to.hits >> 32).int().view(torch.float32).double()
    bucket, i = to.hits & NOTHING, torch.arange(scan_shape.BUCKET, device=q.device)
    some, ordered = bucket[0] != NOTHING, bucket[0].sort().values
    once = ((ordered.diff() > 0) | (ordered[1:] == NOTHING)).all()
    bucket = bucket[0].where(some, 0)
    within = (bucket % seeds)[:, None]
    rows = (i // 2 * config.groups + within // 4) * 8 + within % 4 * 2 + i % 2
    rows = rows + (bucket // seeds * config.BLOCK_N)[:, None]
    whole = ((rows < N) & some[:, None]).sum() == N
    exact = q.double() @ x.double().T
    exact = exact[:, rows.clamp(max=N - 1)].where(rows < N, -torch.inf).amax(2)
    margin = coarse.margin.error(coarse.upper_norms(), norm)
    if coarse.errors is not None:
        margin = margin + coarse.errors * norm
    error = ((best - exact).abs() / margin[:, None]).where(some, 0.0).amax()
    return torch.where(whole & once, error, torch.inf)
