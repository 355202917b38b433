"""Rules of the default text mix on small examples; its counts on the pinned texts."""

from collections import Counter

import numpy as np
import pytest

from sae.default_mix import (
    WORD,
    MixRow,
    _capped,
    _read,
    default_rows,
    mix_key,
    rules_of_mix,
    runs_of_words,
    text_key,
)
from sae.manifest import hash64
from sae.tokens import split_of

KEPT = {
    94: 4922, 100: 1993, 98: 565, 101: 1915, 111: 4947, 158: 1483, 159: 1113, 160: 1230, 161: 1886, 162: 1894,
    163: 1761, 90: 4899, 91: 4951, 88: 4877, 89: 1713, 92: 2341, 93: 3275, 113: 3500, 103: 4457, 99: 1971, 102: 3536,
    26: 4433, 25: 3722, 21: 2698, 105: 1593, 54: 2874, 96: 875,
}  # fmt: skip
"""Kept documents by number of file (DATA 4)."""


def runs(*texts: str, length: int = 3) -> list[set[int]]:
    hashes, text_of = runs_of_words([t.split() for t in texts], length)
    return [set(hashes[text_of == i].tolist()) for i in range(len(texts))]


def test_text_key() -> None:
    assert text_key("  Ａ\u00a0ﬁne\tDAY\n\nIndeed ") == "a fine day indeed"
    assert text_key("x y") != text_key("xy") and text_key("") == ""


def test_runs_by_hand() -> None:
    hashes, text_of = runs_of_words(["a b c d".split(), [], "b c d".split(), "z".split()], 3)
    assert text_of.tolist() == [0, 0, 2, 3] and hashes.dtype == np.uint64
    assert hashes[1] == hashes[2] and len(set(hashes.tolist())) == 3


def test_a_shared_run_anywhere_is_found() -> None:
    here, there, other = runs("w x a b c y", "q a b c r s t", "a b x c")
    assert len(here & there) == 1 and not here & other and not there & other


def test_a_short_text_is_one_run_and_no_prefix_of_a_long_one() -> None:
    short, long, same, single = runs("a b", "a b c", "a b", "a")
    assert len(short) == 1 and short == same and not short & long and not single & short


def test_order_and_borders_matter() -> None:
    a, b = runs("a b c", "c b a")
    assert not a & b
    joined, apart = runs("a b c d", "a b"), runs("a b", "c d")
    assert not joined[0] & (apart[0] | apart[1])


def test_no_words_at_all() -> None:
    for texts in ([], [[]], [[], []]):
        hashes, text_of = runs_of_words(texts, 3)
        assert len(hashes) == len(text_of) == 0


def test_hashes_agree_with_a_slow_search() -> None:
    r = np.random.default_rng(0)
    texts = [[str(w) for w in r.integers(5, size=r.integers(1, 9))] for _ in range(60)]
    hashes, text_of = runs_of_words(texts, 3)
    slow: list[set[tuple[str, ...]]] = []
    for t in texts:
        slow.append({tuple(t[i : i + 3]) for i in range(len(t) - 2)} if len(t) >= 3 else {tuple(t)})
    found = [set(hashes[text_of == i].tolist()) for i in range(len(texts))]
    for i in range(len(texts)):
        assert len(found[i]) == len(slow[i])
        for j in range(i):
            assert len(found[i] & found[j]) == len(slow[i] & slow[j])


def test_the_cap_takes_texts_in_hashed_order_until_it_is_reached() -> None:
    rows = [MixRow("f", i, f"text {i} " + "x" * 90) for i in range(30)]
    kept = _capped(rows, 1_000)
    order = sorted(rows, key=lambda r: hash64("0|" + r.text))
    expected = []
    for row in order:
        if sum(len(r.text) for r in expected) >= 1_000:
            break
        expected.append(row)
    assert kept == sorted(expected, key=lambda r: r.row) and 0 < len(kept) < len(rows)
    assert _capped(rows[::-1], 1_000) == kept and _capped(rows, 10**9) == rows and _capped([], 5) == []


def test_the_rules_name_the_files_of_the_design() -> None:
    rules = rules_of_mix()
    assert [int(f["file"].partition("_")[0]) for f in rules["files"]] == [
        94, 100, 98, 101, 111, 158, 159, 160, 161, 162, 163, 90, 91, 88, 89, 92, 93, 113, 103, 99, 102, 26, 25, 21, 105,
        54, 96,
    ]  # fmt: skip
    assert not {int(f["file"].partition("_")[0]) for f in rules["files"]} & set(rules["probe_files"])
    assert len(mix_key()) == 16


@pytest.mark.assets
@pytest.mark.slow
def test_counts_of_the_default_mix() -> None:
    """75,424 documents, as measured when the design was made."""
    rows = list(default_rows())
    assert {int(name.partition("_")[0]): n for name, n in Counter(r.file for r in rows).items()} == KEPT
    assert len(rows) == sum(KEPT.values()) == 75_424
    splits = Counter(split_of(r.text) for r in rows)
    assert splits["train"] == 64_221 and splits["test"] == 3_762
    assert splits["explain"] + splits["calibrate"] + splits["score"] == 7_441
    assert min(len(r.text) for r in rows) >= 40 and all(r.text == r.text.strip() for r in rows)
    heads = [text_key(r.text[:800])[:200] for r in rows]
    assert len(set(heads)) == len(heads)


@pytest.mark.assets
@pytest.mark.slow
def test_no_training_text_shares_ten_words_with_a_probe_prompt_and_none_lies_in_two_splits() -> None:
    """By plain strings, on every twentieth training document; by text for the splits, of which copies are one."""
    rows = list(default_rows())
    keys = [text_key(r.text) for r in rows]
    split_by_key: dict[str, set[str]] = {}
    for row, key in zip(rows, keys, strict=True):
        split_by_key.setdefault(key, set()).add(split_of(row.text))
    assert all(len(splits) == 1 for splits in split_by_key.values())
    trained: set[str] = set()
    for key in [k for r, k in zip(rows, keys, strict=True) if split_of(r.text) == "train"][::20]:
        trained |= _runs(key)
    assert len(trained) > 250_000
    for number in rules_of_mix()["probe_files"]:
        prompts = {text_key(p) for p in _read(str(number))[1]}
        assert not [p for p in prompts if not trained.isdisjoint(_runs(p))], number


def _runs(key: str, length: int = 10) -> set[str]:
    words = WORD.findall(key)
    return {" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}
