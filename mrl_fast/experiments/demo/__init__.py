"""The main job, end to end: train nested vectors on real data, evaluate, index and search them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mrl_fast.evaluate import linear_probe_accuracy, nearest_neighbour_accuracy
from mrl_fast.experiments.demo import report
from mrl_fast.experiments.demo.data import Data, load
from mrl_fast.experiments.demo.search import compare
from mrl_fast.experiments.demo.train import encode, principal_components, train_encoder

PROBE_STEPS = 600
# Full width and epochs: digits are few and small, and their training takes seconds either way.
SETTINGS = {"digits": ((2, 4, 8, 16, 32, 64), 30), "Fashion-MNIST": ((8, 16, 32, 64, 128, 256), 6)}


def run_demo(out: Path, data_folder: Path | None, *, seed: int = 0, quick: bool = False) -> None:
    """Writes ``accuracy.png``, ``recall.png`` and ``report.md`` to ``out`` once all is done.

    Args:
        out: A folder, made if missing.
        data_folder: Holds Fashion-MNIST; None is scikit-learn's digits.
        seed: Of everything random.
        quick: A tenth of the training and of the repetitions.

    Raises:
        ValueError: A folder that is none, or data that is not what it should be.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got {out}, which is a file")
    console = Console()
    data = load(data_folder)
    dims, epochs = SETTINGS[data.name]
    epochs = max(2, epochs // 10) if quick else epochs
    probe_steps = PROBE_STEPS // 10 if quick else PROBE_STEPS
    repetitions = 5 if quick else 41

    columns = TextColumn("{task.description:<26}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:

        def task(name: str, total: int):
            task_id = progress.add_task(name, total=total, note="")
            return lambda note="": progress.update(task_id, advance=1, note=note)

        nested = train_vectors(data, dims, epochs, seed, task("train nested (MRL)", epochs))
        plain = train_vectors(data, dims[-1:], epochs, seed, task("train full width", epochs))
        vectors = {"MRL": nested, "truncated": plain, "PCA": principal_components(*plain)}
        on_probe = task("evaluate every prefix", len(vectors) * (probe_steps + len(dims)))
        accuracies: report.Accuracies = {"linear": {}, "1-NN": {}}
        for name, (train, test) in vectors.items():
            sets = (train, data.train_labels, test, data.test_labels)
            accuracies["linear"][name] = linear_probe_accuracy(
                *sets, dims, steps=probe_steps, seed=seed, on_step=on_probe
            )
            accuracies["1-NN"][name] = []
            for dim in dims:
                accuracies["1-NN"][name] += nearest_neighbour_accuracy(*sets, [dim])
                on_probe()
        steps = len(dims) - 2 + 2 * (repetitions + 1)
        rows, points = compare(*nested, dims, repetitions, task("index and search", steps))

    tables = [
        report.accuracy_table(dims, accuracies, data.name),
        report.search_table(rows, data.name, len(nested[0])),
    ]
    for table in tables:
        console.print()
        report.print_table(console, table)

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        folder = Path(partial)
        report.plot_accuracy(folder / "accuracy.png", dims, accuracies, data.name)
        report.plot_recall(folder / "recall.png", rows, points, data.name)
        (folder / "report.md").write_text(report.markdown(tables), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            os.replace(file, out / file.name)
    console.print(f"\nWrote accuracy.png, recall.png and report.md to {out}")


def train_vectors(
    data: Data, dims: tuple[int, ...], epochs: int, seed: int, on_epoch
) -> tuple[torch.Tensor, torch.Tensor]:
    encoder, _ = train_encoder(
        data.train, data.train_labels, dims, epochs=epochs, seed=seed, on_epoch=on_epoch
    )
    return encode(encoder, data.train), encode(encoder, data.test)
