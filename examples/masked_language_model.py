"""BERT's masked language model with a nested hidden state: MRL-E over the vocabulary.

Every prefix of the hidden state predicts the masked words by the same columns of the tied word
embeddings, and no prefix's logits [tokens, words] are held in memory. The text is that of
DIR/banking77/train.csv, or without ``--data DIR`` Python's own language reference.
"""

import argparse
import csv
import os
import time
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM

from mrl_fast import matryoshka_cross_entropy, matryoshka_predict

DIMS = (16, 32, 64, 128)
LENGTH = 32  # tokens a text
SPECIAL = ["[PAD]", "[MASK]", "[UNK]"]
PAD, MASK, UNKNOWN = range(3)


def read_texts(folder: Path | None) -> list[str]:
    if folder is None:
        return [text for topic in topics.values() for text in topic.split("\n\n") if len(text) > 40]
    path = folder / "banking77" / "train.csv"
    if not path.is_file():
        raise SystemExit(f"--data: expected a folder with banking77/train.csv, got {folder}")
    with open(path, newline="", encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file)]


def tokenize(texts: list[str], vocabulary: int) -> tuple[torch.Tensor, int]:
    """Token ids ``[N, LENGTH]`` int64, by a WordPiece vocabulary made of these texts; its size."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=PAD)
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor([text.ids for text in encoded]), tokenizer.get_vocab_size()


def mask_words(ids: torch.Tensor, share: float = 0.15) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with some words masked, and labels: those words, elsewhere −100, which is ignored."""
    chosen = (torch.rand(ids.shape) < share) & (ids > UNKNOWN)
    return ids.masked_fill(chosen, MASK), ids.masked_fill(~chosen, -100)


def hidden_states(model: BertForMaskedLM, inputs: torch.Tensor) -> torch.Tensor:
    """``[B * LENGTH, D]``, what the vocabulary's embeddings are compared with."""
    states = model.bert(inputs, attention_mask=(inputs != PAD).long()).last_hidden_state
    return model.cls.predictions.transform(states).flatten(0, 1)


def head(model: BertForMaskedLM) -> dict[str, Any]:
    predictions = model.cls.predictions  # the decoder's weight is the word embeddings'
    return dict(weight=predictions.decoder.weight, bias=predictions.decoder.bias)


def compare_with_loop(model: BertForMaskedLM, ids: torch.Tensor, repetitions: int = 5) -> None:
    """Times the head's step alone, forward and backward, both ways on the same hidden states."""
    inputs, labels = mask_words(ids)
    x, target = hidden_states(model, inputs).detach().requires_grad_(), labels.flatten()
    weight, bias = (value.detach().requires_grad_() for value in head(model).values())

    def loop() -> torch.Tensor:
        logits = [F.linear(x[:, :d], weight[:, :d], bias) for d in DIMS]
        return torch.stack([F.cross_entropy(each, target) for each in logits]).sum()

    def fused() -> torch.Tensor:
        return matryoshka_cross_entropy(x, weight, target, DIMS, bias=bias).loss

    times_ms: dict[str, list[float]] = {"loop": [], "fused": []}
    for _ in range(repetitions):
        results = []
        for way in (loop, fused):
            begin = time.perf_counter()
            loss = way()
            results.append([loss, *torch.autograd.grad(loss, (x, weight, bias))])
            times_ms[way.__name__].append(1e3 * (time.perf_counter() - begin))
        torch.testing.assert_close(*results)
    mib = len(DIMS) * len(x) * len(weight) * 4 / 2**20
    loop_ms, fused_ms = map(median, times_ms.values())
    print(f"\nThe head's step, {len(x)} tokens, {len(weight)} words, equal losses and gradients:")
    print(f"loop {loop_ms:.1f} ms, {mib:.0f} MiB of logits; fused {fused_ms:.1f} ms, none")


@torch.no_grad()
def evaluate(model: BertForMaskedLM, ids: torch.Tensor) -> tuple[list[float], list[float]]:
    """Loss and accuracy of masked words by prefix."""
    model.eval()
    inputs, labels = mask_words(ids)
    masked = labels.flatten() != -100
    x = torch.cat([hidden_states(model, part) for part in inputs.split(256)])[masked]
    target = labels.flatten()[masked]
    loss = matryoshka_cross_entropy(x, target=target, dims=DIMS, **head(model)).per_dim
    found = matryoshka_predict(x, dims=DIMS, **head(model)).labels
    return loss.tolist(), (found == target).float().mean(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    data = os.environ.get("MRL_FAST_DATA")
    parser.add_argument("--data", type=Path, default=data, help="holds banking77/train.csv")
    parser.add_argument("--quick", action="store_true", help="few steps, few words")
    options = parser.parse_args()
    steps, batch, words, held = (60, 16, 500, 200) if options.quick else (1500, 64, 4000, 1000)

    torch.manual_seed(0)
    ids, vocabulary = tokenize(read_texts(options.data), words)
    held_out, ids = ids[torch.randperm(len(ids))].split([held, len(ids) - held])
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=DIMS[-1], num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=LENGTH, pad_token_id=PAD,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    before, _ = evaluate(model, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in (bar := tqdm(range(steps), disable=None)):
        inputs, labels = mask_words(ids[torch.randint(len(ids), (batch,))])
        x, target = hidden_states(model, inputs), labels.flatten()
        loss, per_dim = matryoshka_cross_entropy(x, target=target, dims=DIMS, **head(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str("loss " + ", ".join(f"{loss:.2f}" for loss in per_dim.tolist()))

    print(f"{'dims':>6} {'first loss':>11} {'last':>8} {'accuracy, %':>12}")
    for d, first, last, accuracy in zip(DIMS, before, *evaluate(model, held_out), strict=True):
        print(f"{d:>6} {first:>11.3f} {last:>8.3f} {100 * accuracy:>12.1f}")
    compare_with_loop(model, ids[:batch])


if __name__ == "__main__":
    main()
