"""The Matryoshka losses for sentence-transformers in training: the original's run, its trainer's
log, ranks."""

# ruff: noqa: F401, F811
# fixtures are imported

import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses as originals

from mrl_fast.integrations.sentence_transformers import Matryoshka2dLoss, MatryoshkaLoss
from tests.helpers.tiny_encoder import (
    ALL,
    CACHED,
    DIMS,
    MNRL,
    ROWS,
    assert_same_step,
    encoder,
    encoder_in,
    guide,
    one_thread,
    texts,
)


@pytest.mark.parametrize("kind", ["MNRL", "cached", "GIST", "drawn"])
def test_the_same_training_run(kind, encoder, guide):
    """50 steps of AdamW with dropout; every tenth evaluates too, which draws dims of its own."""
    inner_of = {
        "MNRL": MNRL,
        "cached": lambda m: CACHED(m, mini_batch_size=10),
        "GIST": lambda m: originals.GISTEmbedLoss(m, guide, temperature=0.05),
        "drawn": MNRL,
    }[kind]
    runs = []
    for nested in (MatryoshkaLoss, originals.MatryoshkaLoss):
        model = copy.deepcopy(encoder).train()
        options = dict(n_dims_per_step=2) if kind == "drawn" else {}
        loss_fn = nested(model, inner_of(model), DIMS, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(0)
        random.seed(0)
        curve = []
        for i in range(50):
            features = [model.preprocess(column) for column in texts(16, 2, seed=i)]
            loss = loss_fn(features, None)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
            if i % 10 == 0:
                with torch.no_grad():
                    value = loss_fn([dict(f) for f in features], None)
                assert not value.requires_grad
                curve.append(value)
        runs.append(torch.stack(curve))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)
    assert runs[0][-5:].mean() < runs[0][:5].mean()  # it learns


def trained(encoder, folder, nested, inner_of=MNRL, **options):
    """The log of a trainer's run."""
    pytest.importorskip("accelerate")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    model = copy.deepcopy(encoder)
    anchors, positives = texts(64, 2)
    data = datasets.Dataset.from_dict({"anchor": anchors, "positive": positives})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=8, logging_steps=2,
        per_device_eval_batch_size=8, eval_strategy="steps", eval_steps=6, save_strategy="no",
        use_cpu=True, report_to="none", disable_tqdm=True, seed=3,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data.select(range(16)),
        loss=nested(model, inner_of(model), DIMS, **options),
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    (evaluated,) = (log for log in history if "eval_loss" in log)
    return [log for log in history if "loss" in log], evaluated


@pytest.mark.parametrize("kind", [MNRL, CACHED])
def test_a_trainer_logs_every_dim(kind, encoder, tmp_path):
    ours, evaluated = trained(encoder, tmp_path, MatryoshkaLoss, kind)
    theirs, expected = trained(encoder, tmp_path, originals.MatryoshkaLoss, kind)
    assert len(ours) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-4)
        assert sum(mine[f"loss_{d}"] for d in DIMS) == pytest.approx(mine["loss"], abs=5e-4)
    assert evaluated["eval_loss"] == pytest.approx(expected["eval_loss"], abs=2e-4)


def test_a_trainer_logs_dims_that_are_drawn_and_layers(encoder, tmp_path):
    (*_, log), _ = trained(encoder, tmp_path, MatryoshkaLoss, n_dims_per_step=2)
    assert all(1 < log[f"loss_{d}"] < 5 for d in DIMS)  # near ln 8, though not drawn in every step
    options = dict(n_dims_per_step=-1, kl_temperature=0)
    (log, *_), _ = trained(encoder, tmp_path, Matryoshka2dLoss, **options)
    assert (
        sum(log[f"loss_{d}"] for d in DIMS) < log["loss"]
    )  # the last layer of two that are summed


def losses_of_a_rank(rank, folder):
    """Every loss beside the original on both ranks; then which dims are drawn."""
    torch.set_num_threads(1)
    encoder, guide = (encoder_in(f"{folder}/{rank}-{i}", seed=i).eval() for i in range(2))
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    options = dict(gather_across_devices=True)
    for inner_of in (
        lambda m: MNRL(
            m, directions=ALL, hardness_mode="all_negatives", hardness_strength=3.0, **options
        ),
        lambda m: CACHED(m, mini_batch_size=5, **options),
        lambda m: originals.GISTEmbedLoss(m, guide, temperature=0.1, **options),
        lambda m: originals.CachedGISTEmbedLoss(m, guide, temperature=0.1, **options),
    ):
        assert_same_step(inner_of, encoder, seed=rank)
    random.seed(rank)  # each would draw others
    drawn = []
    for kind in (MNRL, CACHED):
        loss_fn = MatryoshkaLoss(encoder, kind(encoder, **options), DIMS, n_dims_per_step=1)
        for _ in range(6):
            features = [encoder.preprocess(column) for column in texts(ROWS, 2)]
            loss_fn(features, None).backward()
            drawn += loss_fn.per_dim
    gathered = [None, None]
    dist.all_gather_object(gathered, drawn)
    assert gathered[0] == gathered[1] and len(set(drawn)) > 1
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that are still there abort an ordinary exit at times


def test_ranks(tmp_path):
    code = (
        "import sys\n"
        f"sys.path.append({str(Path(__file__).parents[2])!r})\n"
        "from tests.integrations.test_sentence_transformers_training import losses_of_a_rank\n"
        f"losses_of_a_rank(int(sys.argv[1]), {str(tmp_path)!r})\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], cwd=tmp_path) for rank in range(2)
    ]
    assert [child.wait(300) for child in children] == [0, 0]
