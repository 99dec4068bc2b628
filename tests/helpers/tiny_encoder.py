"""A random encoder of sentence-transformers, made without a download, and a step of its losses."""

import copy
import random

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as originals
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mrl_fast.integrations.sentence_transformers import MatryoshkaLoss

DIMS, ROWS = (8, 24, 48), 12
WORDS = [f"w{i}" for i in range(60)]
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def encoder_in(folder, width=48, seed=0):
    """A random two-layer BERT with dropout over words and a mean, made without a download."""
    torch.manual_seed(seed)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, hidden_dropout_prob=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(width)], device="cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For work this small, waiting for a second thread costs more time than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_in(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    return encoder_in(tmp_path_factory.mktemp("guide"), width=32, seed=1).eval()


def texts(rows, columns, seed=0):
    """Columns of texts of 1 to 9 words; those of a row share some."""
    choose = random.Random(seed)
    rows = [[choose.choice(WORDS) for _ in range(4)] for _ in range(rows)]
    return [
        [
            " ".join(choose.sample(row, 2) + choose.choices(WORDS, k=choose.randint(0, 6)))
            for row in rows
        ]
        for _ in range(columns)
    ]


def step(nested, inner_of, encoder, *, columns=3, labels=None, seed=0, **options):
    """Loss and every parameter's gradient of one step, dropout included."""
    model = copy.deepcopy(encoder).train()
    loss_fn = nested(model, inner_of(model), DIMS, **options)
    features = [model.preprocess(column) for column in texts(ROWS, columns, seed)]
    torch.manual_seed(7)
    random.seed(7)
    loss = loss_fn(features, labels)
    loss.backward()
    return loss_fn, loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_same_step(inner_of, encoder, *, nested=MatryoshkaLoss, **options):
    original = getattr(originals, nested.__name__)
    ours, loss, grads = step(nested, inner_of, encoder, **options)
    _, expected, expected_grads = step(original, inner_of, encoder, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    largest = max(g.abs().max() for g in expected_grads.values() if g is not None)
    for name, grad in expected_grads.items():
        if grad is None:
            assert grads[name] is None
        else:
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * float(largest))
    return ours


MNRL, CACHED = (
    originals.MultipleNegativesRankingLoss,
    originals.CachedMultipleNegativesRankingLoss,
)
