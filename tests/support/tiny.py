"""A tiny random language model with a byte-level tokenizer, and text for it. Made in a second, no download."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens after three special ones; round-trips any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<eos>"
    )


def save_tiny_lm(folder: Path, *, layers: int = 3, width: int = 32, seed: int = 0) -> Path:
    """A random Llama (``layers`` blocks, D = ``width``) and its byte tokenizer as a Hugging Face folder."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_gpt2(folder: Path) -> Path:
    """A random GPT-2 (3 blocks, D = 16) and its byte tokenizer as a Hugging Face folder."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=259, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


WORDS = (
    "the cat sat on a mat while rain fell over old town roofs and children ran to school with red bags "
    "doctors found that cells grow faster when sugar is low but courts held the law must stand as written"
).split()


def write_texts(path: Path, *, documents: int = 400, seed: int = 0) -> Path:
    """A jsonl file of short documents made of words, numbers and some code."""
    import json

    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(documents):
            words = [WORDS[j] for j in rng.integers(len(WORDS), size=rng.integers(20, 60))]
            text = f"Note {i}: " + " ".join(words) + (f" def f{i}(x): return {i} * x" if i % 5 == 0 else ".")
            file.write(json.dumps({"text": text}) + "\n")
    return path


def save_tiny_embedder(folder: Path, *, seed: int = 0) -> Path:
    """A random BERT with a byte tokenizer: an embedding judge without skill, for the mechanics."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=259,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=512,
        pad_token_id=2,
    )
    BertModel(config).eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_task(path: Path, *, rows: int = 480, seed: int = 0) -> Path:
    """A labelled CSV: is the text about numbers? Columns prompt, target."""
    import csv

    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "target"])
        for i in range(rows):
            words = [WORDS[j] for j in rng.integers(len(WORDS), size=8)]
            tail = f"{rng.integers(1e6)} {rng.integers(1e6)}" if i % 2 else f"{words[0]}{words[1]} {words[2]}"
            writer.writerow([" ".join(words) + f" {i // 2} " + tail, i % 2])
    return path
