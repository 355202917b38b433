"""Documents that share text with prompts on which SAEs will be tested are kept out of the text (DATA 4 rule 3, DATA 7).

The default mix is free of the built-in probe tasks by its own rules (:mod:`sae.default_mix`); other texts, and own
tasks, come through here. Torch-free.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from sae import assets
from sae.default_mix import WORD, default_rows, mix_key, runs_of_words, text_key
from sae.manifest import is_complete, key_of, writing
from sae.texts import Document

RUN_WORDS = 10
"""A document that has so many words in a row with a prompt is kept out; a shorter prompt counts as a whole."""
VERSION = 1
BATCH, BATCH_CHARACTERS = 512, 4_000_000
"""Documents looked at together: so many, or of so many characters (books). A word takes about 100 bytes meanwhile."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


def hashed_runs(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hashes, index of the text) of all runs of RUN_WORDS words; case, form and spaces do not count."""
    return runs_of_words([WORD.findall(text_key(text)) for text in texts], RUN_WORDS)


@dataclass
class KeptOut:
    """The prompts of some tasks, by the hashes of their runs of words."""

    name: dict[str, str]
    """What the prompts are, for keys: hashes of their files and of the rules by which they are made."""
    prompts: Callable[[], Iterable[str]]
    """All of them; asked for when a text is first read."""
    n_dropped: int = field(default=0, init=False)
    """Documents kept out so far."""

    @property
    def key(self) -> str:
        return key_of("kept_out", VERSION, {"words": RUN_WORDS}, self.name)

    @cached_property
    def runs(self) -> np.ndarray:
        """Sorted distinct hashes, uint64."""
        parts = [np.unique(hashed_runs(batch)[0]) for batch in _batches(self.prompts(), len)]
        return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)

    def shared(self, texts: list[str]) -> np.ndarray:
        """bool per text: does it share a run of words with a prompt?"""
        dirty = np.zeros(len(texts), dtype=bool)
        hashes, text_of = hashed_runs(texts)
        if len(self.runs) and len(hashes):
            at = np.minimum(np.searchsorted(self.runs, hashes), len(self.runs) - 1)
            dirty[text_of[self.runs[at] == hashes]] = True
        return dirty

    def clean(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents without those that share text with a prompt, which are counted."""
        for batch in _batches(documents, lambda document: len(document.text)):
            dirty = self.shared([d.text for d in batch])
            self.n_dropped += int(dirty.sum())
            yield from (d for d, bad in zip(batch, dirty, strict=True) if not bad)

    def touches_default(self) -> bool:
        """Does any document of the default mix share text with a prompt? Looked up once per machine, in seconds: where
        none does, the text, and all that was made of it, stays as it is without these tasks."""
        key = key_of("kept_out_default", VERSION, {}, {"kept_out": self.key, "mix": mix_key()})
        folder = assets.cache_dir() / "derived" / f"kept_out_default-{key}"
        if not is_complete(folder):
            logger.info("looking for the prompts of own tasks in the default text")
            texts = _batches((row.text for row in default_rows()), len)
            found = sum(int(self.shared(batch).sum()) for batch in texts)
            with writing(folder, kind="kept_out_default", key=key, stage_version=VERSION, config={}) as out:
                (out.path / "shared.txt").write_text(f"{found}\n")
        return int((folder / "shared.txt").read_text()) > 0


def _batches(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    batch: list[T] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += length(item)
        if len(batch) >= BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
