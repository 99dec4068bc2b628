"""What is searched, and how an answer is judged.

    docs, sentences, glosses, glosses256, minilm   real text: benchmarks/vector_sets.py
    clustered      3,000 centres, rows near them: unit rows of a falling spectrum
    centreless     the same spectrum without centres, where no row stands out
    fashion_mnist  60,000 x 784 images, of --data
    vectors        vectors.npy [N, D] (and queries.npy, or some of its rows), of --data

The last two are rotated to their second moment's eigenvectors, for us and every rival alike, so
that their prefixes mean something. Settings (shortlists, efSearch, nprobe, k_factor) are chosen on
held-out queries and recall is reported on others.

    python -m benchmarks.search_data docs sentences glosses clustered centreless   # makes them

Sets are kept in $MRL_FAST_CACHE, else ~/.cache/mrl_fast, and made again where packages changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.vector_sets import QUERIES, REAL, Made, cached
from mrl_fast import SearchResult, prefix_topk
from mrl_fast.evaluate import recall_at_k
from mrl_fast.search.index.rotation import Rotation

Search = Callable[[Tensor, int], Tensor]  # queries [B, D], k → ids [B, k] int64
GENERATED = {"clustered": 3000, "centreless": 0}  # centres
OF_FOLDER = ("fashion_mnist", "vectors")
NAMES = (*REAL, *GENERATED, *OF_FOLDER)
K = 10
RECALL = 0.99  # what every row has to reach on the queries it reports
HELD_OUT_RECALL = 0.995  # what its setting has to reach on others
SHORTLISTS = tuple(rows * 2**i for i in range(10) for rows in (50, 70))


class Case(NamedTuple):
    name: str
    x: Tensor  # [N, D] fp32 unit rows
    q: Tensor  # [Q, D], likewise
    prefix: int  # what searches scan first
    exact: SearchResult  # [2 * judged, K], of the first queries; the second half is held out

    def recall(self, search: Search, *, held_out: bool = False) -> float:
        half = len(self.exact.ids) // 2
        part = slice(half, 2 * half) if held_out else slice(half)
        exact = SearchResult(*(t[part] for t in self.exact))
        return recall_at_k(search(self.q[part], K), exact, self.q[part], self.x)

    def least(self, search_at: Callable[[int], Search], settings: Sequence[int]) -> int:
        """The first setting that is good enough for held-out queries, or the last."""
        good = (s for s in settings if self.recall(search_at(s), held_out=True) >= HELD_OUT_RECALL)
        return next(good, settings[-1])

    def __str__(self) -> str:
        return f"{self.name} {len(self.x):,} × {self.x.shape[1]}"


def standard(
    rows: int, width: int, *, centres: int = 3000, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unit rows around centres (0: none) with deviations 1/√(1 + c/16), and queries near rows."""
    torch.manual_seed(seed)
    spread = 1 / (1 + torch.arange(width, device=device) / 16).sqrt()
    middles = torch.randn(centres, width, device=device) * spread
    x = torch.empty(rows, width, device=device)
    for part in x.split(1 << 16):
        noise = 0.6 * torch.randn(part.shape, device=device) * spread
        if centres:
            noise += middles[torch.randint(centres, (len(part),), device=device)]
        part.copy_(F.normalize(noise))
    near = x[torch.randint(rows, (QUERIES,), device=device)]
    noise = 0.3 * torch.randn(near.shape, device=device) * spread / spread.norm()
    return x, F.normalize(near + noise)


def real(name: str, folder: Path | None, rows: int) -> tuple[Tensor, Tensor]:
    """Rotated unit rows and queries.

    Raises:
        ValueError: There is no folder, or the vectors are not in it, or not what they should be.
    """
    if folder is None:
        raise ValueError("--data: expected a folder of real vectors, got none")
    if name == "fashion_mnist":
        from mrl_fast.experiments.reproduce.images import load_fashion_mnist

        data = load_fashion_mnist(folder)
        x, q = data.train[:rows], data.test[:QUERIES]
    else:
        if not (folder / "vectors.npy").is_file():
            raise ValueError(f"--data: expected vectors.npy in {folder}")
        x = torch.from_numpy(np.load(folder / "vectors.npy")).float()[:rows]
        if (folder / "queries.npy").is_file():
            q = torch.from_numpy(np.load(folder / "queries.npy")).float()[:QUERIES]
        else:
            asked = torch.zeros(len(x), dtype=torch.bool)
            asked[:: max(10, len(x) // QUERIES)] = True
            x, q = x[~asked], x[asked][:QUERIES]
    x, q = F.normalize(x), F.normalize(q)
    rotation = Rotation(x.shape[1]).fit(x)
    return F.normalize(rotation.apply(x)), F.normalize(rotation.apply(q))


def load(name: str, rows: int, width: int = 768, folder: Path | None = None) -> Case:
    """A set by its name.

    Args:
        rows: The most rows of a real set; the number of rows of a generated one.
        width: The width of a generated set.
        folder: Where ``fashion_mnist`` and ``vectors`` lie.

    Raises:
        ValueError, ModuleNotFoundError: A folder or a package that the set needs is not there.
    """
    if name in OF_FOLDER:
        x, q = real(name, folder, rows)
        return case_of(name, x, q, max(16, x.shape[1] // 12 // 16 * 16))
    if name in GENERATED:

        def make() -> Made:
            x, q = standard(rows, width, centres=GENERATED[name])
            return {"rows": x, "asked": q}

        made = cached(f"{name}-{rows}x{width}", make)
        # Without centres 64 columns need shortlists of thousands.
        return case_of(name, made.rows, made.asked, 64 if name == "clustered" else 128)
    made = cached(name, REAL[name])
    # Nested training spreads the energy almost evenly.
    return case_of(name, made.rows[:rows], made.asked, made.rows.shape[1] // 4)


def case_of(name: str, x: Tensor, q: Tensor, prefix: int) -> Case:
    judged = min(256, len(q) // 2)
    return Case(name, x, q, min(prefix, x.shape[1] // 2), prefix_topk(q[: 2 * judged], x, K))


def same_up_to_ties(ids: Tensor, case: Case, queries: Tensor) -> bool:
    """Whether the rows are distinct and, in fp64, as good as the brute-force ones to 1e-6."""

    def scores(rows: Tensor) -> Tensor:
        exact = torch.einsum("bd,bkd->bk", queries.double(), case.x[rows].double())
        return exact.sort(descending=True).values

    best = case.exact.ids[: len(queries)]
    ordered = ids.sort(dim=1).values
    distinct = bool((ordered.diff(dim=1) > 0).all()) and bool((ordered >= 0).all())
    return distinct and bool((scores(ids) - scores(best)).abs().max() <= 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes sets of vectors, where they are not made.")
    parser.add_argument("sets", nargs="+", choices=[*REAL, *GENERATED], metavar="SET")
    parser.add_argument("--rows", type=int, default=500_000, help="of generated sets")
    parser.add_argument("--width", type=int, default=768, help="of generated sets")
    options = parser.parse_args()
    for name in options.sets:
        case = load(name, sys.maxsize if name in REAL else options.rows, options.width)
        print(f"{case}, {len(case.q):,} queries")


if __name__ == "__main__":
    main()
