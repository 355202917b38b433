"""Sentence embeddings: masked mean, unit rows, batches that change nothing, each text once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from autointerp.embedder import BATCH_TOKENS, MAX_TOKENS, Embedder, _batches
from sae.errors import ArtefactError

WORDS = "the cat sat on a mat while rain fell over old town roofs".split()
TEXTS = ["the cat", "rain fell over old town roofs while a cat sat on the mat", "", "unknown words", "cat", "the cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT of width 16 with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("bert")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(path)
    return path


def test_rows_are_unit_in_order_and_equal_texts_equal_rows(folder: Path) -> None:
    vectors = Embedder(folder).embed(TEXTS)
    assert vectors.shape == (6, 16) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert np.array_equal(vectors[0], vectors[5]) and not np.allclose(vectors[0], vectors[4])
    assert Embedder(folder).embed([]).shape == (0, 16)


def test_it_is_the_mean_over_the_mask(folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embedder = Embedder(folder)
    together = embedder.embed(TEXTS)  # padded batches
    for text, row in zip(TEXTS, together, strict=True):
        with torch.no_grad():  # alone, hence without padding
            mean = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        assert row == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5), text


def test_no_bit_hangs_on_the_batch(folder: Path) -> None:
    """A resumed run embeds in other batches than an undisturbed one and must reach the same scores."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=n)) for n in rng.integers(1, 40, size=200)]
    together, alone = Embedder(folder).embed(texts), Embedder(folder)
    assert all(np.array_equal(alone.embed([text])[0], row) for text, row in zip(texts, together, strict=True))


def test_a_text_is_embedded_once_and_remembered_vectors_are_used(folder: Path) -> None:
    embedder = Embedder(folder)
    first = embedder.embed(TEXTS)
    embedder._forward = None  # type: ignore[method-assign, assignment]  # any further forward would fail
    assert np.array_equal(embedder.embed(TEXTS[::-1]), first[::-1])
    embedder.remember(["new"], np.ones((1, 16)))
    assert np.array_equal(embedder.embed(["new"])[0], np.ones(16, dtype=np.float32))


def test_batches_hold_every_text_once_within_the_bound() -> None:
    ids = [[0] * n for n in sorted([1, 3, 3, 90, 200, MAX_TOKENS, *[17] * 300])]
    batches = _batches(range(len(ids)), ids)
    assert [i for b in batches for i in b] == list(range(len(ids)))
    assert all(len(b) * len(ids[b[-1]]) <= BATCH_TOKENS for b in batches)
    assert _batches([], []) == []


def test_long_texts_are_cut(folder: Path) -> None:
    long = " ".join(["cat"] * 2 * MAX_TOKENS)
    assert np.isfinite(Embedder(folder).embed([long])).all()


def test_the_hash_tells_models_apart_and_a_wrong_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    assert len(Embedder(folder).model_hash) == 64
    with pytest.raises(ArtefactError, match="no config.json"):
        Embedder(tmp_path)


@pytest.mark.assets
def test_the_pinned_model_knows_what_words_mean() -> None:
    vectors = Embedder.load().embed(["names of animals", "a dog and a horse", "interest rates of the bank"])
    assert vectors.shape == (3, 384)
    assert float(vectors[0] @ vectors[1]) > float(vectors[0] @ vectors[2]) + 0.1
