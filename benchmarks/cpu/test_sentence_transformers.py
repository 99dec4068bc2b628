"""A step of MatryoshkaLoss, forward and backward, against sentence-transformers' own: time, extra
peak memory, error against fp64. The model hands out given embeddings: no encoder hides the loss.

    python -m benchmarks.cpu.test_sentence_transformers CASE PROVIDER   # extra peak memory, MiB
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.cpu.test_losses import error_of
from benchmarks.measure import ROOT
from benchmarks.rivals import DEVICE, NOMIC, Fixed, Step, peak_mib, step_of

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mrl_fast.integrations.sentence_transformers import MatryoshkaLoss

PROVIDERS = {"mrl_fast": MatryoshkaLoss, "sentence_transformers": losses.MatryoshkaLoss}


class Case(NamedTuple):
    inner: str
    rows: int
    repetitions: int
    options: dict[str, Any] = {}


CASES = {
    "mnrl": Case("MultipleNegativesRankingLoss", 4096, 5),
    # 512 instead of the default 32, with which the original is slower
    "cached": Case("CachedMultipleNegativesRankingLoss", 4096, 3, dict(mini_batch_size=512)),
    # the original makes [B, B, D] numbers: 192 MiB here, 48 GiB with 4096 rows; at its default
    # temperature of 0.01 most gradients of random vectors are 0 but for rounding
    "gist": Case("GISTEmbedLoss", 256, 3, dict(temperature=0.1)),
}


class Model(Fixed):
    """A model, or a guide, that returns the embeddings stored in its features under a name."""

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({})))
    max_seq_length = 1

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, features):  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"sentence_embedding": features[self.name]}


def steps(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    torch.manual_seed(0)
    q, guide_q = torch.randn(2, case.rows, NOMIC[-1]).to(DEVICE)
    p, guide_p = q + torch.randn_like(q), guide_q + torch.randn_like(q)
    leaves = [t.to(dtype).requires_grad_() for t in (q, p)]

    def step(nested: Any) -> Step:
        model: Any = Model("embedding")
        guides = [Model("guide")] if case.inner == "GISTEmbedLoss" else []
        inner = getattr(losses, case.inner)(model, *guides, **case.options)
        loss_fn = nested(model, inner, [*NOMIC])
        columns = zip(leaves, (guide_q, guide_p), strict=True)
        features = [{"embedding": leaf, "guide": guide} for leaf, guide in columns]
        return step_of(leaves, lambda: loss_fn([dict(f) for f in features], None))

    return {name: step(nested) for name, nested in PROVIDERS.items()}


def peak_of(name: str, provider: str) -> float:
    """A step's extra peak memory, in a process of its own."""
    # Without this, freed memory may stay with the process and hide the next peak.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.cpu.test_sentence_transformers", name, provider]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("name", CASES)
def test_sentence_transformers(compare, name):
    case = CASES[name]
    small = case._replace(rows=case.rows // 4)
    exact = [t.clone() for t in steps(small, torch.float64)["sentence_transformers"]()]
    notes: dict[str, object] = {"rows": case.rows}
    for provider, step in steps(small).items():
        notes[f"{provider}_error"] = f"{error_of(step(), exact):.1e}"
        assert error_of(step(), exact) < 1e-4, provider
        notes[f"{provider}_peak_mib"] = peak_of(name, provider)
    theirs = steps(case)
    ours = theirs.pop("mrl_fast")
    count = 8.0 * case.rows**2 * NOMIC[-1] * (3 if case.inner == "GISTEmbedLoss" else 1)
    compare(ours, theirs, repetitions=case.repetitions, flops=count, notes=notes)


def main() -> None:
    case, provider = CASES[sys.argv[1]], sys.argv[2]
    steps(case._replace(rows=64))[provider]()  # loads libraries
    gc.collect()
    print(round(peak_mib(steps(case)[provider]), 1))


if __name__ == "__main__":
    main()
