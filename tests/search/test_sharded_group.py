"""ShardedIndex.from_group: four gloo ranks that answer as one index of all their rows."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mrl_fast import MatryoshkaIndex, ShardedIndex

RANKS, ROWS, DIMS = 4, 60, (8, 32)
TIMEOUT_S = 20


def vectors(rows, seed=0):
    """Half of them small integers, many of them in several ranks."""
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
    x[::2] = x[::2].round()
    x[rows // 2 : rows // 2 + rows // 6] = x[: rows // 6]
    return x


def ids_of(rank):
    return torch.arange(ROWS) * RANKS + rank


def of_rank(rank, rows=ROWS):
    index = MatryoshkaIndex(DIMS)
    mine = slice(rank * ROWS, rank * ROWS + rows)
    index.add(vectors(RANKS * ROWS)[mine], ids_of(rank)[:rows])
    return index


def answers(index):
    """What an index answers, as lists."""
    q, n = vectors(5, seed=1), len(index)
    mask = torch.arange(n) % 3 == 0
    results = [
        index.search(q, 10),
        index.search(q, n + 3, exact=True),
        index.search(q, 4, allowed=mask),
        index.search(q, 4, allowed=[3, 4, 5, 100]),
        index.search(q[:, :8], 4),
        index.search(q, 4, stages=[(8, n), (32, 4)]),
        index.range_search(q, 0.3),
    ]
    known = [0, 7, 100]
    listed = [x.tolist() for result in results for x in result]
    return [*listed, index.ids.tolist(), index.reconstruct(known).tolist(), n]


def raised(call):
    try:
        return f"returned {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    own = of_rank(rank, 0 if rank == 1 else ROWS)  # one of them is empty
    many, q = ShardedIndex.from_group(own), vectors(300, seed=2)
    said = {"answers": answers(many)}
    said["other k"] = raised(lambda: many.search(q, 3 + (rank == 2)))
    said["bad k"] = raised(lambda: many.search(q, 0 if rank == 3 else 4))
    said["other queries"] = raised(lambda: many.search(q[rank:][:5], 4))
    said["other call"] = raised(
        lambda: many.range_search(q, 0.5) if rank == 0 else many.search(q, 4)
    )
    said["change"] = raised(lambda: many.add(q))
    own.remove(own.ids[:5])
    said["removed"] = many.search(q, 4).ids.tolist(), len(many)
    report = many.tune(q, 3, 0.9, seconds=0.3, progress=False)
    said["tuned"] = [str(report.stages), str(many.tuned)]
    said["bad tune"] = raised(lambda: many.tune(q[: 200 if rank == 1 else 300], 3))
    said["options"] = raised(lambda: ShardedIndex.from_group(MatryoshkaIndex((8, 32 + rank // 3))))
    other = of_rank(rank)
    other.update([int(ids_of(rank)[0])], q[:1])
    if rank == 3:
        other.add(q[:1], [4])  # which rank 0 has
    said["ids"] = raised(lambda: ShardedIndex.from_group(other))
    said["after"] = many.search(q[:3], 2).ids.tolist()
    Path(f"{folder}/{rank}.part").write_text(json.dumps(said))
    dist.barrier()
    if rank == 2:
        os._exit(0)  # without a word
    said["dead"] = raised(lambda: many.search(q, 4))
    Path(f"{folder}/{rank}").write_text(json.dumps(said))
    os._exit(0)  # threads of gloo that are still there abort an ordinary exit at times


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each rank saw; of the one that dies, until then."""
    folder = tmp_path_factory.mktemp("group")
    code = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('group', {__file__!r})\n"
        "group = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(group)\n"
        f"group.run_rank(int(sys.argv[1]), {str(folder)!r})\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(RANKS)]
    assert [child.wait(300) for child in children] == [0] * RANKS
    names = [f"{rank}.part" if rank == 2 else str(rank) for rank in range(RANKS)]
    return [json.loads((folder / name).read_text()) for name in names]


def test_ranks_answer_as_one_index(said):
    one = MatryoshkaIndex(DIMS)
    for rank in (0, 2, 3):
        one.add(vectors(RANKS * ROWS)[rank * ROWS : (rank + 1) * ROWS], ids_of(rank))
    expected = json.loads(json.dumps(answers(one)))
    for mine in said:
        assert mine["answers"] == expected
    for rank in (0, 2, 3):
        one.remove(ids_of(rank)[:5])
    found = one.search(vectors(300, seed=2), 4).ids.tolist()
    assert all(mine["removed"] == [found, len(one)] for mine in said)


def test_what_one_rank_asks_otherwise_is_an_error_in_all(said):
    same = "ValueError: group: expected the same call with the same arguments in every rank"
    for mine in said:
        assert mine["other k"].startswith(same) and mine["other k"].endswith("in 2 than in 0")
        assert mine["other queries"].startswith(same)
        assert mine["other call"].startswith(same)
        assert mine["change"].startswith("ValueError: add: expected each rank to change its own")
        assert "k: expected an integer >= 1, got 0" in mine["bad k"]
        assert mine["bad tune"].startswith(same)
        assert "expected dims=[8, 32] as in rank 0, got [8, 33] in rank 3" in mine["options"]
        assert "ids: expected none in two ranks, got 4 again" in mine["ids"]


def test_tuning_is_one_ranks_and_every_ranks(said):
    assert len({tuple(mine["tuned"]) for mine in said}) == 1
    assert all(mine["after"] == said[0]["after"] for mine in said)


def test_a_dead_rank_is_an_error_in_all(said):
    for rank, mine in enumerate(said):
        if rank != 2:
            assert mine["dead"].startswith("RuntimeError: group: expected an answer of each of 4")
