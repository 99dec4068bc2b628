"""Rows of an index on the device, end to end, against exact full-width search by PyTorch.

320,000 unit rows of 2048 columns in bf16, near 3,000 centres, with a falling spectrum; the prefix
as it is, or as int8; or the same numbers in fp32 beside int8 codes of every column. Rows and
queries are rounded before anyone sees them. Shortlists are the least that are good enough on
held-out queries. Bytes: the prefix or the codes of every row, and the columns that later stages add
to what is kept; of an exact search, the rows that it touched, each once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import search_data
from benchmarks.gpu import exact
from benchmarks.gpu.measure import DEVICE, OURS, Call, Row, Work, generator
from benchmarks.gpu.rivals import torch_topk
from mrl_fast import MatryoshkaIndex

K = 10
HELD_OUT_RECALL = 0.995
SHORTLISTS = (200, 400, 800, 1600, 3200)


FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "prefix_dtype": "int8"},
    "codes": {"dtype": "float32", "codes": "bits"},
}
CODES_TARGET = 4.0  # times torch's matmul and topk of fp32


class Search(NamedTuple):
    form: str  # that rows are scanned in, of FORMS
    how: str  # "stages" or "exact"
    queries: int
    rows: int = 320_000
    dims: tuple[int, ...] = (64, 256, 2048)
    judged: int = 256  # queries, also of a smaller batch
    held_out: int = 512  # queries that shortlists are chosen on
    recall: float = 0.99

    @property
    def name(self) -> str:
        return f"index-{self.form}-{self.how}-q{self.queries}"

    @property
    def shape(self) -> str:
        size = f"{self.rows:,} × {self.dims[-1]}"
        scanned = f"{self.form} of fp32" if self.form == "codes" else f"{self.form} prefix"
        return f"{size}, {scanned}, {self.queries:,} queries, {self.how}"

    def tiny(self) -> Search:
        return self._replace(
            queries=min(self.queries, 3), rows=300, dims=(8, 16, 32), judged=6, held_out=6,
            recall=0.9,
        )  # fmt: skip

    def work(self) -> Work:
        x, queries = vectors(self.rows, self.dims[-1])
        filled = index(self.form, self.rows, self.dims)
        if self.form == "codes":
            x, queries = x.float(), queries.float()
        q, stages, options = queries[: self.queries], None, {}
        notes: dict[str, Any] = {}
        if self.how == "exact":
            options["exact"] = True
        else:
            stages = shortlist(filled, x, queries[-self.held_out :])
            options["stages"] = notes["stages"] = stages

        def search(some: Tensor) -> Any:
            return filled.search(some, K, **options)

        calls: dict[str, Call] = {
            OURS: lambda: search(q),
            "torch": torch_topk(q, x, K),
        }
        if self.form == "codes":
            notes["target_ratio"] = CODES_TARGET
        else:
            calls["torch_fp32_scores"] = torch_topk(q, x, K, out_dtype=torch.float32)
        several = self.queries < self.judged  # one query tells no recall: more, batch by batch
        some = exact.spread_over(self.queries, self.judged).to(DEVICE)
        asked = queries[: self.judged] if several else q[some]
        least = exact.topk(asked, x, K)[0][:, -1:] - exact.tolerance(asked, x, "ip")

        def judge(name: str) -> float:
            if name == OURS and several:
                ids = torch.cat([search(part)[1] for part in asked.split(self.queries)])
            else:
                ids = calls[name]()[1]
                ids = ids if several else ids[some]
            assert ((ids >= 0) & (ids < len(x))).all(), "an id is no row"
            return exact.recall(
                exact.pair_scores(asked[: len(ids)], x, ids, "ip"), least[: len(ids)]
            )

        touched = None if stages else search(q).rows_touched.sum().item()
        return Work(calls, judge, "recall", self.recall, *self.cost(x, stages, touched), notes)

    def cost(
        self, x: Tensor, stages: Sequence[tuple[int, int]] | None, touched: int | None
    ) -> tuple[float, dict[str, float], str]:
        """Bytes, FLOPs by rate, and how they are counted."""
        int8, size, first = self.form != "float32", x.element_size(), self.dims[0]
        whole, rate = self.form == "codes", "bf16" if size == 2 else "fp32"
        scanned = self.dims[-1] if whole else first if stages is None else stages[0][0]
        numbers = float(len(x) * scanned)
        begin = 0 if int8 else scanned  # codes are no part of a score
        if stages is None:
            assert touched is not None
            pairs = float(touched) * (self.dims[-1] - begin)
            added = min(pairs, float(len(x)) * (self.dims[-1] - begin))
            text = "touched·(D − d')"
        else:
            added = 0.0
            for (_, keep), (dim, _) in zip(stages, stages[1:], strict=False):
                added += float(self.queries) * keep * (dim - begin)
                begin = dim
            pairs, text = added, "B·Σkeep·(d − d')"
        flops = {"int8" if int8 else rate: 2 * self.queries * numbers}
        flops[rate] = flops.get(rate, 0.0) + 2 * pairs
        prefix, d = 1 if int8 else size, "D" if whole else "d₀"
        return (
            prefix * numbers + size * added, flops,
            f"{prefix}·N·{d} + {size}·{text} bytes; 2·B·N·{d} + 2·{text} FLOPs",
        )  # fmt: skip


SEARCHES = [
    *(
        Search(prefix, how, batch)
        for prefix in ("float32", "int8")  # an index is filled once
        for how in ("exact", "stages")
        for batch in (1, 1024)
    ),
    *(Search("codes", "exact", batch) for batch in (1024, 1)),
]


def rows(*, tiny: bool, fewer: bool = False) -> Iterator[Row]:
    """``fewer``: with fewer rows in the index, but more than a scan keeps at once, so that the same
    binaries are launched."""
    for spec in SEARCHES:
        if tiny and (spec.queries == 1 or (spec.form == "int8") != (spec.how == "stages")):
            continue  # three rows show all; more take the interpreter a minute
        made = spec.tiny() if tiny else spec._replace(rows=50_000) if fewer else spec
        dtype = "fp32" if spec.form == "codes" else "bf16"
        yield Row(spec.name, made.shape, dtype, made.work, headline=spec.queries > 1)


@lru_cache(maxsize=1)
def vectors(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Unit rows, and queries near some of them: as in search_data, but with more queries."""
    x, _ = search_data.standard(rows, width, centres=min(3000, rows), device=DEVICE)
    spread = 1 / (1 + torch.arange(width, device=DEVICE) / 16).sqrt()
    source, count = generator(1), min(1024, rows) + 512
    near = x[torch.randint(rows, (count,), generator=source, device=DEVICE)]
    noise = torch.randn(near.shape, generator=source, device=DEVICE) * spread / spread.norm()
    return x.bfloat16(), F.normalize(near + 0.3 * noise).bfloat16()


@lru_cache(maxsize=1)
def index(form: str, rows: int, dims: tuple[int, ...]) -> MatryoshkaIndex:
    x, _ = vectors(rows, dims[-1])
    filled = MatryoshkaIndex(dims, metric="ip", device="cuda", **FORMS[form])
    filled.add(x)
    return filled


def shortlist(filled: MatryoshkaIndex, x: Tensor, held_out: Tensor) -> list[tuple[int, int]]:
    """Stages: the first prefix, then the full width of as few rows as are enough, or of the most
    that are tried."""
    least = exact.topk(held_out, x, K)[0][:, -1:] - exact.tolerance(held_out, x, "ip")
    stages = []
    for keep in SHORTLISTS:
        stages = [(filled.dims[0], min(keep, len(x) // 2)), (filled.dims[-1], K)]
        ids = filled.search(held_out, K, stages=stages)[1]
        if exact.recall(exact.pair_scores(held_out, x, ids, "ip"), least) >= HELD_OUT_RECALL:
            break
    return stages
