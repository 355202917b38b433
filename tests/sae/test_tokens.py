"""Packing on hand-made ids, splits as a function of the text, prefix and special ids, reuse."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sae.config import TokensConfig
from sae.errors import ArtefactError, DataError
from sae.manifest import hash64
from sae.tokens import SPLITS, TokenSet, _Packer, build_tokens, drop_ids, prefix_id, split_of, use_prefix, use_prefix_of

SMALL = {"context_tokens": 8, "train_tokens": 160, "explain_tokens": 40, "calibrate_tokens": 24, "score_tokens": 40,
         "test_tokens": 24}  # fmt: skip


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def texts(n: int = 400) -> list[str]:
    return [f"{i}" + "abcdefg"[: i % 8] for i in range(n)]


def packer(context: int, documents: list[list[int]], budget: int = 1_000) -> _Packer:
    out = _Packer(context, 0, budget)
    for i, ids in enumerate(documents):
        out.add(ids, f"s{i}")
    return out


def test_rows_starts_and_sources_by_hand() -> None:
    rows, starts, sources = packer(5, [[11, 12], [21, 22, 23], [31, 32, 33, 34, 35]]).finish()
    assert rows == [[0, 11, 12, 0, 21], [0, 22, 23, 0, 31], [0, 32, 33, 34, 35]]
    assert starts == [1, 4, 9] and sources == ["s0", "s1", "s2"]


def test_a_separator_never_follows_the_prefix() -> None:
    rows, starts, _ = packer(4, [[11, 12, 13], [21, 22, 23]]).finish()
    assert rows == [[0, 11, 12, 13], [0, 21, 22, 23]] and starts == [1, 5]


def test_a_separator_that_ends_a_row() -> None:
    rows, starts, _ = packer(4, [[11, 12], [21, 22, 23]]).finish()
    assert rows == [[0, 11, 12, 0], [0, 21, 22, 23]] and starts == [1, 5]


def test_the_short_last_row_and_its_documents_are_left_out() -> None:
    rows, starts, sources = packer(4, [[11, 12, 13], [21]]).finish()
    assert rows == [[0, 11, 12, 13]] and starts == [1] and sources == ["s0"]


@pytest.mark.parametrize("budget", [4, 7])
def test_the_budget_is_whole_rows_at_least_one(budget: int) -> None:
    one = packer(4, [[1, 2, 3, 4, 5, 6, 7], [8]], budget)
    assert one.full and one.finish() == ([[0, 1, 2, 3]], [1], ["s0"])
    assert packer(4, [[1, 2, 3]], 2).n_rows == 1


def test_an_empty_document_leaves_no_trace() -> None:
    assert packer(4, [[], [1, 2, 3], []]).finish() == packer(4, [[1, 2, 3]]).finish()[:2] + (["s1"],)


def test_split_is_a_function_of_the_text() -> None:
    found = {t: split_of(t) for t in texts(4_000)}
    assert found == {t: split_of(t) for t in reversed(list(found))}
    for text, split in found.items():
        bucket = hash64(text) % 20
        assert (split == "test") == (bucket == 0) and (split == "train") == (bucket > 2)
    share = {s: sum(v == s for v in found.values()) / len(found) for s in SPLITS}
    for split, expected in zip(SPLITS, (0.85, 0.04, 0.02, 0.04, 0.05), strict=True):
        assert share[split] == pytest.approx(expected, abs=4 * (expected / len(found)) ** 0.5)
    moved = {t: split_of(t, seed=1) for t in found}
    for text, split in found.items():  # the seed moves texts among the three small splits alone
        assert (split in ("train", "test")) == (moved[text] in ("train", "test"))
    assert moved != found


def test_equal_texts_count_once_and_fall_together(tmp_path: Path) -> None:
    once = write(tmp_path / "once.jsonl", texts())
    twice = write(tmp_path / "twice.jsonl", [t for t in texts() for _ in range(2)])
    a = build_tokens(tmp_path, TokensConfig(text=once, **SMALL), "lm", byte_tokenizer())
    b = build_tokens(tmp_path, TokensConfig(text=twice, **SMALL), "lm", byte_tokenizer())
    for split in SPLITS:
        np.testing.assert_array_equal(a[split].tokens_BL, b[split].tokens_BL)
        assert a[split].key != b[split].key  # another file is another input
    for split, sets in a.items():
        assert {split_of(d) for d in documents_of(sets)} == {split}


def documents_of(tokens: TokenSet) -> list[str]:
    """Texts of the documents that lie whole in one row."""
    flat, tokenizer = np.asarray(tokens.tokens_BL).reshape(-1), byte_tokenizer()
    out = []
    for start, end in zip(tokens.doc_starts[:-1], tokens.doc_starts[1:] - 1, strict=True):
        if start // tokens.L == (end - 1) // tokens.L and flat[end] == tokens.prefix_id:
            ids = flat[start:end].tolist()
            out.append(tokenizer.decode(ids[:-1] if ids[-1] == tokens.prefix_id else ids))  # a separator ended the row
    return out


def test_the_written_set(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", texts())
    sets = build_tokens(tmp_path, TokensConfig(text=path, **SMALL), "lm", byte_tokenizer())
    assert list(sets) == list(SPLITS)
    for split, one in sets.items():
        assert (one.split, one.L, one.prefix_id) == (split, 8, 1)  # no BOS is added by itself: EOS
        assert one.tokens_BL.shape == (SMALL[f"{split}_tokens"] // 8, 8) and one.tokens_BL.dtype == np.uint16
        assert one.n_tokens == one.tokens_BL.size and (one.tokens_BL[:, 0] == 1).all()
        assert one.n_docs == len(one.sources) and set(one.sources) == {"t.jsonl"}
        ids, flat = one.doc_ids_BL(), np.asarray(one.tokens_BL).reshape(-1)
        assert ids.dtype == np.int32 and ids.shape == one.tokens_BL.shape and (np.diff(ids.reshape(-1)) >= 0).all()
        assert (ids[:, 0] == ids[:, 1]).all()
        for d, start in enumerate(one.doc_starts):
            assert ids.reshape(-1)[start] == d and flat[start - 1] == one.prefix_id
    train = sets["train"]
    first = next(t for t in texts() if split_of(t) == "train")
    ids = byte_tokenizer()(first, add_special_tokens=False)["input_ids"]
    assert train.tokens_BL.reshape(-1)[1 : 1 + min(7, len(ids))].tolist() == ids[:7]


def test_second_build_reuses_and_force_does_not(tmp_path: Path) -> None:
    cfg = TokensConfig(text=write(tmp_path / "t.jsonl", texts()), **SMALL)
    first = build_tokens(tmp_path, cfg, "lm", byte_tokenizer())
    files = sorted(p for p in (tmp_path / "tokens").rglob("*") if p.is_file())
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}
    again = build_tokens(tmp_path, cfg, "lm", byte_tokenizer())
    assert {s: t.key for s, t in again.items()} == {s: t.key for s, t in first.items()}
    assert {p: p.stat().st_mtime_ns for p in files} == {p: m for p, (m, _) in before.items()}
    build_tokens(tmp_path, cfg, "lm", byte_tokenizer(), force=True)
    assert all(p.stat().st_mtime_ns > m for p, (m, _) in before.items())
    assert all(p.read_bytes() == b for p, (_, b) in before.items() if p.suffix == ".npy")
    (first["score"].folder / "manifest.json").unlink()
    with pytest.raises(ArtefactError):
        TokenSet.open(first["score"].folder)
    assert build_tokens(tmp_path, cfg, "lm", byte_tokenizer())["score"].key == first["score"].key


def test_too_little_text_says_how_much_there_was(tmp_path: Path) -> None:
    path = write(tmp_path / "few.jsonl", ["only one text"])
    with pytest.raises(DataError, match="without one row of 8") as caught:
        build_tokens(tmp_path, TokensConfig(text=path, **SMALL), "lm", byte_tokenizer())
    split = split_of("only one text")
    assert f"{split}: 1" in str(caught.value) and "few.jsonl" in str(caught.value)
    assert "--tokens.context-tokens" in str(caught.value) and not list(tmp_path.glob("tokens/*"))


def test_a_txt_file_of_one_document_says_how_to_write_more(tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("\n".join(texts()), encoding="utf-8")
    with pytest.raises(DataError, match=r'a \.txt file is one document.*\{"text": "\.\.\."\} of a \.jsonl'):
        build_tokens(tmp_path, TokensConfig(text=str(path), **SMALL), "lm", byte_tokenizer())


def test_a_book_fills_five_splits_and_no_passage_lies_in_two(tmp_path: Path) -> None:
    """In one file, where its pieces are dealt out; and among many, where a file lies in one split."""
    sentences = [f"{i}: the rain fell on the town and on the hills behind it." for i in range(9_000)]
    text = "\n\n".join("\n".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6))
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    budgets = {f"{s}_tokens": 16_384 for s in SPLITS}
    sets = build_tokens(tmp_path, TokensConfig(text=str(path), context_tokens=64, **budgets), "lm", byte_tokenizer())
    assert min(s.n_docs for s in sets.values()) >= 2 and sets["train"].n_tokens == 16_384
    found = {split: set(re.findall(r"(\d+): the rain", whole(one))) for split, one in sets.items()}
    assert sum(map(len, found.values())) == len(set().union(*found.values())) > 500


def whole(tokens: TokenSet) -> str:
    """All text of a set, without its prefixes and separators."""
    flat = np.asarray(tokens.tokens_BL).reshape(-1)
    return str(byte_tokenizer().decode(flat[flat != tokens.prefix_id].tolist()))


def test_of_many_books_each_lies_in_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.texts.MANY_FILES", 40)
    folder = tmp_path / "books"
    folder.mkdir()
    for b in range(60):
        (folder / f"{b}.txt").write_text("\n\n".join(f"book {b} page {p} " + "ink " * 90 for p in range(60)))
    budgets = {f"{s}_tokens": 40_960 for s in SPLITS}
    cfg = TokensConfig(text=str(folder), context_tokens=64, **budgets)
    sets = build_tokens(tmp_path, cfg, "lm", byte_tokenizer())
    of = {split: set(one.sources) for split, one in sets.items()}
    assert sum(map(len, of.values())) == len(set().union(*of.values())) and min(s.n_docs for s in sets.values()) > 10


def test_a_text_that_ends_early_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "t.jsonl", texts())
    build_tokens(tmp_path, TokensConfig(text=path, **SMALL), "lm", byte_tokenizer())
    assert not caplog.records
    build_tokens(tmp_path, TokensConfig(text=path, **SMALL | {"test_tokens": 8_000}), "lm", byte_tokenizer())
    assert "of 8,000" in caplog.text and "train" not in caplog.text.rpartition("(tokens:")[2]


def wordy(*, adds_bos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    names = ["<|endoftext|>", "<s>", "</s>", "a", "[MASK]", "<unk>"]
    vocabulary = {n: i for i, n in enumerate(names)}
    if special.pop("plain", ""):
        vocabulary = {"a": 0, "<unk>": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (lambda: wordy(adds_bos=True, bos_token="<s>", eos_token="</s>"), 1),
        (lambda: wordy(bos_token="<s>", eos_token="</s>"), 0),  # SmolLM2's case
        (byte_tokenizer, 1),
    ],
)
def test_prefix_rules(tokenizer, expected: int) -> None:
    assert prefix_id(tokenizer()) == expected and prefix_id(tokenizer(), 2) == 2


def test_the_prefix_is_found_without_a_copy_of_the_vocabulary(monkeypatch) -> None:
    """30 ms of a real tokenizer, once a prompt."""
    one, lacking = wordy(bos_token="<s>", eos_token="</s>"), wordy(plain="yes", eos_token="a")
    expected = [t.get_vocab().get("<|endoftext|>", t.eos_token_id) for t in (one, lacking)]
    for tokenizer in (one, lacking):
        monkeypatch.setattr(type(tokenizer), "get_vocab", None)
    assert [prefix_id(one), prefix_id(lacking)] == expected == [0, 0]


def test_prefix_errors() -> None:
    with pytest.raises(DataError, match="259 tokens"):
        prefix_id(byte_tokenizer(), 259)
    with pytest.raises(DataError, match="--tokens.prefix-id"):
        prefix_id(wordy(plain="yes"))


def test_a_chosen_prefix_holds_for_all_that_the_tokenizer_begins(tmp_path: Path) -> None:
    plain = wordy(plain="yes")
    use_prefix(plain, None)  # the tokenizer's own, of which this one has none
    with pytest.raises(DataError, match="--tokens.prefix-id"):
        prefix_id(plain)
    use_prefix(plain, 1)
    assert prefix_id(plain) == 1 and prefix_id(plain, 0) == 0
    with pytest.raises(DataError, match="outside the vocabulary"):
        use_prefix(plain, 9)
    path = write(tmp_path / "t.jsonl", texts())
    sets = build_tokens(tmp_path, TokensConfig(text=path, prefix_id=7, **SMALL), "lm", byte_tokenizer())
    mine = byte_tokenizer()
    for key in ("", "0" * 16):  # of a set that is not here nothing is known
        use_prefix_of(mine, tmp_path, key)
    assert prefix_id(mine) == prefix_id(byte_tokenizer()) != 7
    use_prefix_of(mine, tmp_path, sets["test"].key)
    assert prefix_id(mine) == 7


def test_special_ids() -> None:
    assert drop_ids(byte_tokenizer()) == (0, 1, 2)
    assert drop_ids(wordy(bos_token="<s>", eos_token="</s>", mask_token="[MASK]")) == (1, 2, 4)
    assert drop_ids(wordy(plain="yes")) == ()
