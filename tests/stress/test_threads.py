"""Searches while others add, remove, update, compact and save: each answers for one state that the
index had during the call."""

import os
import threading
import time

import pytest
import torch

from mrl_fast import MatryoshkaIndex
from mrl_fast.search.disk import folder
from mrl_fast.search.index import store
from tests.helpers.index_model import DIMS, TIMES, Answers, Model, assert_same, vectors

READERS = 16
STEPS = 15 if TIMES == 1 else 6 * TIMES  # of the one who writes
QUERIES, K, LEAST = vectors(4, DIMS[-1], 99), 6, 0.2  # the least score of a range
STABLE = torch.arange(0, 30, 3)  # never removed, often replaced
SOME = torch.cat([torch.arange(10, 400, 7), torch.tensor([-1, 1 << 62])])  # some there, some not
CALLS = ("exact", "staged", "allowed", "range", "reconstruct", "ids")


class History:
    """The states of an index: those before a step and after it may be seen while it is done."""

    def __init__(self, index):
        self.index, self.states, self.done = index, [Model(DIMS[-1])], 0
        self.answers = {}

    def step(self, change):
        new = self.states[-1].copy()
        change(new)
        self.states.append(new)
        change(self.index)
        self.done = len(self.states) - 1

    def write(self, steps, folder, wait):
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            ids = self.states[-1].ids
            chosen = [ids[i] for i in torch.randperm(len(ids), generator=generator).tolist()]
            rows = int(torch.randint(1, 90, (1,), generator=generator))
            x = vectors(rows, DIMS[-1], step)
            self.step(lambda target, x=x: target.add(x))
            gone = [i for i in chosen if i not in STABLE.tolist()][: max(len(ids) - 150, 0)]
            self.step(lambda target, gone=gone: target.remove(as_ids(target, gone)))
            stable = STABLE[torch.randperm(len(STABLE), generator=generator)[:7]].tolist()
            y = vectors(7, DIMS[-1], 1000 + step)
            self.step(lambda target, ids=stable, y=y: target.update(as_ids(target, ids), y))
            if step % 4 == 0:
                self.index.compact()
            if step % 3 == 0:
                self.index.save(folder)
            wait()

    def read(self, name):
        """What a call says, and the first and the last state that it may be about."""
        first = self.done
        found = called(name, self.index)
        return found, first, len(self.states) - 1

    def expected(self, name, state):
        """Scores, or None, and ids or vectors."""
        if (name, state) in self.answers:
            return self.answers[name, state]
        model = self.states[state]
        if name == "reconstruct":
            answer = None, torch.stack([model.vectors[i] for i in STABLE.tolist()])
        elif name == "ids":
            answer = None, torch.tensor(model.ids)
        else:
            among = set(SOME.tolist()) if name == "allowed" else None
            top = Answers(self.index, model, QUERIES, among).top(len(model.vectors))
            scores, ids = (x if name == "range" else x[:, :K] for x in top)
            reach = scores >= (LEAST if name == "range" else -torch.inf)
            answer = (scores[reach], ids[reach])
        self.answers[name, state] = answer
        return answer

    def agrees(self, name, found, state):
        scores, values = self.expected(name, state)
        if scores is None:
            return torch.equal(found, values)
        rtol = 1e-5 if name == "staged" else 2e-7  # stages' scores are sums in fp32
        same = found.ids.numel() == len(values) and torch.equal(found.ids.ravel(), values)
        return same and torch.allclose(found.scores.ravel().double(), scores, rtol=rtol, atol=1e-6)


def as_ids(target, ids):
    return ids if isinstance(target, Model) else torch.tensor(ids, dtype=torch.int64)


def called(name, index):
    if name == "exact":
        return index.search(QUERIES, K, exact=True)
    if name == "staged":
        return index.search(QUERIES, K, stages=[(DIMS[0], 10_000), (DIMS[1], K)])
    if name == "allowed":
        return index.search(QUERIES, K, exact=True, allowed=SOME)
    if name == "range":
        return index.range_search(QUERIES, LEAST)
    return index.reconstruct(STABLE) if name == "reconstruct" else index.ids


@pytest.mark.parametrize("prefix_dtype", ["float32", "int8"])
def test_searches_while_it_changes(prefix_dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(store, "BLOCK_ROWS", (192, 64))
    monkeypatch.setattr(folder, "TIER", 2)
    history = History(MatryoshkaIndex(DIMS, prefix_dtype=prefix_dtype))
    history.step(lambda target: target.add(vectors(100, DIMS[-1], 5)))
    ended, read, raised = threading.Event(), [], []

    def reader(number):
        try:
            torch.set_num_threads(1)
            while not ended.is_set():
                name = CALLS[(number + len(read)) % len(CALLS)]
                read.append((name, *history.read(name)))
        except BaseException as error:
            raised.append(error)

    def wait():
        """Until some read was begun and done."""
        enough = len(read) + READERS + 1
        while len(read) < enough and not raised:
            time.sleep(1e-4)

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(READERS)]
    for thread in threads:
        thread.start()
    try:
        history.write(STEPS, tmp_path, wait)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not raised, raised[0]
    assert {name for name, *_ in read} == set(CALLS)
    for name, found, first, last in read:
        assert any(history.agrees(name, found, state) for state in range(first, last + 1)), (
            f"{name}: of none of the states {first} to {last}"
        )
    assert len({first for _, _, first, _ in read}) >= STEPS
    assert any(first < last for *_, first, last in read)
    assert_same(history.index, history.states[-1])
    assert_same(MatryoshkaIndex.load(tmp_path, verify=True), saved_state(history, tmp_path))


def saved_state(history, folder):
    ids = MatryoshkaIndex.load(folder).ids.tolist()
    return next(model for model in reversed(history.states) if model.ids == ids)


@pytest.mark.parametrize("name", CALLS)
def test_each_call_sees_one_state(name, monkeypatch):
    index, model = MatryoshkaIndex(DIMS), Model(DIMS[-1])
    for target in (index, model):
        target.add(vectors(100, DIMS[-1], 5))
    history = History(index)
    history.states, changes = [model], []

    def overtaken(store):
        """What it is, and then it is changed, rows moved and all."""
        snapshot = store.__dict__["snapshot"]
        if changes:
            changes.pop()(index)
        return snapshot

    def change(index):
        index.remove(torch.tensor([1, 2]))
        index.update(STABLE, vectors(len(STABLE), DIMS[-1], 6))
        index.compact()

    watched = property(overtaken, lambda store, new: store.__dict__.update(snapshot=new))
    monkeypatch.setattr(store.RowStore, "snapshot", watched, raising=False)
    changes.append(change)
    found = called(name, index)
    assert not changes and history.agrees(name, found, 0)


def test_writers_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    index, kept, raised = MatryoshkaIndex(DIMS), {}, []

    def writer(number):
        try:
            torch.set_num_threads(1)
            for step in range(STEPS):
                ids = torch.arange(5) + 5 * step + number * 1_000_000
                x = vectors(7, DIMS[-1], number * 1000 + step)
                index.add(x[:5], ids)
                index.remove(ids[:2])
                index.update(ids[2:4], x[5:])
                kept.update(zip(ids[2:].tolist(), [x[5], x[6], x[4]], strict=True))
                if step % 8 == number:
                    index.compact()
                    index.save(tmp_path)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised, raised[0]
    index.save(tmp_path)
    for one in (index, MatryoshkaIndex.load(tmp_path, verify=True)):
        assert sorted(one.ids.tolist()) == sorted(kept)
        assert torch.equal(
            one.reconstruct(one.ids), torch.stack([kept[i] for i in one.ids.tolist()])
        )
