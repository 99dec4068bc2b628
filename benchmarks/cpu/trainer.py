"""The whole training of a static encoder of documentation, beside sentence-transformers' trainer.

    python -m benchmarks.cpu.trainer --out FILE.md [--width 512] [--rows 4096]

Names of documented functions are trained to find their sentences (mrl_fast.experiments), by three
trainers, on the same pairs in batches of the same size, with the same loss at 5 dims:

    theirs       StaticEmbedding, MatryoshkaLoss(MultipleNegativesRankingLoss), its trainer, AdamW
    theirs, our loss   the same with mrl_fast's MatryoshkaLoss
    ours         the demo's encoder, matryoshka_info_nce, SparseAdam

A step is everything: texts (theirs tokenises every batch again, ours once), encoder, loss,
optimiser. Quality is the MRR@10 of 2,048 held-out names over all sentences at full width; time to
it does not count the evaluations. The largest batch is that whose step takes at most 2 GiB more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import TrainerCallback

from benchmarks.measure import ROOT, machine
from benchmarks.rivals import peak_mib
from benchmarks.vector_sets import corpus
from mrl_fast import matryoshka_info_nce
from mrl_fast.experiments.demo import encoder
from mrl_fast.experiments.demo.data import Pairs, split
from mrl_fast.experiments.demo.evaluate import quality
from mrl_fast.integrations.sentence_transformers import MatryoshkaLoss

TARGET = 0.35  # MRR@10
EVERY = 10  # steps between evaluations
LIMIT_MIB = 2048
PROVIDERS = ("theirs", "theirs, our loss", "ours")


class Run(NamedTuple):
    """Seconds at each evaluated step, evaluations left out, and the MRR@10 there."""

    steps: list[int]
    seconds: list[float]
    mrr: list[float]

    def step_ms(self) -> float:
        """The mean of the steps between the first and the last evaluation; those before warm up."""
        return 1e3 * (self.seconds[-1] - self.seconds[0]) / (self.steps[-1] - self.steps[0])

    def seconds_to(self, target: float) -> float | None:
        reached = zip(self.seconds, self.mrr, strict=True)
        return next((seconds for seconds, mrr in reached if mrr >= target), None)


class Clock:
    """Called after every step; evaluates after some, without counting that time."""

    def __init__(self, pairs: Pairs, encode: Callable[[list[str]], torch.Tensor], width: int):
        self.pairs, self.encode, self.width = pairs, encode, width
        self.run, self.step, self.evaluating = Run([], [], []), 0, 0.0
        self.begin = time.perf_counter()

    def tick(self) -> None:
        self.step += 1
        if self.step % EVERY:
            return
        now = time.perf_counter()
        asked = self.pairs.asked[: self.pairs.reported]
        vectors = self.encode(asked), self.encode(self.pairs.sentences)
        relevant = self.pairs.held_out[: self.pairs.reported]
        self.run.steps.append(self.step)
        self.run.seconds.append(now - self.begin - self.evaluating)
        self.run.mrr.extend(quality(*vectors, relevant, (self.width,))["MRR@10"])
        self.evaluating += time.perf_counter() - now


def dims_of(width: int) -> tuple[int, ...]:
    return tuple(width // 2**i for i in (4, 3, 2, 1, 0))


def spaced(texts: list[str]) -> list[str]:
    """The texts with their words split as the demo's encoder splits them."""
    return [" ".join(encoder.split_words(text)) for text in texts]


def their_model(pairs: Pairs, width: int) -> SentenceTransformer:
    names, sentences = pairs.trained()
    words = ["[UNK]", *encoder.vocabulary([*names, *sentences])]
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    torch.manual_seed(0)
    module = StaticEmbedding(tokenizer, embedding_dim=width)
    return SentenceTransformer(modules=[module], device="cpu")


def their_loss(model: SentenceTransformer, width: int, provider: str) -> Any:
    nested: Any = losses.MatryoshkaLoss if provider == "theirs" else MatryoshkaLoss
    return nested(model, losses.MultipleNegativesRankingLoss(model), [*dims_of(width)])


def by_them(pairs: Pairs, width: int, rows: int, steps: int, provider: str) -> Run:
    model = their_model(pairs, width)
    names, sentences = map(spaced, pairs.trained())

    def encode(texts: list[str]) -> torch.Tensor:
        found = model.encode(spaced(texts), convert_to_tensor=True, show_progress_bar=False)
        return found.float()

    clock = Clock(pairs, encode, width)

    class Ticking(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder, per_device_train_batch_size=rows, max_steps=steps, learning_rate=0.1,
            lr_scheduler_type="linear", report_to="none", save_strategy="no", disable_tqdm=True,
            logging_strategy="no", use_cpu=True, dataloader_drop_last=True,
        )  # fmt: skip
        SentenceTransformerTrainer(
            model, arguments, train_dataset=Dataset.from_dict({"a": names, "b": sentences}),
            loss=their_loss(model, width, provider), callbacks=[Ticking()],
        ).train()  # fmt: skip
    return clock.run


def by_us(pairs: Pairs, width: int, rows: int, steps: int) -> Run:
    now: list[encoder.TextEncoder] = []
    clock = Clock(pairs, lambda texts: now[0].encode(texts), width)

    def on_step(model: encoder.TextEncoder, _: torch.Tensor) -> None:
        now[:] = [model]
        clock.tick()

    encoder.train(*pairs.trained(), dims_of(width), steps=steps, batch=rows, on_step=on_step)
    return clock.run


def step_of(provider: str, pairs: Pairs, width: int, rows: int) -> Callable[[], object]:
    """A step's forward and backward on so many pairs, which repeat where there are fewer."""
    texts = [(part * (rows // len(part) + 1))[:rows] for part in pairs.trained()]
    if provider == "ours":
        ours = encoder.TextEncoder(encoder.vocabulary([t for part in texts for t in part]), width)
        bags = [ours.bags(part) for part in texts]
        dims = dims_of(width)
        return lambda: matryoshka_info_nce(ours(bags[0]), ours(bags[1]), dims).loss.backward()
    model = their_model(pairs, width)
    loss_fn = their_loss(model, width, provider)
    features = [model.preprocess(spaced(part)) for part in texts]
    return lambda: loss_fn([dict(f) for f in features], None).backward()


def largest_batch(provider: str, width: int) -> int:
    """The most pairs, a power of two up to 65,536, whose step fits LIMIT_MIB: each tried in its own
    process."""
    rows = 512
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.cpu.trainer", "--width", f"{width}"]
    while rows < 1 << 16:
        asked = [*command, "--peak", provider, "--rows", f"{2 * rows}"]
        done = subprocess.run(asked, capture_output=True, text=True, env=environment, cwd=ROOT)
        if done.returncode or float(done.stdout.split()[-1]) > LIMIT_MIB:
            break
        rows *= 2
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Training a static encoder, whole.")
    parser.add_argument("--out", type=Path, help="FILE.md")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4096, help="pairs a batch")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--peak", choices=PROVIDERS, help="print the MiB of one step only")
    options = parser.parse_args()
    pairs, width, rows = split(corpus().names), options.width, options.rows
    if options.peak:
        step_of(options.peak, pairs, width, 64)()  # loads libraries
        print(peak_mib(step_of(options.peak, pairs, width, rows)))  # pyright: ignore
        return
    lines = [
        f"# {rows:,} pairs × {width}, dims {', '.join(map(str, dims_of(width)))}",
        "",
        f"{machine()}",
        "",
        f"| trainer | ms a step | s to MRR@10 {TARGET} | MRR@10 at the end | pairs in 2 GiB |",
        "|---|---|---|---|---|",
    ]
    for provider in PROVIDERS:
        if provider == "ours":
            run = by_us(pairs, width, rows, options.steps)
        else:
            run = by_them(pairs, width, rows, options.steps, provider)
        seconds = run.seconds_to(TARGET)
        reached = "never" if seconds is None else f"{seconds:.1f}"
        batch = largest_batch(provider, width)
        row = provider, f"{run.step_ms():.0f}", reached, f"{run.mrr[-1]:.3f}", f"{batch:,}"
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
