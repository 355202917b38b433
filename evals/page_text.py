"""Token text made safe to look at, windows and tables as data for the scripts. Torch-free.

Everything that leaves this module is plain text, which the templates escape, or JSON
that holds no markup. W tokens per window.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from sae.manifest import sha256_text

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
_NAMED = {
    "\n": "⏎",
    "\r": "␍",
    "\t": "⇥",
    "\u200e": "⟨LRM⟩",
    "\u200f": "⟨RLM⟩",
    "\u061c": "⟨ALM⟩",
    "\u202a": "⟨LRE⟩",
    "\u202b": "⟨RLE⟩",
    "\u202c": "⟨PDF⟩",
    "\u202d": "⟨LRO⟩",
    "\u202e": "⟨RLO⟩",
    "\u2066": "⟨LRI⟩",
    "\u2067": "⟨RLI⟩",
    "\u2068": "⟨FSI⟩",
    "\u2069": "⟨PDI⟩",
    "\u200b": "⟨ZWSP⟩",
    "\ufeff": "⟨BOM⟩",
    "\u2028": "⏎",
    "\u2029": "⏎",
    "\x7f": "␡",
}


def visible(text: str) -> str:
    """Text in which no character hides or reorders others.

    Line breaks, tabs, controls and direction marks become symbols; a half of a surrogate pair becomes U+FFFD, as it
    cannot be written as UTF-8. Right-to-left letters stay as they are.
    """
    if text.isascii() and text.isprintable():  # nearly every token of an English text
        return text
    return _token_shown(text) if len(text) <= 32 else _shown(text)


def _shown(text: str) -> str:
    out = []
    for char in text:
        code = ord(char)
        if char in _NAMED:
            out.append(_NAMED[char])
        elif code < 0x20:
            out.append(chr(0x2400 + code))
        elif 0xD800 <= code <= 0xDFFF:
            out.append("\ufffd")
        elif unicodedata.category(char) in ("Cc", "Cn"):
            out.append(f"⟨U+{code:04X}⟩")
        else:
            out.append(char)
    return "".join(out)


_token_shown = lru_cache(maxsize=2**16)(_shown)
"""Tokens come again and again; longer texts do not and are not kept."""


def window_tokens(
    tokens: Sequence[str], acts: Sequence[float], *, merge: bool = True, peak: int = -1
) -> list[str | list[Any]]:
    """One window [W] as latent.js draws it: a silent token is its text, an active one ``[text, activation, is peak]``.

    Activations have three significant digits; NaN and values <= 0 are silence. ``merge`` joins silent neighbours, which
    keeps a page light; simulated windows are not merged, since their values count tokens.
    """
    out: list[str | list[Any]] = []
    known = len(acts)
    for i, token in enumerate(tokens):
        act = float(acts[i]) if i < known else 0.0
        if 0 < act < math.inf:  # false for NaN too
            out.append([visible(token), float(f"{act:.3g}"), int(i == peak)])
        elif merge and out and isinstance(out[-1], str):
            out[-1] += visible(token)
        else:
            out.append(visible(token))
    return out


def simulated_percent(values: Sequence[float]) -> list[int]:
    """Simulated activations [W], on any scale >= 0, in per cent of their own top or of 1, whichever is larger."""
    top = max([1.0, *map(float, values)])
    return [round(100 * min(1.0, max(0.0, float(v)) / top)) for v in values]


def data_block(value: Any) -> Markup:
    """A value as JSON for a ``<script type="application/json">``: nothing in it can end the element or be markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)  # noqa: S704


def number(value: float | None, digits: int = 3) -> str:
    """As a page shows it: fixed digits (two significant ones where only zeros would show), a real minus sign."""
    if value is None:
        return ""
    text = f"{value:.1e}" if value != 0 and abs(value) < 0.5 * 10**-digits else f"{value:.{digits}f}"
    return text.replace("-", "\u2212", 1) if text.startswith("-") else text


def sort_key(value: float | None) -> str:
    """What a table sorts by: six significant digits; "" for a gap."""
    return "" if value is None else f"{value:.6g}"


def percent(value: float) -> str:
    """A share as per cent with two significant digits."""
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.3g} %"


def slug(name: str) -> str:
    """A file name for an sae_id: itself where harmless, else its harmless letters and a hash."""
    if _SAFE.fullmatch(name) and not name.endswith("."):
        return name
    kept = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60]
    return f"{kept or 'sae'}-{sha256_text(name)[:8]}"


def visible_lines(text: str) -> str:
    """:func:`visible`, line breaks kept: for preformatted blocks."""
    return "\n".join(visible(line) for line in text.split("\n"))


def config_text(config: Mapping[str, Any]) -> str:
    """A configuration as indented JSON; "" for none."""
    return visible_lines(json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False)) if config else ""
