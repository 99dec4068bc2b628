"""``mrl-fast index`` under other global states of torch: the same files and the same output."""

import numpy as np
import pytest

from tests.helpers.cli_index import BASE, DIMS, QUERIES, in_memory, run, run_json, same_as, saved
from tests.helpers.torch_states import STATES


@pytest.mark.parametrize("state", STATES)
def test_commands(tmp_path, state):
    base, queries = (saved(tmp_path / f"{len(x)}.npy", x) for x in (BASE, QUERIES))
    truth = saved(tmp_path / "truth.npy", in_memory(rotation="pca").search(QUERIES, 5).ids)
    np.save(tmp_path / "allowed.npy", np.arange(0, 3000, 2))
    out = tmp_path / "index"
    options = ["--out", out, "--dims", DIMS, "--rotation", "pca"]
    with STATES[state]():
        run("build", base, *options, "--checkpoint", 700)
        assert "nothing to do" in run("build", base, *options)  # compares rows
        run("add", out, queries)
        found = [
            run_json("search", out, queries, "-k", 5, "--truth", truth, *way)
            for way in (
                ["--exact"], ["--stages", "8:40,32:5"], ["--allowed", tmp_path / "allowed.npy"]
            )
        ]  # fmt: skip
    index = in_memory(rotation="pca")
    index.add(QUERIES)
    same_as(out, index)
    expected = [
        index.search(QUERIES, 5, exact=True),
        index.search(QUERIES, 5, stages=[(8, 40), (32, 5)]),
        index.search(QUERIES, 5, allowed=np.arange(0, 3000, 2)),
    ]
    for document, result in zip(found, expected, strict=True):
        assert [each["ids"] for each in document["results"]] == result.ids.tolist()
        assert [each["scores"] for each in document["results"]] == result.scores.tolist()
    common = sum(
        len({*a, *b})
        for a, b in zip(expected[0].ids.tolist(), np.load(truth).tolist(), strict=True)
    )
    assert found[0]["recall"] == pytest.approx((2 * 5 * 300 - common) / (5 * 300))
    with STATES[state]():
        report = run_json("tune", out, queries, "-k", 5, "--recall", 0.5)
    assert run_json("info", out)["tuned"]["stages"] == report["stages"]
