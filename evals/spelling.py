"""Words of one token, a prompt that spells for each, and the activations there: the first-letter task (METRICS I).

Artefact ``spelling/<key>/``: ``acts.npy`` float32 [N, D] at the token of the word asked for, ``words.parquet`` (word,
letter 0 = a … 25 = z, test). N words, D = width of the hookpoint. Nothing depends on the SAE.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae.config import require, to_dict
from sae.errors import DataError
from sae.manifest import artefact_dir, hash64, is_complete, key_of, rng, sha256_text, writing

if TYPE_CHECKING:
    from sae.language_model import LanguageModel

KIND = "spelling"
STAGE_VERSION = 1
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = "{word} has the first letter: {letter}"
_WORD = re.compile(r" [a-z]{3,}")


@dataclass(kw_only=True, frozen=True)
class SpellingConfig:
    """How many words, and how they are asked for."""

    words_per_letter: int | None = None
    """At most so many words of each first letter, by rising hash; None = all the vocabulary has."""
    examples: int = 10
    """Solved lines before the word that is asked for."""
    test_percent: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.words_per_letter is None or self.words_per_letter >= 5, "words_per_letter must be at least 5")
        require(self.examples >= 1, "examples must be at least 1")
        require(0 < self.test_percent < 100, "test_percent must lie between 0 and 100")


class Words(NamedTuple):
    """The words of one tokenizer, in alphabetical order."""

    word: list[str]
    letter_N: np.ndarray
    """0 = a … 25 = z."""
    test_N: np.ndarray
    """bool; the side is a function of (seed, word) alone."""


class Spelling(NamedTuple):
    """What the evaluation reads."""

    x_ND: np.ndarray
    letter_N: np.ndarray
    test_N: np.ndarray
    words: list[str]


def vocabulary_words(vocabulary: Mapping[str, int], decode: Any, cfg: SpellingConfig) -> Words:
    """Lower-case words of at least three ASCII letters that are one token with the space before them.

    ``decode``: token id -> text. A token with capitals is another token than its lower-case form, so it is left out
    rather than lower-cased.
    """
    found = {text[1:] for text in map(decode, vocabulary.values()) if _WORD.fullmatch(text)}
    by_letter: dict[str, list[str]] = {letter: [] for letter in LETTERS}
    for word in sorted(found):
        by_letter[word[0]].append(word)
    chosen = sorted(
        word for words in by_letter.values()
        for word in sorted(words, key=lambda w: (hash64(f"{cfg.seed}|{w}"), w))[: cfg.words_per_letter]
    )  # fmt: skip
    letters = np.array([LETTERS.index(word[0]) for word in chosen], dtype=np.int64)
    test = np.array([hash64(f"{cfg.seed}|side|{word}") % 100 < cfg.test_percent for word in chosen], dtype=bool)
    return Words(chosen, letters, test)


def prompt(word: str, examples: list[str]) -> str:
    """Solved lines, then the word alone: every word has a space before it, so that it is the vocabulary's token."""
    lines = [" " + TEMPLATE.format(word=e, letter=e[0].upper()) for e in examples]
    return "\n".join([*lines, f" {word}"])


def prompts(words: Words, cfg: SpellingConfig) -> list[str]:
    """One per word; its examples are train words other than itself, a function of (seed, word)."""
    train = [word for word, test in zip(words.word, words.test_N, strict=True) if not test]
    if len(train) <= cfg.examples:
        return []
    made = []
    for word in words.word:
        drawn = rng(cfg.seed, "spelling", word).permutation(len(train))[: cfg.examples + 1]
        made.append(prompt(word, [train[i] for i in drawn if train[i] != word][: cfg.examples]))
    return made


def build_spelling(root: Path, lm: "LanguageModel", hookpoint: str, cfg: SpellingConfig) -> Path:
    """Folder of the artefact; one pass over all prompts unless it is complete.

    A prompt whose last token is not the word's own (a tokenizer that joins over the line) is dropped and counted.
    DataError for NaN or infinite activations.
    """
    import pandas as pd

    from evals.probe_activations import last_token_activations
    from sae.tokens import CHOSEN_PREFIX, prefix_id

    tokenizer = lm.tokenizer
    vocabulary = tokenizer.get_vocab()
    config = {**to_dict(cfg), "hookpoint": hookpoint, "dtype": str(lm.dtype)}
    if hasattr(tokenizer, CHOSEN_PREFIX):  # the tokenizer's own needs no mention
        config["prefix_id"] = prefix_id(tokenizer)
    identity = sha256_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    key = key_of(KIND, STAGE_VERSION, config, {"lm": lm.revision, "vocabulary": identity})
    folder = artefact_dir(root, KIND, key)
    if is_complete(folder):
        return folder
    words = vocabulary_words(vocabulary, lambda i: tokenizer.decode([i]), cfg)
    asked = prompts(words, cfg)
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"] if asked else []
    whole = [len(tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) == 1 for w in words.word]
    good = [i for i, tokens in enumerate(ids) if whole[i] and tokenizer.decode(tokens[-1:]) == f" {words.word[i]}"]
    prefix = prefix_id(tokenizer)
    rows = [[prefix, *ids[i]] for i in good]
    inputs = {"lm": lm.revision, "vocabulary": identity}
    with writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as out:
        x_ND = last_token_activations(lm, hookpoint, rows) if rows else np.zeros((0, lm.check_hookpoint(hookpoint)))
        if not np.isfinite(x_ND).all():
            raise DataError(f"{lm.name} gives NaN or infinite activations at {hookpoint} for a spelling prompt")
        np.save(out.path / "acts.npy", x_ND.astype(np.float32))
        pd.DataFrame({
            "word": [words.word[i] for i in good], "letter": words.letter_N[good], "test": words.test_N[good],
        }).to_parquet(out.path / "words.parquet", index=False)
        out.counts.update({"n_words": len(good), "n_dropped": len(words.word) - len(good),
                           "n_tokens": sum(map(len, rows)), "dtype": str(lm.dtype)})
    return folder


def open_spelling(folder: Path) -> Spelling:
    """Read what :func:`build_spelling` wrote."""
    import pandas as pd

    table = pd.read_parquet(folder / "words.parquet")
    return Spelling(np.load(folder / "acts.npy"), table["letter"].to_numpy(), table["test"].to_numpy(dtype=bool),
                    list(table["word"]))
