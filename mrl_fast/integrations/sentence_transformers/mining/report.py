"""What mining found, in a table."""

from __future__ import annotations

import torch
from torch import Tensor

from mrl_fast.integrations.sentence_transformers.mining.candidates import Negatives
from mrl_fast.integrations.sentence_transformers.mining.options import Limits, Output
from mrl_fast.integrations.sentence_transformers.mining.pairs import Pairs

SHARES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "max": 1.0}


def report(pairs: Pairs, found: Negatives, limits: Limits, output: Output) -> str:
    """Scores of positives, of the negatives in the data set and how far they lie below; candidates
    that limits left out; pairs with too few negatives."""
    present = (found.scores != -torch.inf)[pairs.owner]  # [P, n]
    full = present.all(1)
    kept = present & full[:, None] if output.format == "n-tuple" else present
    negatives = found.scores[pairs.owner]
    scores = {
        "positive": found.positive_scores,
        "negative": negatives[kept],
        "difference": (found.positive_scores[:, None] - negatives)[kept],
    }
    tables = [_row("score", [*scores]), _row("count", [f"{len(s):,}" for s in scores.values()])]
    columns = [_statistics(s) for s in scores.values()]
    tables += [_row(name, [f"{c[name]:.4f}" for c in columns]) for name in columns[0]]
    for name, count in found.left_out.items():
        share = count / found.candidates
        limit = getattr(limits, name)
        tables.append(f"{name}={limit} left out {count:,} candidates, {share:.2%} of all")
    few = int((~full).sum())
    if few:
        fate = "left out" if output.format == "n-tuple" else "kept with those that there are"
        tables.append(
            f"{few:,} of {len(full):,} pairs have fewer than {negatives.shape[1]} negatives and "
            f"are {fate}: a larger range_max or wider limits find more"
        )
    return "\n".join(tables)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<8}" + "".join(f"{cell:>14}" for cell in cells)


def _statistics(scores: Tensor) -> dict[str, float]:
    """Of the scores in order, those at a share of their number; NaN where there are none."""
    count = len(scores)
    if not count:
        return dict.fromkeys(("mean", "std", *SHARES), torch.nan)
    ordered = scores.sort().values
    at = {name: float(ordered[round(share * (count - 1))]) for name, share in SHARES.items()}
    return {"mean": float(scores.mean()), "std": float(scores.std(correction=0)), **at}
