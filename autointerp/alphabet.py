"""The ten digits as a tokenizer writes them, checked before a digit's probability is read as a strength. Torch-free."""

from dataclasses import dataclass
from typing import Any

from sae.errors import Unsupported

DIGITS = "0123456789"
SEPARATORS = ("\t", " = ", ": ")
SLOT, NEW_LINE = "?", "\n"
_PROBE = "a"
"""Something to stand before a separator: tokenizers may treat the start of a text apart."""


@dataclass(frozen=True)
class Alphabet:
    """Token ids from which slots are assembled."""

    digits: tuple[int, ...]
    """Ids of 0 to 9, one each."""
    separator: tuple[int, ...]
    slot: tuple[int, ...]
    new_line: tuple[int, ...]
    separator_text: str


def verify_alphabet(tokenizer: Any) -> Alphabet:
    """The alphabet in the first separator that works (tab, " = ", ": ").

    Each digit must be one id, all ten distinct; separator, slot and line break must be non-empty and read back as
    written, one after another. Raises :class:`Unsupported` if no separator does, before anything is spent. ("10" is two
    tokens in many tokenizers, so strengths end at 9; some encode a tab to nothing.)
    """
    reasons = []
    for separator in SEPARATORS:
        found = _with_separator(tokenizer, separator)
        if isinstance(found, Alphabet):
            return found
        reasons.append(f"{separator!r}: {found}")
    raise Unsupported(
        "all_at_once needs a tokenizer that writes each digit as one token after a separator; "
        f"this one does not ({'; '.join(reasons)}); use another simulator or model"
    )


def verify_spelled(tokenizer: Any, user: str) -> None:
    """Each digit must be one token of its own, alone or behind a blank, before its probability as a reply is asked for.

    Raises :class:`Unsupported`, naming ``user``; says nothing where the tokenizer is not known (None).
    """
    if tokenizer is None:
        return
    ids: dict[int, str] = {}
    for digit in DIGITS:
        spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (digit, f" {digit}")]
        found = {int(s[0]) for s in spelled if len(s) == 1}
        clash = sorted({ids[i] for i in found & ids.keys()})
        if not found or clash:
            why = f"the same token as {clash[0]!r}" if clash else "no token of its own"
            raise Unsupported(
                f"{user!r} needs a tokenizer that writes each digit as one token; in this one {digit!r} is {why}; use "
                "another simulator or model"
            )
        ids |= dict.fromkeys(found, digit)


def _with_separator(tokenizer: Any, separator: str) -> Alphabet | str:
    """The alphabet, or why this separator does not work."""
    encode = lambda text: [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]  # noqa: E731
    probe, before = encode(_PROBE), encode(_PROBE + separator)
    if before[: len(probe)] != probe or len(before) == len(probe):
        return "encodes to nothing or into its neighbour"
    after = {}
    for mark in (*DIGITS, SLOT):
        ids = encode(_PROBE + separator + mark)
        if ids[: len(before)] != before or len(ids) == len(before):
            return f"merges with {mark!r}"
        after[mark] = ids[len(before) :]
    if any(len(after[d]) != 1 for d in DIGITS) or len({after[d][0] for d in DIGITS}) != len(DIGITS):
        return "a digit is not one token of its own"
    ended = encode(_PROBE + separator + DIGITS[0] + NEW_LINE)
    new_line = ended[len(before) + 1 :]
    if ended[: len(before) + 1] != [*before, after[DIGITS[0]][0]] or not new_line:
        return "a line break encodes to nothing or into the digit"
    for mark in (*DIGITS, SLOT):
        read = str(tokenizer.decode([*before, *after[mark], *new_line, *probe]))
        # Sentence-piece tokenizers decode a leading blank or drop it; that is no matter here.
        if read.strip() != _PROBE + separator + mark + NEW_LINE + str(tokenizer.decode(probe)).strip():
            return f"reads back as {read!r}"
    return Alphabet(
        digits=tuple(after[d][0] for d in DIGITS),
        separator=tuple(before[len(probe) :]),
        slot=tuple(after[SLOT]),
        new_line=tuple(new_line),
        separator_text=separator,
    )
