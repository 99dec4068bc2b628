"""Codes of rows as an index on a device keeps them."""

import torch
from mrl_fast.kernels.search.coarse import Codes, Int8
from mrl_fast.kernels.search.metrics import row_norms, row_terms, upper
from mrl_fast.kernels.search.plan import KnownRows


def coded(x, metric):
    """What is known of the rows ``x [N, D]``, and their codes."""
    terms, largest = row_terms(x, metric)
    (codes, scale, left), norms = Int8.of(x), row_norms(x)
    outers = torch.stack([left, upper(norms, x.shape[1])])
    if metric == "cosine":
        scale, outers = scale * terms.scale, outers * terms.scale * (1 + 2e-6)
    if metric == "l2":
        outers = torch.cat([outers, terms.term[None]])
    return KnownRows(terms, largest), Codes(codes, scale, largest, terms.term, outers)
