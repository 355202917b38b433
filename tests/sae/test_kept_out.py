"""Documents that share ten words in a row with a prompt: found wherever they stand, counted, and in no split."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import byte_tokenizer

from sae import kept_out
from sae.config import TokensConfig
from sae.default_mix import MixRow, text_key
from sae.kept_out import RUN_WORDS, KeptOut
from sae.texts import Document
from sae.tokens import SPLITS, TokenSet, build_tokens

PROMPT = "the quick brown fox jumps over the lazy dog while seven wise owls watch"
WORDS = PROMPT.split()
BUDGETS = {"context_tokens": 32, **{f"{split}_tokens": 4_096 for split in SPLITS}}


def of(*prompts: str) -> KeptOut:
    return KeptOut({"own": "|".join(prompts)}, lambda: prompts)


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        (PROMPT, True),
        (f"So it goes: {' '.join(WORDS[3:13])}, and more.", True),
        (f"So it goes: {' '.join(WORDS[3:12])}, and more.", False),
        ("THE Quick\nbrown   fox, jumps (over) the lazy dog -- while", True),
        (" ".join(WORDS[:9]) + " quietly " + " ".join(WORDS[9:]), False),
        ("the quick brown fox", False),
        ("", False),
    ],
)
def test_ten_words_in_a_row_are_too_many(text, shared):
    assert of("something else entirely", PROMPT).shared(["of another kind", text]).tolist() == [False, shared]


def test_a_prompt_of_few_words_counts_as_a_whole():
    found = of("Paris is nice").shared(["paris IS  nice", "They say Paris is nice in spring", "Paris is"])
    assert found.tolist() == [True, False, False]


def test_no_prompt_keeps_nothing_out():
    assert not of().shared(["a", PROMPT]).any()


def test_it_finds_what_a_slow_search_finds(monkeypatch):
    monkeypatch.setattr(kept_out, "BATCH", 7)
    draw = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(draw.choice(["ab", "cd"], size=n))

    prompts, texts = [text(int(n)) for n in draw.integers(3, 14, 40)], [text(int(n)) for n in draw.integers(1, 60, 120)]

    def runs(one: str) -> set[tuple[str, ...]]:
        words = text_key(one).split()
        return {tuple(words[i : i + RUN_WORDS]) for i in range(max(1, len(words) - RUN_WORDS + 1))}

    known = set().union(*map(runs, prompts))
    expected = [bool(runs(one) & known) for one in texts]
    keep = of(*prompts)
    assert keep.shared(texts).tolist() == expected and 5 < sum(expected) < len(texts) - 5
    documents = [Document(one, "f", str(i)) for i, one in enumerate(texts)]
    assert [d.doc_id for d in keep.clean(iter(documents))] == [str(i) for i, bad in enumerate(expected) if not bad]
    assert keep.n_dropped == sum(expected)


def documents(path: Path) -> str:
    lines = []
    for i in range(600):
        words = f" number {i} " + (PROMPT if i % 3 == 0 else "is another story altogether")
        lines.append(json.dumps({"text": f"document{words}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def text_of(tokens: TokenSet) -> str:
    flat = np.asarray(tokens.tokens_BL).reshape(-1)
    return str(byte_tokenizer().decode(flat[flat != tokens.prefix_id].tolist()))


def test_no_split_holds_them_and_the_manifest_counts_them(tmp_path):
    cfg = TokensConfig(text=documents(tmp_path / "t.jsonl"), **BUDGETS)
    plain = build_tokens(tmp_path, cfg, "lm", byte_tokenizer())
    cleaned = build_tokens(tmp_path, cfg, "lm", byte_tokenizer(), keep_out=of(PROMPT))
    for split in SPLITS:
        assert "lazy dog" in text_of(plain[split]) and "lazy dog" not in text_of(cleaned[split])
        assert "another story" in text_of(cleaned[split]) and plain[split].key != cleaned[split].key
        assert cleaned[split].manifest["counts"]["kept_out"] == 200
        assert "kept_out" not in plain[split].manifest["counts"] | plain[split].manifest["config"]
    again = build_tokens(tmp_path, cfg, "lm", byte_tokenizer(), keep_out=KeptOut({"own": PROMPT}, lambda: 1 / 0))
    assert [s.key for s in again.values()] == [s.key for s in cleaned.values()]  # complete: nobody asks for prompts
    other = build_tokens(tmp_path, cfg, "lm", byte_tokenizer(), keep_out=of("of another task"))
    assert other["train"].key not in (plain["train"].key, cleaned["train"].key)


def test_the_default_text_is_looked_through_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    reads = []

    def rows():
        reads.append(1)
        yield from (MixRow("f", i, f"text {i} of the mix " + (PROMPT if i == 1500 else "")) for i in range(2000))

    monkeypatch.setattr(kept_out, "default_rows", rows)
    assert [of(PROMPT).touches_default() for _ in range(2)] == [True, True] and len(reads) == 1
    assert [of("no such words").touches_default() for _ in range(2)] == [False, False] and len(reads) == 2


def test_books_are_looked_at_a_few_at_a_time(monkeypatch):
    """What is held of words is bounded by characters, and neither order nor verdicts hang on it."""
    monkeypatch.setattr(kept_out, "BATCH_CHARACTERS", 1_000)
    sizes, keep = [], of(PROMPT)
    plain = keep.shared
    monkeypatch.setattr(keep, "shared", lambda texts: sizes.append(sum(map(len, texts))) or plain(texts))
    books = ["word " * 150 + (PROMPT if i % 5 == 0 else "") for i in range(20)]
    found = list(keep.clean(Document(text, "f", str(i)) for i, text in enumerate(books)))
    assert [d.doc_id for d in found] == [str(i) for i in range(20) if i % 5] and keep.n_dropped == 4
    assert len(sizes) == 10 and max(sizes) < 1_000 + max(map(len, books))
