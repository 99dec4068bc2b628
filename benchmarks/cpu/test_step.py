"""A whole training step of a small transformer encoder, and the largest batch in fixed memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cpu.test_losses import peak_mib
from benchmarks.rivals import DEVICE, Fixed
from mrl_fast import MatryoshkaInfoNCELoss

ROWS, TOKENS, WIDTH, DIMS = 256, 16, 384, (48, 96, 192, 384)
BUDGET_MIB = 1024


class Encoder(nn.Module):
    """Token ids ``[B, TOKENS]`` → embeddings ``[B, WIDTH]``."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(8192, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.tokens(ids)).mean(1)


def test_step(compare):
    """Forward, nested InfoNCE, backward and optimizer: how much of a step the loss is."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    torch.manual_seed(0)
    encoder = Encoder().to(DEVICE)
    optimizer = torch.optim.AdamW(encoder.parameters())
    q, p = torch.randint(8192, (2, ROWS, TOKENS), device=DEVICE)
    ours = MatryoshkaInfoNCELoss(DIMS)
    model = Fixed()
    inner = losses.MultipleNegativesRankingLoss(model)  # pyright: ignore[reportArgumentType]
    nested = losses.MatryoshkaLoss(model, inner, [*DIMS])  # pyright: ignore[reportArgumentType]

    def step(loss_of) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(encoder(q), encoder(p))
        loss.backward()
        optimizer.step()
        return loss

    rivals = {
        "sentence_transformers": lambda: step(
            lambda a, b: nested([{"embedding": a}, {"embedding": b}], None)
        ),
        "no_loss": lambda: step(lambda a, b: (a * b).sum()),  # the encoder alone: the limit
    }
    compare(lambda: step(ours), rivals, repetitions=5)


@pytest.mark.parametrize("provider", ["mrl_fast", "sentence_transformers", "compiled"])
def test_largest_batch(benchmark, provider):
    """The most rows, by doubling, whose loss and gradients (768 columns, 5 dims) fit the budget."""
    if provider == "sentence_transformers":
        pytest.importorskip("sentence_transformers")
    fitting, peak = 0, 0.0
    rows = 2048
    while rows <= 65536:
        needed = peak_mib("info_nce", provider, str(rows))
        if needed > BUDGET_MIB:
            break
        fitting, peak, rows = rows, needed, 2 * rows
    info = {"budget_mib": BUDGET_MIB, "largest_rows": fitting, "peak_mib": peak}
    benchmark.extra_info.update(info)
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    print(f"\n{provider}: {info}")
