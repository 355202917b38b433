"""Windows as words: every token once, peaks found, the deterministic description."""

import pytest
from tiny import byte_tokenizer

from autointerp.records import Exemplar, LatentView
from autointerp.texts import Decoder, any_of, deal, list_text, marked_words, named, peak_word, readable, words_before

TOKENIZER = byte_tokenizer()


def exemplar(text: str, marked: str = "", act: float = 1.0, kind: str = "top", number: int = 0, group: int = -1):
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    acts, peak = [0.0] * len(ids), -1
    if marked:
        peak = text.index(marked)
        acts[peak : peak + len(marked)] = [act] * len(marked)
    return Exemplar(
        exemplar_id=f"{kind}{number}", latent=0, kind=kind, split="explain", token_ids=ids, acts=tuple(acts), peak=peak,
        group=group,
    )  # fmt: skip


def view(*exemplars: Exemplar) -> LatentView:
    return LatentView(sae_id="s", latent=0, exemplars=exemplars, density=0.1, max_act=4.0)


@pytest.mark.parametrize("text", ["The cat's 3 (red) hats.", " a\n\nb\tc", "über naïve 猫 x", "", "...", "x"])
def test_words_cover_every_token_once_and_in_order(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    words = Decoder(TOKENIZER).words(ids)
    covered = [i for w in words for i in range(w.first, w.last + 1)]
    assert covered == list(range(len(ids)))
    assert all(w.text for w in words)


def test_letters_join_and_marks_stand_alone() -> None:
    words = [w.text for w in Decoder(TOKENIZER).words(TOKENIZER.encode("unlikely (3rd) day", add_special_tokens=False))]
    assert [w for w in words if w != "space"] == ["unlikely", "(", "3rd", ")", "day"]
    # Characters of several byte tokens stay whole.
    assert Decoder(TOKENIZER).words(TOKENIZER.encode("über", add_special_tokens=False))[0].text == "über"


def test_a_word_is_decoded_once() -> None:
    class Counting:
        n = 0

        def decode(self, ids: list[int]) -> str:
            self.n += 1
            return TOKENIZER.decode(ids)

    ids, counting = TOKENIZER.encode("unlikely, said the unlikely man", add_special_tokens=False), Counting()
    decoder = Decoder(counting)
    words = decoder.words(ids)
    assert [w.text for w in words] == [readable(TOKENIZER.decode(ids[w.first : w.last + 1])) for w in words]
    first = counting.n
    assert decoder.words(tuple(ids[: words[0].last + 1])) == words[:1] and decoder.words(ids) == words
    assert counting.n == first == len(set(ids)) + len({w.text for w in words if w.last > w.first})


def test_invisible_words_and_marks_have_names() -> None:
    assert (readable("\n"), readable(" \t"), readable("  "), readable(" cat ")) == ("line break", "tab", "space", "cat")
    assert named("?") == "question mark ?" and named("cat") == "cat"


def test_around_keeps_the_peak_and_the_length() -> None:
    e = exemplar("abcdefghijklmnopqrstuvwxyz", "x")
    assert 'x' in Decoder(TOKENIZER).around(e, 8)
    assert len(Decoder(TOKENIZER).around(e, 8)) == 8
    assert Decoder(TOKENIZER).around(exemplar("abc"), 8) == "abc"


def test_peak_word_and_the_word_before() -> None:
    assert peak_word(Decoder(TOKENIZER), exemplar("don't (stop) now", "stop")) == ("stop", "(")
    assert peak_word(Decoder(TOKENIZER), exemplar("nothing")) == ("", "")


def test_marked_words_add_up_over_windows_without_case() -> None:
    found = marked_words(
        Decoder(TOKENIZER),
        view(exemplar("the cat", "cat", 4.0), exemplar("The Cat sat", "Cat", 2.0), exemplar("a dog", "dog", 4.0),
             exemplar("silent words", kind="silent")),
    )  # fmt: skip
    assert found == [("cat", 1.5), ("dog", 1.0)]


def test_the_description_lists_words_and_what_stands_before() -> None:
    stop = [exemplar(f"don't (stop{c})", f"stop{c}", 4.0, number=i) for i, c in enumerate("abc")]
    assert list_text(Decoder(TOKENIZER), view(*stop)) == (
        "words such as stopa, stopb, stopc, after opening bracket ("
    )
    assert words_before(Decoder(TOKENIZER), view(exemplar("the cat", "cat"))) == []  # once is no habit
    assert list_text(Decoder(TOKENIZER), view(exemplar("a cat", "cat"))) == "the word cat"
    assert list_text(Decoder(TOKENIZER), view(exemplar("silent", kind="silent"))) is None


def test_accidents_of_one_window_are_left_out() -> None:
    often = [exemplar(f"a cat {i}", "cat", 4.0, number=i) for i in range(12)]
    once = exemplar("a dog", "dog", 4.0, number=99)
    assert list_text(Decoder(TOKENIZER), view(*often, once)) == "the word cat, after a"


def test_dealing_takes_every_group_in_turn() -> None:
    found = deal([exemplar("x", number=i, kind="quantile", group=i // 3) for i in range(6)])
    assert [e.group for e in found] == [0, 1, 0, 1, 0, 1]
    assert deal([]) == []


@pytest.mark.parametrize(
    ("n", "groups"),
    [(1, [5]), (2, [2, 7]), (4, [1, 3, 6, 8]), (8, [0, 1, 3, 4, 5, 6, 8, 9]), (10, list(range(10))),
     (12, [*range(10), 2, 7]), (20, [*range(10), *range(10)]), (99, [*range(10), *range(10)])],
)  # fmt: skip
def test_few_windows_are_of_every_strength(n: int, groups: list[int]) -> None:
    """Ten groups of two. Taking the first n in turn would leave out the strongest, which are what a latent is about."""
    found = deal([exemplar("x", number=i, kind="quantile", group=i // 2) for i in range(20)], n)
    assert [e.group for e in found] == groups and len({e.exemplar_id for e in found}) == len(found)


def test_some_windows_are_no_more_from_the_beginning_than_others() -> None:
    """Ids in the order of the text, as in a table: of 20 windows the 8 taken have a mean place of 9.5."""
    places = []
    for latent in range(200):
        ids = [f"key-{latent}-score-silent-{row}-0--1" for row in range(20)]
        table = [Exemplar(exemplar_id=i, latent=latent, kind="silent", split="score") for i in ids]
        places += [ids.index(e.exemplar_id) for e in any_of(table, 8)]
        assert any_of(table[::-1], 8) == any_of(table, 8)
    assert len(places) == 1_600 and sum(places) / len(places) == pytest.approx(9.5, abs=0.45)  # 3 standard errors
