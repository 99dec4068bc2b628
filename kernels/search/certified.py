"""Exact search by bounds, and range search: every row that could matter is scored in fp64.

A coarse form of the rows (coarse.py) bounds each row's score. A shortlist's k-th best full score is
a threshold θ; a second scan of that form keeps the rows whose bound reaches it.
Where those are too many, as among vectors without structure, the query's rows are scanned at full
width instead: the device decides, query by query. A range search is the same scan with θ given.
"""

import torch
from mrl_fast.kernels.search.coarse import Codes, Prefix
from mrl_fast.kernels.search.keys import EMPTY, Result, empty, scores_of, select
from mrl_fast.kernels.search.metrics import GATES, Margin, row_norms, upper
from mrl_fast.kernels.search.pair_scores import RESCANNED
from mrl_fast.kernels.search.plan import Buffers, KnownRows, Plan, buffers, fitting
from mrl_fast.kernels.search.queries import scan_queries
from mrl_fast.kernels.search.rescan import score_buckets
from mrl_fast.kernels.search.scan import Scan
from mrl_fast.kernels.search.scan_shape import BUCKET, scan_config
from mrl_fast.kernels.search.topk import Search, part_of, topk
from mrl_fast.kernels.shared.tiling import chunks
from torch import Tensor

SURVIVORS = 2048  # buckets whose rows are scored in full


def exact_topk(
    q: Tensor, x: Tensor, k: int, metric: str, result: Result, rows: KnownRows,
    form: Prefix | Codes | None,
) -> Tensor:  # fmt: skip
    """Writes the k best of the rows ``x [N, D]``, by scores summed in fp64 and rounded to fp32.

    Args:
        form: What bounds the rows' scores; None: nothing does.

    Returns:
        How many rows of each query were scored at full width, ``[B]`` int64; N where all were
        scanned.
    """
    touched = torch.full((len(q),), len(x), dtype=torch.int64, device=q.device)
    plan = Plan.from_sizes(k, x, scan_config(len(q), x), Margin.from_rows(x, metric), len(q))
    if form is None or not len(x) or k > SURVIVORS or len(plan.ends) == 1:
        topk(q, x, k, metric, result, rows, double=True)
        return touched
    size = SURVIVORS * BUCKET * 8 + plan.bytes
    for part in chunks(len(q), fitting(size)):
        to = part_of(result[0], part), part_of(result[1], part)
        touched[part] = _certify(part_of(q, part), x, k, metric, to, rows, form)
    return touched


def _certify(
    q: Tensor, x: Tensor, k: int, metric: str, result: Result, rows: KnownRows,
    form: Prefix | Codes,
) -> Tensor:  # fmt: skip
    pairs = rows.pairs(q, x, metric, double=True)
    near = empty(q, min(RESCANNED, max(64, 4 * k)))
    queries, ranks, known = form.ranking(q, metric)
    topk(queries, form.x, near[0].shape[1], ranks, near, known)
    best = pairs.keys(near[1]).topk(k, dim=1).values[:, -1]  # [B]

    to, scan = _reach(q, form, metric, scores_of(best), SURVIVORS)
    keys = score_buckets(pairs, to, SURVIVORS, scan.config)
    count, flag = to.count[: len(q)], to.flag[: len(q)]
    touched = torch.where(flag != 0, len(x), (count * BUCKET).clamp(max=len(x)))

    coarse, config = scan_queries(q, x, metric), scan_config(len(q), x)
    plan = Plan.from_sizes(k, x, config, coarse.margin, len(q))
    others = Search(x, metric, k, plan, config, rows, among=flag).shortlist(coarse, pairs)
    select(torch.cat([keys, others], dim=1), result, rows.ids)
    return touched


def _reach(
    q: Tensor, form: Prefix | Codes, metric: str, theta: Tensor, size: int
) -> tuple[Buffers, Scan]:
    """The buckets of every row whose score at full width may reach ``theta [B]``, as a bound by its
    form says; their count may be more than ``size``."""
    coarse, terms, error, unit = form.bounding(q, metric)
    theta, norms = theta.double(), upper(row_norms(q), q.shape[1]).double()
    reached, size_of_terms = GATES[metric](theta, norms)
    gate = reached - 2e-6 * size_of_terms - error
    gate = (gate if unit is None else gate / unit).float()
    gate = gate.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    config = scan_config(len(q), form.x)
    assert form.norm is not None
    scan = Scan(config, coarse, form.x, metric, terms, form.norm)
    seeds = config.BLOCK_N // BUCKET
    to = buffers(q, size + seeds)
    # The last tile, which may be ragged, is the first in order: its buckets are kept unscanned.
    end = scan.tiles * seeds
    to.hits[:, :seeds] = torch.arange(end - seeds, end, dtype=torch.int64, device=q.device)
    to.count.fill_(seeds)
    scan(to.hits, to.count, gate, 1, scan.tiles)
    return to, scan


def range_search(
    q: Tensor, x: Tensor, threshold: float, metric: str, rows: KnownRows, form: Prefix | Codes
) -> tuple[Tensor, Tensor, Tensor]:
    """Limits, scores and ids of every row whose fp64 score, rounded to fp32, reaches the threshold.
    Waits for the device, to learn how many there are."""
    least = float(torch.tensor(threshold, dtype=torch.float32, device="cpu"))
    found = [torch.empty(0, dtype=torch.int64, device=q.device)]
    counts = [] if len(x) else [0] * len(q)
    for part in chunks(len(q) - len(counts), fitting(SURVIVORS * BUCKET * 8)):
        size = SURVIVORS
        theta = torch.full((len(q[part]),), threshold, dtype=torch.float64, device=q.device)
        to, scan = _reach(part_of(q, part), form, metric, theta, size)
        if (most := int(to.count.max())) > size:
            size = most
            to, scan = _reach(part_of(q, part), form, metric, theta, size)
        for i in range(len(theta)):
            b, mine = slice(part.start + i, part.start + i + 1), slice(i, i + 1)
            pairs = rows.pairs(q[b], x, metric, double=True)
            its = Buffers(*(field[mine] for field in to[:4]), *to[4:])
            keys = score_buckets(pairs, its, size, scan.config)[0]
            keys = keys[(keys != EMPTY.value) & (scores_of(keys) >= least)]
            found.append(keys.sort(descending=True).values)
            counts.append(len(keys))
    lims = torch.tensor([0, *counts], dtype=torch.int64, device=q.device).cumsum(0)
    keys = torch.cat(found)
    ids = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    return lims, scores_of(keys), ids if rows.ids is None else rows.ids[ids]
