"""Activations on their way to the disk: whole shards outlive a killed or failed collecting.

They are written below ``<key>.run/`` and linked into the artefact at its end. N tokens of one shard, D channels.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sae.manifest import Writer

SHARD_TOKENS = 2**18
"""Tokens of a shard, or somewhat less: whole batches of rows."""


def shard_name(number: int) -> str:
    """File of a shard in a complete folder; the first has the name that single files had before there were shards."""
    return "acts_ND.bin" if number == 0 else f"acts_ND.{number}.bin"


def forget_shards(working: Path) -> None:
    """Remove what an earlier collecting left; the folder stays, for it may be locked."""
    for path in working.glob("*-*"):
        path.unlink(missing_ok=True)


@dataclass
class ShardFile:
    """One shard while it is written."""

    file: BinaryIO
    norms: list[np.ndarray] = field(default_factory=list)

    def add(self, content: bytes, norms: np.ndarray) -> None:
        """Some tokens: their activations and their norms, float32."""
        self.file.write(content)
        self.norms.append(norms)


@dataclass
class Shards:
    """Shards of one hookpoint; a shard is named after its rows of the token set, and whole once its norms are there."""

    hookpoint: str
    working: Path
    out: Writer
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Rows (begin, end) of the shards, in order."""

    def _paths(self, begin: int, end: int) -> tuple[Path, Path]:
        return self.working / f"acts-{begin}-{end}.bin", self.working / f"norms-{begin}-{end}.npy"

    def holds(self, begin: int, end: int) -> bool:
        """Whether the shard is there, from this call or from one before."""
        if (begin, end) not in self.spans:
            self.spans.append((begin, end))
        return all(path.is_file() for path in self._paths(begin, end))

    @contextmanager
    def writing(self, begin: int, end: int) -> Iterator[ShardFile]:
        """A new shard; it is there only once the block has ended well."""
        self.working.mkdir(parents=True, exist_ok=True)
        acts, norms = self._paths(begin, end)
        part = acts.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                shard = ShardFile(file)
                yield shard
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, acts)
            with open(part, "wb") as file:
                np.save(file, np.concatenate(shard.norms))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, norms)
        finally:
            part.unlink(missing_ok=True)

    def move(self) -> np.ndarray:
        """Put the shards into the artefact, without copying them; returns the norms, float32 [N]."""
        norms = []
        for number, span in enumerate(sorted(self.spans)):
            acts, saved = self._paths(*span)
            try:
                os.link(acts, self.out.path / shard_name(number))
            except OSError:  # a file system without links
                os.replace(acts, self.out.path / shard_name(number))
            norms.append(np.load(saved))
        return np.concatenate(norms)
