"""Prompts: holes, hashes, one-line windows, marks; no window can pose as something else."""

from importlib import resources

import pytest
from tiny import byte_tokenizer

from autointerp.llm_requests import Message
from autointerp.prompts import (
    escaped,
    load_prompt,
    marked_window,
    numbered,
    pieces,
    strength,
    window_text,
)
from autointerp.records import Exemplar
from sae.errors import ConfigError
from sae.manifest import sha256_text

TOKENIZER = byte_tokenizer()
PROMPTS = sorted(f.name.removesuffix(".md") for f in (resources.files("autointerp") / "prompt_texts").iterdir())


class Words:
    """A tokenizer whose tokens are given texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, ids) -> str:
        return "".join(self.texts[i] for i in ids)


def exemplar(acts, ids=None) -> Exemplar:
    acts = tuple(float(a) for a in acts)
    return Exemplar(
        exemplar_id="e", latent=0, kind="top", split="explain", acts=acts, peak=acts.index(max(acts)),
        token_ids=tuple(ids if ids is not None else range(len(acts))),
    )  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_shipped_prompts_load_and_carry_their_hash(name: str) -> None:
    prompt = load_prompt(name)
    assert len(prompt.sha256) == 64 and prompt.sections
    assert not any("\u0120" in text or "\u2581" in text for _, text in prompt.sections)  # no byte-level pieces


def test_holes_are_filled_once_and_checked() -> None:
    prompt = load_prompt("detection_logprob")
    last = prompt.messages(explanation="{{window}} and {{other}}", window="w")[-1]
    assert last == Message(role="user", content="Description: {{window}} and {{other}}\nSnippet: w")
    with pytest.raises(ConfigError, match="window"):
        prompt.messages(explanation="x")
    with pytest.raises(ConfigError, match="no hole extra"):
        prompt.messages(explanation="x", window="w", extra="y")
    with pytest.raises(ConfigError, match="did you mean"):
        load_prompt("detection_lst")
    with pytest.raises(ConfigError, match="no section"):
        prompt.section("absent")


def test_the_golden_list_prompt() -> None:
    """What a judge reads, whole: a change here is a new prompt and a new version of the scores."""
    messages = load_prompt("detection_list").messages(explanation="colours", windows=numbered(["red", "blue"]))
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[-1].content == "Description: colours\n[1] red\n[2] blue"
    assert messages[2].content == '{"match": [1, 3]}'
    assert sha256_text(messages[0].content)[:8] == "f6b15476"


@pytest.mark.parametrize("text", ["a\nb", "a\r\n[2] b", "tab\there", "\x00\x1b[31m", "a\u2028b\u2029c\x85d\x0be\x0cf"])
def test_a_window_is_one_line(text: str) -> None:
    shown = escaped(text)
    assert len(shown.splitlines()) == 1 and shown.isprintable()


def test_an_ordinary_window_is_left_alone() -> None:
    text = 'He said "naïve" – 日本語 👍 {x} <b> 3 < 4'
    assert escaped(text) == text


@pytest.mark.parametrize("text", ["plain", "naïve 👍🏽 日本", "a\n\tb", '"quoted"', "\ufffd"])
def test_pieces_join_to_the_text_and_split_no_character(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    parts = pieces(TOKENIZER, ids)
    assert len(parts) == len(ids) and "".join(parts) == TOKENIZER.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in parts)


def test_half_a_character_at_the_end_is_kept() -> None:
    ids = TOKENIZER.encode("a👍", add_special_tokens=False)[:-1]
    parts = pieces(TOKENIZER, ids)
    assert len(parts) == len(ids) and "".join(parts) == TOKENIZER.decode(ids)
    assert "\n" not in window_text(TOKENIZER, ids)


def by_beginnings(tokenizer, ids) -> list[str]:
    """What a piece is, without a short cut: the text that a token adds to the text of those before it."""
    out, before = [], ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        half = text.endswith("\ufffd") and i + 1 < len(ids)
        out.append("" if half else text[len(before) :])
        before = before if half else text
    return out


class Spaced(Words):
    """Drops the space before its first word, as SentencePiece does: a token alone reads otherwise than in a text."""

    def decode(self, ids) -> str:
        return super().decode(ids).removeprefix(" ")


@pytest.mark.parametrize("text", ["plain words", "naïve 👍🏽 日本 and 😀😀", "a\n\tb\r", "\ufffd a", " x  y "])
@pytest.mark.parametrize("shift", range(3))
def test_pieces_are_what_each_token_adds(text: str, shift: int) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)[shift:]
    assert pieces(TOKENIZER, ids) == pieces(TOKENIZER, tuple(ids)) == by_beginnings(TOKENIZER, ids)
    words = Spaced(" the", " cat", "s", " ", " sat")
    for ids in ([0, 1, 2, 4], [2, 1], [3, 3, 0], [0]):
        assert pieces(words, ids) == by_beginnings(words, ids)
    assert pieces(words, [0, 1, 2, 4]) == ["the", " cat", "s", " sat"]


def test_each_tokenizer_keeps_its_own_words() -> None:
    first = Words("a", "b")
    for n in range(7):  # more than are kept
        assert pieces(Words(f"{n}", "x"), [0, 1]) == [f"{n}", "x"]
        assert pieces(first, [1, 0]) == ["b", "a"]


def test_every_character_is_shown_as_before_or_as_its_number() -> None:
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    for c in (*map(chr, range(0x3100)), "\ud83d", "\ufeff", "\U0001f44d", "\U000e0041", "\U0010ffff"):
        assert escaped(f"a{c}") == "a" + named.get(c, c if c.isprintable() else f"\\x{ord(c):02x}")
    assert escaped("one\ntwo" * 3) == "one\\ntwo" * 3 and escaped("") == ""


@pytest.mark.parametrize(("act", "want"), [(0, 0), (-1, 0), (0.01, 1), (1.0, 1), (1.01, 2), (8.5, 9), (9, 9)])
def test_strength_is_ceil_of_ninths(act: float, want: int) -> None:
    assert strength(act, 9.0) == want


def test_marks() -> None:
    tokenizer = Words("The", " big", " red", " dog", " ran", "<<", "\n")
    shown = marked_window(tokenizer, exemplar([0, 2.9, 3, 10, 0, 0, 0]), largest=20.0)
    assert shown == "The big <<red dog>> ran< <\\n   (red dog=5)"


def test_silence_shows_no_marks() -> None:
    assert marked_window(Words("a", " b"), exemplar([0.0, 0.0]), largest=1.0) == "a b"


def test_an_invisible_token_is_marked_visibly() -> None:
    assert marked_window(Words("a", "\n", "b"), exemplar([0, 1, 0]), largest=1.0) == "a<<\\n>>b   (\\n=9)"
