"""Launches and waits of public calls on a device that benchmarks/gpu/stub.py plays.

A call that a CUDA graph is to hold neither waits for the device nor copies from pageable memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the stub stands in for a GPU that is not there"
)


@pytest.fixture(scope="module")
def seen():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.launches"],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {found.pop("case"): found for found in map(json.loads, done.stdout.splitlines())}


SEARCHES = [
    "topk, one query", "topk, 32 queries", "topk, 1024 queries", "rerank", "funnel",
    "index, stages", "index, codes", "index, exact", "index, exact by codes", "index, many queries",
]  # fmt: skip
TRAINING = ["cross_entropy", "info_nce", "logits", "predict"]


@pytest.mark.parametrize("case", [*SEARCHES, *TRAINING])
def test_a_graph_may_hold_it(seen, case):
    assert not seen[case]["waits"] and not seen[case]["uploads"]
    assert seen[case]["capturable"] and seen[case]["launches"]


@pytest.mark.parametrize(
    "reason", ["item", "bool", "cpu", "mask", "nonzero", "tensor", "to", "copy_", "synchronize"]
)
def test_the_stub_finds_what_a_graph_cannot_hold(seen, reason):
    found = seen[f"does not capture: {reason}"]
    assert not found["capturable"] and len(found["waits"] + found["uploads"]) == 1


def test_launches_of_one_query(seen):
    found = seen["topk, one query"]
    assert len(found["launches"]) <= 6, found["kernels"]
    assert len(found["ops"]) <= 2, found["ops"]


def test_an_index_reads_no_norms_again(seen):
    """It knows those of its rows: the queries' alone are made."""
    assert seen["index, many queries"]["ops"].count("linalg_vector_norm") == 1


def test_launches_of_the_others(seen):
    """Counted by hand from their launchers: the kernels of each, and how often."""
    expected = {
        "rerank": {"_keys_kernel": 1, "_decode_kernel": 1},
        "cross_entropy": {"_statistics_kernel": 1, "_score_gradients_kernel": 1},
        "info_nce": {"_statistics_kernel": 1, "_score_gradients_kernel": 1},
        "logits": {"_nested_logits_kernel": 1},
        "predict": {"_predict_kernel": 1},
    }
    assert {case: seen[case]["kernels"] for case in expected} == expected
    grids = dict(seen["predict"]["launches"])  # 5000 classes, 2048 rows in tiles of 128
    assert grids["_predict_kernel"] == [40, 16, 1]


def test_a_chunk_of_gradients_takes_few_launches(seen):
    """Two products a prefix, each added in one launch; two sums of scales, added; the scores."""
    found = seen["info_nce, chunks"]
    chunks = found["kernels"]["_score_gradients_kernel"]
    assert chunks == 25
    assert found["ops"].count("mm") == 6 * chunks
    assert found["ops"].count("addcmul_") == 8 * chunks
    assert len(found["ops"]) <= 16 * chunks + 256


def test_no_more_launches_than_there_were(seen):
    """Triton's and torch's, as found; fewer is a change to make here as well."""
    most = {
        "topk, 32 queries": (6, 2), "topk, 1024 queries": (9, 7), "funnel": (7, 7),
        "index, stages": (6, 6), "index, codes": (6, 15), "index, exact": (13, 70),
        "index, exact by codes": (13, 70), "index, many queries": (7, 6),
    }  # fmt: skip
    for case, (kernels, ops) in most.items():
        assert len(seen[case]["launches"]) <= kernels, (case, seen[case]["kernels"])
        assert len(seen[case]["ops"]) <= ops, (case, seen[case]["ops"])
