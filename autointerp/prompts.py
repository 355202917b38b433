"""Prompts are data: texts in ``prompt_texts/<name>.md``, windows rendered into them in one way. Torch-free.

A prompt file holds sections opened by a line ``<!-- role -->`` (``system``, ``user``, ``assistant``, or a name of the
file's own, e.g. ``reminder``). ``{{name}}`` is a hole. Fixed text comes first, then the explanation, then the item, so
that every engine's prefix cache works. What fills a hole is data: it is put in once and never read for holes again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from autointerp.llm_requests import Message
from autointerp.records import Exemplar
from autointerp.texts import ACTIVE_SHARE
from sae.errors import ConfigError, did_you_mean
from sae.manifest import sha256_text

MAX_STRENGTH = 9
CHAT_ROLES = ("system", "user", "assistant")
_SECTION = re.compile(r"^<!-- *([a-z_]+) *-->\n", re.M)
_HOLE = re.compile(r"\{\{([a-z_]+)\}\}")


class _Visible(dict[int, str]):
    """Table of :meth:`str.translate`: how a character is shown, found out when it first occurs."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = shown = char if char.isprintable() else f"\\x{code:02x}"
        return shown


_VISIBLE = _Visible({ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r"})
_ALONE: dict[int, tuple[Any, dict[int, str]]] = {}
"""Texts of single tokens by the tokenizer's identity (some have no hash); holding it keeps the number its own."""
TOKENIZERS_KEPT = 4


@dataclass(frozen=True)
class Prompt:
    """One file of ``prompt_texts``."""

    name: str
    sections: tuple[tuple[str, str], ...]
    """(role, text) in the order of the file."""
    sha256: str
    """Of the file's text; part of every record made with it."""

    def messages(self, **holes: str) -> tuple[Message, ...]:
        """The chat: all system, user and assistant sections, holes filled. :class:`ConfigError` for a hole without a
        value, or a value without a hole."""
        used: set[str] = set()
        out = tuple(
            Message(role=role, content=self._filled(text, holes, used))  # type: ignore[arg-type]
            for role, text in self.sections
            if role in CHAT_ROLES
        )
        if unused := sorted(set(holes) - used):
            raise ConfigError(f"prompt {self.name!r} has no hole {', '.join(unused)}")
        return out

    def section(self, role: str, **holes: str) -> str:
        """One section of the file's own, holes filled."""
        found = dict(self.sections)
        if role not in found:
            raise ConfigError(f"prompt {self.name!r} has no section {role!r}{did_you_mean(role, found)}")
        return self._filled(found[role], holes, set())

    def _filled(self, text: str, holes: dict[str, str], used: set[str]) -> str:
        def fill(match: re.Match[str]) -> str:
            if match[1] not in holes:
                raise ConfigError(f"prompt {self.name!r}: nothing was given for the hole {match[1]!r}")
            used.add(match[1])
            return holes[match[1]]

        return _HOLE.sub(fill, text)


@lru_cache(maxsize=64)
def load_prompt(name: str) -> Prompt:
    """The shipped prompt ``name``; :class:`ConfigError` with near names if there is none."""
    folder = resources.files("autointerp") / "prompt_texts"
    file = folder / f"{name}.md"
    if not file.is_file():
        known = [f.name.removesuffix(".md") for f in folder.iterdir() if f.name.endswith(".md")]
        raise ConfigError(f"there is no prompt {name!r}{did_you_mean(name, known)}")
    text = file.read_text(encoding="utf-8")
    parts = _SECTION.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise ConfigError(f"prompt {name!r}: expected sections opened by a line like '<!-- user -->'")
    sections = tuple((role, body.strip("\n")) for role, body in zip(parts[1::2], parts[2::2], strict=True))
    return Prompt(name, sections, sha256_text(text))


def escaped(text: str) -> str:
    """One visible line: line breaks and tabs as ``\\n``, ``\\t``, other control and separator characters as ``\\x..``.

    A window so written cannot open a line of its own, hence cannot pose as a number, a heading or an instruction block.
    """
    return text if text.isprintable() else text.translate(_VISIBLE)  # each costs a fiftieth of a walk over the text


def _alone(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Text of each token without the others."""
    held, texts = _ALONE.get(id(tokenizer), (None, {}))
    if held is not tokenizer:
        if len(_ALONE) >= TOKENIZERS_KEPT:
            _ALONE.clear()
        _ALONE[id(tokenizer)] = tokenizer, texts
    for i in token_ids:
        if i not in texts:
            texts[i] = str(tokenizer.decode([i]))
    return [texts[i] for i in token_ids]


def pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Text of each token such that the pieces joined are the text of all; half a character waits for its other half.

    Where the tokens' own texts already are such pieces (byte-level tokenizers, whole characters) the window is decoded
    once. Elsewhere (a leading space that only shows behind another token, half a character) every beginning of it is.
    """
    single = _alone(tokenizer, token_ids)
    joined = "".join(single)
    if "\ufffd" not in joined and joined == tokenizer.decode(list(token_ids)):
        return single
    return _by_beginnings(tokenizer, token_ids)


def _by_beginnings(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    out: list[str] = []
    before = ""
    for i in range(len(token_ids)):
        so_far = str(tokenizer.decode(list(token_ids[: i + 1])))
        if not so_far.startswith(before):  # a tokenizer that rewrites what it has said
            out.append(str(tokenizer.decode([token_ids[i]])))
            before = so_far
        elif so_far.endswith("\ufffd") and i + 1 < len(token_ids):
            out.append("")
        else:
            out.append(so_far[len(before) :])
            before = so_far
    return out


def whole_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[tuple[str, int]]:
    """(text, number of tokens) of each run of tokens that reads as whole characters; numbers sum to W."""
    out: list[tuple[str, int]] = []
    waiting = 0
    for piece in pieces(tokenizer, token_ids):
        waiting += 1
        if piece:
            out.append((piece, waiting))
            waiting = 0
    if waiting:  # specials at the end that decode to nothing
        out.append(("", waiting))
    return out


def window_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """A window as one line."""
    return escaped(str(tokenizer.decode(list(token_ids))).strip())


def numbered(lines: Sequence[str]) -> str:
    """``[1] first``, ``[2] second``, ...: one line each."""
    return "\n".join(f"[{i}] {line}" for i, line in enumerate(lines, 1))


def strength(act: float, largest: float) -> int:
    """1 to 9: ceil(9 act / largest); 0 for silence."""
    if act <= 0 or largest <= 0:
        return 0
    return max(1, min(MAX_STRENGTH, -int(-MAX_STRENGTH * act // largest)))


def marked_window(tokenizer: Any, exemplar: Exemplar, largest: float) -> str:
    """A window whose tokens at or above 0.3 of its peak stand in ``<<...>>``, the strengths behind it.

    Touching marked tokens share one pair of marks and show the larger strength. ``largest`` is the largest activation
    shown in the prompt. Marks in the text itself are broken up, so that only ours are whole.
    """
    text, runs = _with_marks(pieces(tokenizer, exemplar.token_ids), active_tokens(exemplar.acts))
    strengths = [
        f"{piece.strip() or repr(piece)}={strength(max(exemplar.acts[first:after]), largest)}"
        for piece, first, after in runs
    ]
    return f"{text}   ({', '.join(strengths)})" if strengths else text


def active_tokens(acts: Sequence[float]) -> tuple[bool, ...]:
    """Which tokens count as marked: those at or above 0.3 of the window's peak."""
    cut = ACTIVE_SHARE * max(acts, default=0.0)
    return tuple(act > 0 and act >= cut for act in acts)


def marked_text(tokenizer: Any, token_ids: Sequence[int], mask: Sequence[bool]) -> str:
    """A window with the given tokens in ``<<...>>``, one line. A marked part of a character marks all of it, so that
    every mask is visible whatever the text below it."""
    parts, marks = pieces(tokenizer, token_ids), list(mask)
    for i, part in enumerate(parts[:-1]):
        if marks[i] and not part:
            marks[i + 1] = True
    return _with_marks(parts, marks)[0]


def _with_marks(parts: Sequence[str], marks: Sequence[bool]) -> tuple[str, list[tuple[str, int, int]]]:
    """(text, [(marked text, first token, token after the last)])."""
    text, runs = "", []
    i = 0
    while i < len(parts):
        j = i
        while j < len(parts) and marks[j] == marks[i]:
            j += 1
        piece = _plain_marks(escaped("".join(parts[i:j])))
        if marks[i] and piece.strip():
            blank = piece[: len(piece) - len(piece.lstrip())]
            text += f"{blank}<<{piece.strip()}>>{piece[len(piece.rstrip()) :]}"
        else:
            text += f"<<{piece}>>" if marks[i] and piece else piece
        if marks[i] and piece:
            runs.append((piece, i, j))
        i = j
    return text.strip(), runs


def _plain_marks(text: str) -> str:
    return text.replace("<<", "< <").replace(">>", "> >")
