"""Late interaction: parts of a text, values by hand, and every text embedded once and in large batches."""

from dataclasses import replace

import numpy as np
from judges import TOKENIZER, explanation, windows

from autointerp.choose import select
from autointerp.interfaces import ExplainContext
from autointerp.phrases import DECIMALS, PhraseJudge, phrases
from autointerp.texts import Decoder, spelling
from sae.manifest import hash64


class Counting:
    """Unit vectors from a hash; remembers which new texts came in which call, as the real one does."""

    name = "counting"

    def __init__(self) -> None:
        self.known: dict[str, np.ndarray] = {}
        self.batches: list[list[str]] = []

    def embed(self, texts) -> np.ndarray:
        new = sorted(set(texts) - self.known.keys())
        if new:
            self.batches.append(new)
        for text in new:
            row = np.random.default_rng(hash64(text)).standard_normal(8)
            self.known[text] = (row / np.linalg.norm(row)).astype(np.float32)
        return np.stack([self.known[t] for t in texts]) if texts else np.zeros((0, 8), dtype=np.float32)


def test_a_list_has_parts_and_a_sentence_is_one() -> None:
    assert phrases("words such as run, full stop . or comma ,") == ("run", "full stop .", "comma ,")
    assert phrases("the start of a sentence") == ("the start of a sentence",)
    assert phrases("words such as ") == ("words such as",) and phrases("") == ("",)


def test_values_are_the_mean_over_phrases_of_the_best_word() -> None:
    shown, text = windows(0, "score", 6), "words such as run, the sea"
    judge = PhraseJudge(Counting(), Decoder(TOKENIZER))
    by_hand, decoder, embed = [], Decoder(TOKENIZER), Counting().embed
    for window in shown:
        words = sorted({spelling(w) for w in decoder.words(window.token_ids)})
        cosines = embed(words) @ embed(["run", "the sea"]).T
        by_hand.append(round(float(cosines.max(0).mean()), DECIMALS))
    assert len(set(by_hand)) > 3
    assert judge.values(text, shown[:4]) == by_hand[:4]  # nothing was prepared
    assert judge.values(text, shown[::-1]) == by_hand[::-1]  # some windows are known, some are not
    nothing = replace(shown[0], exemplar_id="nothing", token_ids=())
    assert judge.values("", [nothing]) == [1.0]  # no word and no phrase: both are the empty text


def test_a_choice_embeds_all_texts_and_words_together() -> None:
    found = {}
    for latent in (0, 1, 2):
        texts = (f"word {latent}", "words such as run, the sea", f"the number {latent}")
        found[latent] = [
            replace(explanation(latent, text), explanation_id=f"s/{latent}/t/{c}", candidate=c, selected=False)
            for c, text in enumerate(texts)
        ]

    class Table:
        def scored(self, latent: int, split: str):
            return windows(latent, split, 10)

    embedder = Counting()
    ctx = ExplainContext(embedder=embedder, tokenizer=TOKENIZER)
    chosen = select(found, Table(), ctx, prompted=False).explanations
    assert len(embedder.batches) == 1
    assert [sum(e.selected for e in chosen if e.latent == n) for n in found] == [1, 1, 1]
    for latent in found:
        shown = windows(latent, "calibrate", 10)
        values = PhraseJudge(embedder, Decoder(TOKENIZER)).values(found[latent][0].text, shown)
        positive = [v for v, w in zip(values, shown, strict=True) if w.positive]
        silent = [v for v, w in zip(values, shown, strict=True) if not w.positive]
        wins = np.mean([(p > n) + (p == n) / 2 for p in positive for n in silent])
        (first,) = [e for e in chosen if e.explanation_id == f"s/{latent}/t/0"]
        assert first.calibrate_score == wins
