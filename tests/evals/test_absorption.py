"""Absorption against planted hierarchies: the latents of a letter that are silent on its absorbed words."""

import numpy as np
import pytest
import torch
from memory_store import context, info

from evals.base import SAESubject
from evals.letter_latents import absorption_of, f1_score, letter_probes, main_latents, score_letters
from evals.sparse_probes import SparseFeatures
from evals.spelling import SpellingConfig, build_spelling, open_spelling, prompts, vocabulary_words
from evals.suite.absorption import PLUGIN

LETTERS_PLANTED = 22
WORDS = 40
D = 64


class Planted:
    """22 letters of 40 words; x = 3 g_letter + a word's own direction + noise. ``absorbed`` words of letter 0 carry
    their letter in a latent of their own, on which the letter's latent is silent."""

    def __init__(self, absorbed: int = 0, split: bool = False, seed: int = 0) -> None:
        r = np.random.default_rng(seed)
        q, _ = np.linalg.qr(r.standard_normal((D, D)))
        self.letter_N = np.repeat(np.arange(LETTERS_PLANTED), WORDS)
        self.test_N = np.tile(np.arange(WORDS) % 5 == 0, LETTERS_PLANTED)
        n = len(self.letter_N)
        g = q[:LETTERS_PLANTED]
        self.x_ND = (3 * g[self.letter_N] + 0.05 * r.standard_normal((n, D))).astype(np.float32)
        rows, latents, values = [], [], []
        dec = [*g]  # latents 0 ... 21: the letters
        in_letter = np.arange(n) % WORDS
        self.absorbed_N = np.zeros(n, dtype=bool)
        # test words of letter 0 first, so that the share among scored words is known
        order = np.concatenate([np.flatnonzero(self.test_N[:WORDS]), np.flatnonzero(~self.test_N[:WORDS])])
        self.absorbed_N[order[:absorbed]] = True
        for i in range(n):
            if self.absorbed_N[i]:
                dec.append(g[0])
                latent = len(dec) - 1
            elif split and self.letter_N[i] == 0 and in_letter[i] % 2:
                latent = LETTERS_PLANTED + D  # a second latent of the same letter
            else:
                latent = self.letter_N[i]
            rows.append(i), latents.append(latent), values.append(3.0)
        width = LETTERS_PLANTED + D + 1
        while len(dec) < width:
            dec.append(g[0])
        self.dec_FD = np.stack(dec)
        self.codes = SparseFeatures(np.array(values)[:, None], np.array(latents)[:, None], width)

    def scores(self):
        probes = letter_probes(self.x_ND, self.letter_N, self.test_N)
        assert len(probes) == LETTERS_PLANTED and min(p.f1 for p in probes) > 0.95
        scale = np.ones(len(self.letter_N))
        return score_letters(self.x_ND, self.codes, scale, self.dec_FD, self.letter_N, self.test_N, probes)


def test_without_absorption_it_is_zero_and_each_letter_has_its_latent():
    scores = Planted().scores()
    assert all(list(s.main) == [s.letter] for s in scores)
    assert all(s.main_f1 == 1 for s in scores)
    assert sum(s.fraction.sum() + s.full.sum() for s in scores) == 0
    assert all(len(s.rows) == WORDS // 5 and s.n_no_projection == 0 for s in scores)


def test_silent_parents_are_absorbed_as_often_as_planted():
    planted = Planted(absorbed=3)
    score = planted.scores()[0]
    assert list(score.main) == [0]
    assert score.full.mean() == 3 / len(score.rows) and score.fraction.mean() == 3 / len(score.rows)
    assert np.array_equal(score.full > 0, planted.absorbed_N[score.rows])
    others = planted.scores()[1:]
    assert sum(s.full.sum() + s.fraction.sum() for s in others) == 0


def test_a_letter_split_over_two_latents_needs_both():
    scores = Planted(split=True).scores()
    assert sorted(scores[0].main) == [0, LETTERS_PLANTED + D] and scores[0].main_f1 == 1
    assert all(len(s.main) == 1 for s in scores[1:])


def test_latents_that_know_no_letter_choose_nothing():
    r = np.random.default_rng(1)
    n = 400
    y = r.random(n) < 0.05
    codes = SparseFeatures(np.abs(r.standard_normal((n, 4))), r.integers(50, size=(n, 4)), 50)
    train = np.arange(n) % 5 > 0
    main, said = main_latents(codes.matrix, y, train)
    assert f1_score(y[~train], said[~train]) < 0.4
    empty = SparseFeatures(np.zeros((n, 1)), np.zeros((n, 1), dtype=int), 50)
    main, said = main_latents(empty.matrix, y, train)
    assert len(main) == 0 and not said.any()


@pytest.mark.parametrize(
    ("effects", "cosines", "fraction", "full"),
    [
        ([10.0, 0.0], [0.9, 0.5], 0.0, 0.0),  # the main latent brings all
        ([4.0, 6.0], [0.9, 0.5], 0.6, 0.0),  # partial: 6 of 10
        ([4.0, 9.0], [0.9, 0.5], 0.6, 0.0),  # no more than what is missing counts
        ([4.0, 3.9], [0.9, 0.5], 0.0, 0.0),  # below 40 % of the projection
        ([4.0, 6.0], [0.9, 0.05], 0.0, 0.0),  # other latents must point along the letter
        ([-1.0, 6.0], [0.9, 0.5], 1.0, 0.0),  # the main latent pushes the other way
    ],
)
def test_the_formula_of_one_word(effects, cosines, fraction, full):
    found = absorption_of(np.array([7, 9]), np.array(effects), np.array(cosines), np.array([7]), 10.0)
    assert found.fraction == pytest.approx(fraction) and found.full == full


def test_three_others_at_most_and_silent_mains():
    found = absorption_of(np.arange(5), np.full(5, 2.0), np.full(5, 0.5), np.array([9]), 10.0)
    assert found.fraction == 1.0  # 3 x 2 >= 4 and nothing of the main latents
    assert found.full == 0.0  # none brings 4 alone
    alone = absorption_of(np.array([1]), np.array([4.0]), np.array([0.03]), np.array([9]), 10.0)
    assert alone.full == 1.0 and alone.fraction == 0.0  # cosine enough for `full`, not for `fraction`
    assert absorption_of(np.array([], dtype=int), np.array([]), np.array([]), np.array([9]), 10.0).full == 0.0


def test_words_are_single_lower_case_tokens_and_the_side_hangs_on_the_word_alone():
    texts = [" apple", " Apple", "apple", " ab", " añb", " bee", " b3e", " beer", " cat", "  dog"]
    vocabulary = {t: i for i, t in enumerate(texts)}
    words = vocabulary_words(vocabulary, lambda i: texts[i], SpellingConfig())
    assert words.word == ["apple", "bee", "beer", "cat"] and list(words.letter_N) == [0, 1, 1, 2]
    many = [f" {a}{b}{c}" for a in "ab" for b in "xyzuvw" for c in "klmnopqrst"]
    all_words = vocabulary_words({t: i for i, t in enumerate(many)}, lambda i: many[i], SpellingConfig())
    few = vocabulary_words({t: i for i, t in enumerate(many)}, lambda i: many[i], SpellingConfig(words_per_letter=10))
    assert len(few.word) == 20 and 0.05 < all_words.test_N.mean() < 0.4
    side = dict(zip(all_words.word, all_words.test_N, strict=True))
    assert all(side[w] == t for w, t in zip(few.word, few.test_N, strict=True))
    other = vocabulary_words({t: i for i, t in enumerate(many)}, lambda i: many[i], SpellingConfig(seed=1))
    assert list(other.test_N) != list(all_words.test_N)


def test_prompts_show_train_words_other_than_the_one_asked_for():
    many = [f" {a}{b}{c}" for a in "ab" for b in "xyzuvw" for c in "klmnopqrst"]
    cfg = SpellingConfig()
    words = vocabulary_words({t: i for i, t in enumerate(many)}, lambda i: many[i], cfg)
    train = {w for w, t in zip(words.word, words.test_N, strict=True) if not t}
    for word, text in zip(words.word, prompts(words, cfg), strict=True):
        *lines, last = text.split("\n")
        shown = [line.split()[0] for line in lines]
        assert last == f" {word}" and len(set(shown)) == 10 and set(shown) <= train - {word}
        assert all(line == f" {w} has the first letter: {w[0].upper()}" for line, w in zip(lines, shown, strict=True))


def test_a_tokenizer_without_words_fails_the_gate_not_the_run(tiny_lm, tmp_path):
    folder = build_spelling(tmp_path, tiny_lm, "layers.1", SpellingConfig(words_per_letter=20))
    assert open_spelling(folder).words == [] and open_spelling(folder).x_ND.shape == (0, 32)


class WordTokenizer:
    """One token per word with its space, so that the whole evaluation runs on planted activations."""

    def __init__(self) -> None:
        r = np.random.default_rng(0)
        self.texts = ["<s>", "\n", ":"]
        for letter in "abcdefghijklmnopqrstuv":
            made = {letter + "".join("abcdefghij"[i] for i in r.integers(10, size=4)) for _ in range(30)}
            self.texts += [f" {w}" for w in sorted(made)]
        self.index = {t: i for i, t in enumerate(self.texts)}
        self.bos_token_id, self.all_special_ids = 0, [0]

    def get_vocab(self) -> dict[str, int]:
        return self.index

    def decode(self, ids) -> str:
        return "".join(self.texts[i] for i in ids)

    def __call__(self, texts, add_special_tokens=True):
        one = [texts] if isinstance(texts, str) else texts
        ids = [[self.index[f" {w}"] for w in t.split() if f" {w}" in self.index] for t in one]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}


class SpellingLM:
    """A model whose activation at a word is its first letter's direction."""

    def __init__(self) -> None:
        self.tokenizer, self.dtype, self.device = WordTokenizer(), torch.float32, torch.device("cpu")
        self.revision, self.name, self.n_forwards = "r", "spelling", 0
        g = torch.Generator().manual_seed(0)
        self.directions, _ = torch.linalg.qr(torch.randn(D, D, generator=g))
        self.noise = 0.05 * torch.randn(len(self.tokenizer.texts), D, generator=g)

    def check_hookpoint(self, hookpoint: str) -> int:
        return D

    def capture(self, ids_BL, hookpoints):
        self.n_forwards += 1
        letters = torch.tensor([max(0, ord(t.strip()[:1] or "a") - 97) % 26 for t in self.tokenizer.texts])
        return {hookpoints[0]: (3 * self.directions[letters] + self.noise)[ids_BL]}


class LetterSAE:
    """One latent per letter: z = relu(x·g - 1)."""

    transcodes = False

    def __init__(self, lm: SpellingLM, good: bool = True) -> None:
        self.W_dec_FD = lm.directions[:26] if good else lm.directions[30:56]

    def encode_sparse(self, x_ND):
        from sae.base import SparseLatents

        values, indices = (x_ND @ self.W_dec_FD.T - 1).clamp_min(0).topk(3, dim=1)
        return SparseLatents(values, indices)

    def output_scale(self, x_ND):
        return torch.ones(len(x_ND))


@pytest.fixture
def spelling_lm(monkeypatch):
    import sae.tokens

    monkeypatch.setattr(sae.tokens, "prefix_id", lambda tokenizer, override=None: 0)
    return SpellingLM()


def run(lm, sae, tmp_path, shared=None):
    subject = SAESubject(sae, info(lm, "layers.1", "letters", d_in=D, d_sae=26))
    subject.info.__dict__["lm_revision"] = "r"
    return PLUGIN.run(context(lm, "layers.1", None, subject, tmp_path, shared))  # type: ignore[arg-type]


def test_the_whole_evaluation_on_a_model_that_spells(spelling_lm, tmp_path):
    shared = {}
    rows = {r.metric: r for r in run(spelling_lm, LetterSAE(spelling_lm), tmp_path, shared).rows if r.slice == ""}
    spelling = open_spelling(build_spelling(tmp_path, spelling_lm, "layers.1", PLUGIN.spelling("tiny")))
    tested = set(spelling.letter_N[spelling.test_N])
    assert rows["n_letters"].value == len(tested) >= 20 and rows["main_f1"].value == rows["n_split"].value == 1
    assert rows["absorption_fraction"].value == 0 and rows["absorption_full"].value == 0
    passes = spelling_lm.n_forwards
    again = run(spelling_lm, LetterSAE(spelling_lm), tmp_path)
    assert spelling_lm.n_forwards == passes  # words are read once for all subjects
    assert {r.metric: r.value for r in again.rows if r.slice == ""} == {m: r.value for m, r in rows.items()}


def test_rows_of_a_foreign_sae_name_the_model_that_read_the_words(spelling_lm, tmp_path):
    """Its file says no model; measured on two models of one width, it must not find the rows of the first again."""
    from dataclasses import replace

    def inputs(revision, known):
        subject = SAESubject(LetterSAE(spelling_lm), info(spelling_lm, "layers.1", "letters", d_in=D, d_sae=26))
        subject.info = replace(subject.info, lm_revision=known)
        spelling_lm.revision = revision
        return PLUGIN.inputs(context(spelling_lm, "layers.1", None, subject, tmp_path))

    assert inputs("one", "unknown")["lm"] == "one" and inputs("two", "unknown")["lm"] == "two"
    assert inputs("two", "told")["lm"] == "told"


def test_latents_that_carry_no_letter_absorb_nothing_and_say_so(spelling_lm, tmp_path):
    rows = {r.metric: r for r in run(spelling_lm, LetterSAE(spelling_lm, good=False), tmp_path).rows if r.slice == ""}
    assert rows["main_f1"].value < 0.5
    assert rows["absorption_fraction"].failure == "gate_failed" and rows["absorption_full"].failure == "gate_failed"
