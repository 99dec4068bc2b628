"""A model, texts and a scorer of pairs to mine with, and what makes two mined data sets equal."""

import random
from zlib import crc32

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{i}" for i in range(120)]
WIDTH = 24


def tiny_model(similarity="cosine"):
    """Averages random vectors of words, made without a download."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = torch.randn(len(vocabulary), WIDTH, generator=torch.Generator().manual_seed(3))
    return SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=weights.numpy())],
        similarity_fn_name=similarity, prompts={"asked": "w1 w2 w3"}, device="cpu",
    )  # fmt: skip


def bags(count, seed):
    """Texts of 3 to 9 words, no two of the same words: no two have one vector."""
    choose, found = random.Random(seed), {}
    while len(found) < count:
        words = choose.sample(WORDS, choose.randint(3, 9))
        found[frozenset(words)] = " ".join(words)
    return [*found.values()]


class PairScorer:
    """Scores a pair by a hash of its texts, where a CrossEncoder would read them."""

    def __init__(self):
        self.pools, self.pairs = [], 0

    def predict(self, pairs, batch_size=32, convert_to_tensor=False, pool=None):
        assert convert_to_tensor
        self.pairs += len(pairs)
        self.pools.append(pool)
        codes = [crc32(f"{a}|{b}".encode()) >> 8 for a, b in pairs]
        return torch.tensor(codes, dtype=torch.float32) / 2**24

    def start_multi_process_pool(self, target_devices=None):
        return ("pool", target_devices)

    def stop_multi_process_pool(self, pool):
        self.pools.append(("stopped", pool))


def assert_same(ours, theirs):
    """Equal columns, texts and labels; scores to fp32's rounding of a dot product."""
    assert ours.column_names == theirs.column_names
    assert len(ours) == len(theirs)
    for name in theirs.column_names:
        found, expected = ours[name][:], theirs[name][:]
        if name in ("score", "scores"):
            assert [np.shape(x) for x in found] == [np.shape(x) for x in expected]
            flat = [
                np.concatenate([np.ravel(x) for x in [*given, []]]) for given in (found, expected)
            ]
            np.testing.assert_allclose(*flat, rtol=0, atol=2e-6)
        else:
            assert found == expected
