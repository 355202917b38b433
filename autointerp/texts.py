"""Windows as people and judges read them: decoded text, words with their tokens, and what a latent's words are.

W tokens per window. Torch-free: a tokenizer is anything with ``decode(list of ids) -> str``.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from autointerp.records import Exemplar, LatentView
from sae.manifest import hash64

ACTIVE_SHARE = 0.3
"""A token counts as marked from this share of its window's peak (AUTOINTERP 3)."""
MAX_LISTED_WORDS = 8
BEFORE_SHARE = 0.4
"""A word just before the peak is named if it precedes at least this share of the peaks."""
INVISIBLE = {"\n": "line break", "\t": "tab", " ": "space", "": "space", "\r": "line break"}
MARK_NAMES = {
    ".": "full stop", ",": "comma", ";": "semicolon", ":": "colon", "?": "question mark", "!": "exclamation mark",
    "(": "opening bracket", ")": "closing bracket", "[": "opening square bracket", "]": "closing square bracket",
    "{": "opening brace", "}": "closing brace", '"': "quotation mark", "'": "apostrophe", "-": "hyphen",
    "/": "slash", "=": "equals sign", "_": "underscore", "#": "hash sign", "@": "at sign", "%": "percent sign",
    "$": "dollar sign", "&": "ampersand", "*": "asterisk", "+": "plus sign", "<": "less-than sign",
    ">": "greater-than sign",
}  # fmt: skip

PMI_NO_TEXT = "A label for a text:"
"""Prompt for the probability of a label by itself."""


def pmi_prompt(window: str) -> str:
    """What a label follows when its likelihood is asked for: the window, then a few words that call for a label."""
    return f"{window}\n\nA label for the text above:"


def pmi_continuation(label: str) -> str:
    """A label as it continues such a prompt."""
    return f" {label}"


class Word(NamedTuple):
    """A run of tokens that reads as one word or mark."""

    text: str
    """Without surrounding blanks; an invisible one by its name."""
    first: int
    """Index of its first token in the window."""
    last: int
    """Index of its last token, inclusive."""


class Decoder:
    """A tokenizer with a memory of tokens and words. Specials are decoded like any other token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self._runs: dict[tuple[int, ...], str] = {}

    def piece(self, token_id: int) -> str:
        """Text of one token, its leading blank included; half a character comes out as U+FFFD."""
        if token_id not in self._pieces:
            self._pieces[token_id] = self.tokenizer.decode([token_id])
        return self._pieces[token_id]

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of a run of tokens, decoded together so that characters split over tokens are whole."""
        return str(self.tokenizer.decode(list(token_ids)))

    def _word(self, token_ids: tuple[int, ...]) -> str:
        """Text of a word; the words of a corpus repeat, and a call of the tokenizer costs more than all else here."""
        if len(token_ids) == 1:
            return self.piece(token_ids[0])
        if token_ids not in self._runs:
            self._runs[token_ids] = self.text(token_ids)
        return self._runs[token_ids]

    def window(self, exemplar: Exemplar) -> str:
        """Text of the exemplar, blanks at its ends removed."""
        return self.text(exemplar.token_ids).strip()

    def words(self, token_ids: Sequence[int]) -> list[Word]:
        """The words of a window, in order, covering every token once.

        A word goes on while letters or digits touch: "un" + "likely" is one word, " 3" + ")" are two.
        """
        pieces = [self.piece(t) for t in token_ids]
        if not pieces:
            return []
        starts = [0]
        for i in range(1, len(pieces)):
            before, here = pieces[i - 1][-1:], pieces[i][:1]
            if not (_joins(before) and _joins(here)):
                starts.append(i)
        out = []
        for first, after in zip(starts, [*starts[1:], len(pieces)], strict=True):
            out.append(Word(readable(self._word(tuple(token_ids[first:after]))), first, after - 1))
        return out

    def around(self, exemplar: Exemplar, n_tokens: int) -> str:
        """Text of at most ``n_tokens`` tokens around the peak (three quarters before it); a silent window's middle."""
        ids = exemplar.token_ids
        peak = exemplar.peak if exemplar.peak >= 0 else len(ids) // 2
        start = max(0, min(peak - (3 * n_tokens) // 4, len(ids) - n_tokens))
        return self.text(ids[start : start + n_tokens]).strip()


def deal(positives: Sequence[Exemplar], n: int | None = None) -> list[Exemplar]:
    """``n`` windows (all by default) dealt round the quantile groups: one of each, weakest group first, then a second
    of each, ... A last turn that not every group can have goes to groups evenly spaced from the weakest to the
    strongest, so that a judge of few windows still meets every strength. Inside a group: :func:`any_of`."""
    by_group: dict[int, list[Exemplar]] = defaultdict(list)
    for exemplar in positives:
        by_group[exemplar.group].append(exemplar)
    groups = [any_of(members, len(members)) for _, members in sorted(by_group.items())]
    dealt: list[Exemplar] = []
    for t in range(max(map(len, groups), default=0)):
        turn = [members[t] for members in groups if t < len(members)]
        room = len(turn) if n is None else min(n - len(dealt), len(turn))
        dealt += [turn[(2 * k + 1) * len(turn) // (2 * room)] for k in range(room)]
    return dealt


def any_of(exemplars: Sequence[Exemplar], n: int) -> list[Exemplar]:
    """At most ``n`` windows, uniformly: in the order of a hash. Tables hold them in the order of the text, and the
    first ones of a folder of files are all from its first files."""
    return sorted(exemplars, key=lambda e: (hash64(e.exemplar_id), e.exemplar_id))[:n]


def _joins(character: str) -> bool:
    return character.isalnum() or character == "\ufffd"


def readable(raw: str) -> str:
    """A word without its blanks; a blank by its name."""
    stripped = raw.strip()
    return stripped or INVISIBLE.get(raw.strip(" ")[:1], "space")


def named(word: str) -> str:
    """A mark together with its name, since an embedding knows the name better than the mark: '?' (question mark)."""
    return f"{MARK_NAMES[word]} {word}" if word in MARK_NAMES else word


def spelling(word: Word) -> str:
    """A word as it is embedded: without case, since the sentence model has none; a mark with its name."""
    return named(word.text.casefold())


def peak_word(decoder: Decoder, exemplar: Exemplar) -> tuple[str, str]:
    """(the word that holds the peak, the word before it or ""); ("", "") for a silent window. Spaces between words are
    no words here."""
    if exemplar.peak < 0:
        return "", ""
    words = [
        w
        for w in decoder.words(exemplar.token_ids)
        if w.text != INVISIBLE[" "] or w.first <= exemplar.peak <= w.last
    ]
    at = next(i for i, w in enumerate(words) if w.first <= exemplar.peak <= w.last)
    return words[at].text, words[at - 1].text if at else ""


def marked_words(decoder: Decoder, view: LatentView) -> list[tuple[str, float]]:
    """Words that carry the latent in the view's positive windows with their weight, heaviest first.

    A word's weight is the sum over windows of its largest activation there, in units of the latent's maximum; words are
    told apart without case, and spelt as where they were strongest. Tokens below 0.3 of the window's peak do not count.
    """
    weight: dict[str, float] = defaultdict(float)
    spelling: dict[str, tuple[float, str]] = {}
    for exemplar in view.exemplars:
        if not exemplar.positive or exemplar.peak < 0:
            continue
        cut = ACTIVE_SHARE * max(exemplar.acts)
        best: dict[str, float] = {}
        for word in decoder.words(exemplar.token_ids):
            act = max(exemplar.acts[word.first : word.last + 1])
            if act < cut or act <= 0:
                continue
            key = word.text.casefold()
            best[key] = max(best.get(key, 0.0), act / max(view.max_act, 1e-9))
            spelling[key] = max(spelling.get(key, (0.0, "")), (act, word.text))
        for key, act in best.items():
            weight[key] += act
    ranked = sorted(weight, key=lambda key: (-weight[key], key))
    return [(spelling[key][1], weight[key]) for key in ranked]


def words_before(decoder: Decoder, view: LatentView) -> list[str]:
    """Words that precede at least 40 % of the peaks (at most two), most frequent first."""
    before: dict[str, int] = defaultdict(int)
    n = 0
    for exemplar in view.exemplars:
        if exemplar.positive and exemplar.peak >= 0:
            n += 1
            left = peak_word(decoder, exemplar)[1].casefold()
            if left:
                before[left] += 1
    frequent = [w for w, count in before.items() if count >= max(2, BEFORE_SHARE * n)]
    return sorted(frequent, key=lambda w: (-before[w], w))[:2]


def list_text(decoder: Decoder, view: LatentView, max_words: int = MAX_LISTED_WORDS) -> str | None:
    """The deterministic description: the words a latent marks, and what stands before them. None without any word.

    Words lighter than a tenth of the heaviest are left out: they are accidents of one window.
    """
    ranked = marked_words(decoder, view)
    if not ranked:
        return None
    heaviest = ranked[0][1]
    listed = [named(word) for word, weight in ranked if weight >= 0.1 * heaviest][:max_words]
    text = ("the word " if len(listed) == 1 else "words such as ") + ", ".join(listed)
    before = words_before(decoder, view)
    return text + (f", after {' or '.join(named(w) for w in before)}" if before else "")
