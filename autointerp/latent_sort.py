"""Bring the nonzero entries of one SAE on one split into latent order, in bounded memory (AUTOINTERP 1). Torch-free.

Entries arrive in token order. They gather in a buffer; a full buffer is sorted by latent (stable, so flat positions
stay ascending) and spilt as a run; at the end the runs, which follow one another in token order, are joined latent
by latent. F latents, n entries.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autointerp.windows import expand

BUFFER_ENTRIES = 8 << 20
"""Entries gathered before a sort: 12 bytes each, about 3x that while sorting."""
CHUNK_ENTRIES = 2 << 20
"""Entries joined and measured at a time."""
SMALLEST = 2.0**-24
"""Smallest positive float16: a nonzero activation never becomes zero."""


class Run(NamedTuple):
    """Entries in (latent, flat position) order."""

    ptr: NDArray[np.int64]
    """Offsets, [F + 1]."""
    flat: NDArray[np.uint32]
    value: NDArray[np.float32]


class Chunk(NamedTuple):
    """All entries of the latents ``first`` .. ``first + len(ptr) - 2``."""

    first: int
    ptr: NDArray[np.int64]
    """Offsets inside this chunk, beginning at 0."""
    flat: NDArray[np.uint32]
    value: NDArray[np.float32]

    @property
    def segment(self) -> NDArray[np.int64]:
        """Latent of each entry, counted from ``first``."""
        return np.repeat(np.arange(self.ptr.size - 1), np.diff(self.ptr))


class EntrySorter:
    """Collects the entries of one (SAE, split)."""

    def __init__(self, scratch: Path, d_sae: int, *, buffer_entries: int = BUFFER_ENTRIES) -> None:
        """``scratch`` is a folder for spilt runs; :meth:`close` removes what was put there."""
        self.scratch, self.d_sae, self.buffer_entries = Path(scratch), d_sae, buffer_entries
        self._latent_type = np.uint16 if d_sae <= 1 << 16 else np.uint32  # 16-bit keys are sorted by radix
        self._buffer: list[tuple[NDArray[np.uint32], NDArray[np.unsignedinteger], NDArray[np.float32]]] = []
        self.buffered = 0
        """Entries not sorted yet."""
        self._runs: list[Run | Path] = []  # a spilt one by its path: as many open files as runs would be too many
        self.counts_F = np.zeros(d_sae, dtype=np.int64)

    def add(self, flat: NDArray[np.integer], latent: NDArray[np.integer], value: NDArray[np.float32]) -> None:
        """Entries of the next tokens: positions ascending from call to call, values positive."""
        self._buffer.append(
            (flat.astype(np.uint32), latent.astype(self._latent_type), value.astype(np.float32, copy=False))
        )
        self.buffered += flat.size
        if self.buffered >= self.buffer_entries:
            self._spill(self._sort())

    def _sort(self) -> Run:
        flats, latents, values = ([b[i] for b in self._buffer] for i in range(3))
        self._buffer, self.buffered = [], 0
        latent = np.concatenate(latents) if latents else np.zeros(0, self._latent_type)
        del latents
        order = np.argsort(latent, kind="stable")
        counts = np.bincount(latent, minlength=self.d_sae)
        self.counts_F += counts
        flat = np.concatenate(flats)[order] if flats else np.zeros(0, np.uint32)
        value = np.concatenate(values)[order] if values else np.zeros(0, np.float32)
        return Run(np.concatenate([[0], np.cumsum(counts)]), flat, value)

    def _spill(self, run: Run) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        stem = self.scratch / f"run{len(self._runs)}"
        for name, array in run._asdict().items():
            np.save(f"{stem}.{name}.npy", array)
        self._runs.append(stem)

    def chunks(self, chunk_entries: int = CHUNK_ENTRIES) -> Iterator[Chunk]:
        """Everything that was added, in latent order; called once, after the last :meth:`add`."""
        self._runs.append(self._sort())
        total = np.concatenate([[0], np.cumsum(self.counts_F)])
        first = 0
        while first < self.d_sae:
            end = int(np.searchsorted(total, total[first] + chunk_entries, side="right")) - 1
            end = min(max(end, first + 1), self.d_sae)
            yield self._join(first, end, total)
            first = end

    def _join(self, first: int, end: int, total: NDArray[np.int64]) -> Chunk:
        ptr = total[first : end + 1] - total[first]
        flat = np.empty(int(ptr[-1]), dtype=np.uint32)
        value = np.empty(int(ptr[-1]), dtype=np.float32)
        filled = ptr[:-1].copy()
        for one in self._runs:
            run = one if isinstance(one, Run) else _opened(one)
            low, high = int(run.ptr[first]), int(run.ptr[end])
            counts = np.diff(run.ptr[first : end + 1])
            target = expand(filled, counts)
            flat[target] = run.flat[low:high]
            value[target] = run.value[low:high]
            filled += counts
        return Chunk(first, ptr, flat, value)

    def close(self) -> None:
        """Remove spilt runs."""
        self._runs = []
        for file in self.scratch.glob("run*.npy"):
            file.unlink()
        if self.scratch.is_dir():
            self.scratch.rmdir()


def _opened(stem: Path) -> Run:
    return Run(*(np.load(f"{stem}.{name}.npy", mmap_mode="r") for name in Run._fields))


class SplitFiles(NamedTuple):
    """Names of one split's files in a latents folder."""

    ptr: Path
    flat: Path
    value: Path
    scale: Path
    keep: Path


def split_files(folder: Path, split: str) -> SplitFiles:
    """``<split>.ptr.u64.npy`` [F+1], ``flat.u32`` and ``value.f16`` [n], ``scale.f32`` [F], ``keep.npy`` bool [N]."""
    names = ("ptr.u64", "flat.u32", "value.f16", "scale.f32", "keep")
    return SplitFiles(*(Path(folder) / f"{split}.{name}.npy" for name in names))


def to_half(value: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float16]:
    """a / max_f as float16, never zero; relative error at most 2^-11 down to 6.1e-5 max_f."""
    return np.maximum(value / scale, SMALLEST).astype(np.float16)


def from_half(value: NDArray[np.float16], scale: float) -> NDArray[np.float32]:
    """Back to activations in the LM's own units."""
    return value.astype(np.float32) * np.float32(scale)
