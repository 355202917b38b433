"""Token text made safe to look at, and windows cut into shaded segments. Torch-free.

Everything that leaves this module is plain text: the templates escape it. W tokens per window.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae.manifest import sha256_text

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
LEVELS = 20
"""Shades; tokens of one shade in a row of silent ones are merged, which keeps a page light."""
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


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A token, or several silent ones in a row."""

    text: str
    shade: float = 0.0
    """Activation over the latent's maximum, 0 to 1, in LEVELS steps."""
    value: str = ""
    """Activation in the LM's units; "" for silent tokens."""
    simulated: float | None = None
    """Simulated activation, 0 to 1."""
    peak: bool = False

    @property
    def plain(self) -> bool:
        """Nothing to draw."""
        return self.shade == 0 and not self.simulated


def _step(share: float) -> float:
    """Rounded up to a level, so that the weakest activation still shows."""
    if not math.isfinite(share) or share <= 0:
        return 0.0
    return min(1.0, math.ceil(share * LEVELS) / LEVELS)


def _guess(share: float, active: bool) -> float:
    """Simulated share of the top: two digits under an active token, steps of a tenth elsewhere."""
    return round(min(1.0, max(0.0, float(share))), 2 if active else 1)


def segments(
    tokens: Sequence[str],
    acts: Sequence[float],
    max_act: float,
    *,
    simulated: Sequence[float] | None = None,
    peak: int = -1,
) -> list[Segment]:
    """One window as segments. ``simulated``: W values on any scale >= 0, shown over their own top or 1."""
    top = max([*simulated, 1e-12]) if simulated else 1.0
    top = top if top > 1.0 else 1.0
    out: list[Segment] = []
    for i, token in enumerate(tokens):
        act = float(acts[i]) if i < len(acts) else 0.0
        shade = _step(act / max_act) if max_act > 0 else 0.0
        guess = _guess(simulated[i] / top, shade > 0) if simulated and i < len(simulated) else None
        piece = Segment(
            text=visible(token),
            shade=shade,
            value=f"{act:.3g}" if shade else "",
            simulated=guess,
            peak=i == peak and shade > 0,
        )
        if out and not piece.shade and not out[-1].shade and piece.simulated == out[-1].simulated:
            out[-1] = Segment(text=out[-1].text + piece.text, simulated=piece.simulated)
        else:
            out.append(piece)
    return out


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
