"""Latent cache: every nonzero activation of an SAE on held-out text, sorted by latent (AUTOINTERP 1, HOUSE arrow 4).

N flat tokens (n = row * L + position), D = d_in, F = d_sae, W tokens per grid window. Dropped tokens (the token filter)
are never encoded: they are neither positive nor negative evidence. Several SAEs share one read of the store.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autointerp import latent_sort, latent_stats, neighbours
from autointerp.config import ExemplarConfig
from autointerp.documents import assert_disjoint
from autointerp.latent_sort import BUFFER_ENTRIES, EntrySorter, split_files
from autointerp.records import EXPLAIN, INTERP_SPLITS
from autointerp.windows import Windows, grid_windows
from sae.console import progress
from sae.errors import ArtefactError, ConfigError, LeakError
from sae.manifest import Writer, artefact_dir, is_complete, key_of, read_manifest, rng, writing

if TYPE_CHECKING:
    from sae.activations import ActivationStore
    from sae.base import SAE
    from sae.tokens import TokenSet

KIND, STAGE_VERSION = "latents", 1
BLOCK_TOKENS = 4096
EAGER_NEIGHBOURS_D_SAE = 16_384
"""Up to this many latents all have decoder neighbours; of a wider SAE those that fire do (F^2 D work)."""
MAX_DISK_GB = 50.0
ENTRY_BYTES, SPILT_BYTES = 6, 8
MIN_BUFFER_ENTRIES = 1 << 20
"""Of one of many SAEs; together they share :data:`autointerp.latent_sort.BUFFER_ENTRIES`."""
UNKNOWN = "unknown"


class Entries(NamedTuple):
    """Nonzero activations of one latent on one split."""

    flat_n: NDArray[np.uint32]
    """Ascending flat token indices."""
    value_n: NDArray[np.float32]
    """Activations there, in the LM's own units."""


class SampledLatents(NamedTuple):
    """A uniform draw among the eligible."""

    latents: NDArray[np.int64]
    """Ascending."""
    alive: int
    """Latents with any activation."""
    eligible: int
    requested: int


def sae_hash(sae: "SAE") -> str:
    """SHA-256 over cfg and the names, shapes and bytes of the weights: a renamed file cannot pass for another SAE."""
    digest = hashlib.sha256(repr(sae.cfg).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        array = tensor.detach().float().cpu().contiguous().numpy()
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _check_stores(saes: Sequence["SAE"], stores: Mapping[str, "ActivationStore"], allow_train_tokens: bool) -> None:
    if EXPLAIN not in stores or not set(stores) <= set(INTERP_SPLITS):
        raise ConfigError(f"stores for splits {sorted(stores)}: expected explain and any of {', '.join(INTERP_SPLITS)}")
    for split, store in stores.items():
        if store.n_tokens >= 2**32:
            raise ConfigError(f"split {split} has {store.n_tokens} tokens; a latent cache holds fewer than 2^32")
        for sae in saes:
            if sae.d_in != store.d_in:
                raise ConfigError(f"{sae.sae_id} reads width {sae.d_in}, but the {split} activations have {store.d_in}")
            meta = sae.cfg.meta
            if meta is not None and meta.tokens_key == store.tokens.key and not allow_train_tokens:
                raise LeakError(
                    f"{sae.sae_id} was trained on the tokens of split {split} ({store.tokens.key}); "
                    "choose held-out text, or pass allow_train_tokens to look anyway"
                )


def build_latents(
    root: Path, sae: "SAE", stores: Mapping[str, "ActivationStore"], *, force: bool = False, **options: Any
) -> "LatentCache":
    """:func:`build_latents_many` for one SAE."""
    return build_latents_many(root, [sae], stores, force=force, **options)[0]


def build_latents_many(
    root: Path,
    saes: Sequence["SAE"],
    stores: Mapping[str, "ActivationStore"],
    *,
    window_tokens: int = 32,
    min_window_tokens: int = 8,
    allow_train_tokens: bool = False,
    block_tokens: int = BLOCK_TOKENS,
    max_disk_gb: float = MAX_DISK_GB,
    force: bool = False,
) -> list["LatentCache"]:
    """Caches of several SAEs of one hookpoint; each block of activations is read once for all of them.

    ``stores`` maps explain, calibrate, score to their activations. Writes ``latents/<key>/`` per SAE and skips those
    that are complete. Raises :class:`LeakError` for an SAE trained on these tokens or a document in two splits,
    :class:`ConfigError` for widths that do not fit, and where the first block says that all of it would take more than
    ``max_disk_gb`` (10^9 bytes), or more than there is.
    """
    _check_stores(saes, stores, allow_train_tokens)
    windows = {"window_tokens": window_tokens, "min_window_tokens": min_window_tokens}
    folders, pending = [], []
    for sae in saes:
        # Narrow SAEs keep the keys that they had before wide ones had neighbours.
        config = windows | ({"neighbours": "alive"} if sae.d_sae > EAGER_NEIGHBOURS_D_SAE else {})
        inputs = {"sae": sae_hash(sae)} | {f"activations.{s}": store.key for s, store in sorted(stores.items())}
        key = key_of(KIND, STAGE_VERSION, config, inputs)
        folders.append(artefact_dir(root, KIND, key))
        if force or not is_complete(folders[-1]):
            pending.append((sae, folders[-1], key, config, inputs))
    if pending:
        assert_disjoint({split: store.tokens for split, store in stores.items()})
        wanted = list({str(p[1]): p for p in pending}.values())
        with ExitStack() as stack:
            builders = []
            for sae, folder, key, config, inputs in wanted:
                stage = writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs)
                out = stack.enter_context(stage)
                builders.append(_Builder(sae, out, folder, windows, buffer_entries=BUFFER_ENTRIES // len(wanted)))
            _encode(builders, stores, block_tokens, _DiskLimit(root, stores, max_disk_gb))
    return [LatentCache.open(folder) for folder in folders]


class _DiskLimit:
    """Says after the first block how much disk all blocks will take."""

    def __init__(self, root: Path, stores: Mapping[str, "ActivationStore"], max_gb: float) -> None:
        sizes = [store.n_kept for store in stores.values()]
        self.root, self.max_gb, self.checked = root, max_gb, False
        # Runs of one split at a time lie beside what is final.
        self.bytes_per_rate = ENTRY_BYTES * sum(sizes) + SPILT_BYTES * max(sizes)

    def check(self, n_entries: int, n_tokens: int) -> None:
        """``n_entries`` of all SAEs on ``n_tokens``; :class:`ConfigError` where this rate leads over the limit."""
        if self.checked:
            return
        self.checked = True
        needed = n_entries / n_tokens * self.bytes_per_rate
        free = shutil.disk_usage(self.root).free
        if needed > min(self.max_gb * 1e9, free):
            raise ConfigError(
                f"the latents of this text would take about {needed / 1e9:.1f} GB of disk ({n_entries / n_tokens:.0f} "
                f"activations a token); {self.max_gb:g} GB are allowed and {free / 1e9:.1f} free: take fewer SAEs at "
                "a time or fewer tokens, or allow more (max_disk_gb)"
            )


def _encode(
    builders: Sequence["_Builder"], stores: Mapping[str, "ActivationStore"], block_tokens: int, disk: _DiskLimit
) -> None:
    splits = [s for s in INTERP_SPLITS if s in stores]
    total = sum(stores[s].n_kept for s in splits)
    with progress("Latent cache", total=total, unit="tokens") as bar:
        for split in splits:
            store = stores[split]
            for builder in builders:
                builder.begin(split)
            kept = np.asarray(store.kept_N)
            for low in range(0, kept.size, block_tokens):
                flat = kept[low : low + block_tokens]
                x_ND = store.read(flat)
                disk.check(sum(builder.add(x_ND, flat) for builder in builders), flat.size)
                bar.advance(flat.size)
            text = builders[0].text_of(store)
            for builder in builders:
                builder.end(split, store, text)
    for builder in builders:
        builder.finish()


class _Builder:
    """One SAE's cache in the making."""

    def __init__(
        self, sae: "SAE", writer: Writer, folder: Path, windows: dict[str, int], *, buffer_entries: int
    ) -> None:
        self.sae, self.writer, self.folder, self.windows = sae, writer, folder, windows
        self.buffer_entries = max(buffer_entries, MIN_BUFFER_ENTRIES)
        self.stats: dict[str, latent_stats.SplitStats] = {}
        self.non_finite_F = np.zeros(sae.d_sae, dtype=np.int64)
        trained_on = sae.cfg.meta.tokens_key if sae.cfg.meta is not None else ""
        self.description: dict[str, Any] = {
            "sae_id": sae.sae_id, "d_sae": sae.d_sae, "splits": {}, "trained_on": trained_on or UNKNOWN, **windows,
        }  # fmt: skip

    def begin(self, split: str) -> None:
        scratch = self.writer.path / f"scratch_{split}"
        self.sorter = EntrySorter(scratch, self.sae.d_sae, buffer_entries=self.buffer_entries)

    def add(self, x_ND: Any, flat_n: NDArray[np.int64]) -> int:
        """Entries of the next tokens; returns how many."""
        import torch

        with torch.no_grad():
            values_NK, indices_NK = self.sae.encode_sparse(x_ND.to(self.sae.W_enc_DF.device))
        values, indices = values_NK.float().cpu().numpy(), indices_NK.cpu().numpy()
        finite = np.isfinite(values)
        if not finite.all():
            self.non_finite_F += np.bincount(indices[~finite].astype(np.int64), minlength=self.sae.d_sae)
        token, slot = np.nonzero(finite & (values > 0))
        self.sorter.add(flat_n[token], indices[token, slot], values[token, slot])
        return int(token.size)

    def text_of(self, store: "ActivationStore") -> latent_stats.SplitText:
        """The same for all SAEs."""
        keep, doc, tokens = np.asarray(store.keep_N, dtype=bool), np.asarray(store.doc_of_N), store.tokens
        windows = grid_windows(keep, doc, tokens.L, **self.windows)
        return latent_stats.SplitText(tokens.tokens_BL, keep, doc, tokens.n_docs, windows)

    def end(self, split: str, store: "ActivationStore", text: latent_stats.SplitText) -> None:
        stats = latent_stats.SplitStats(self.sae.d_sae, text, shapes=split == EXPLAIN)
        files = split_files(self.writer.path, split)
        # Plain appends behind a header written for the known size: no second copy in memory, no sparse file.
        n = int(self.sorter.counts_F.sum()) + self.sorter.buffered
        flat = np.lib.format.open_memmap(files.flat, mode="w+", dtype=np.uint32, shape=(n,))
        value = np.lib.format.open_memmap(files.value, mode="w+", dtype=np.float16, shape=(n,))
        low = 0
        for chunk in self.sorter.chunks():
            scale = stats.add(chunk)
            high = low + chunk.flat.size
            flat[low:high] = chunk.flat
            value[low:high] = latent_sort.to_half(chunk.value, scale[chunk.segment])
            low = high
        flat.flush()
        value.flush()
        stats.done()
        np.save(files.ptr, np.concatenate([[0], np.cumsum(stats.n_active)]).astype(np.uint64))
        np.save(files.scale, stats.max_act)
        np.save(files.keep, text.keep_N)
        self.sorter.close()
        self.stats[split] = stats
        where, n_windows = os.path.relpath(store.tokens.folder, self.folder), stats.n_all_windows
        self.description["splits"][split] = {"tokens": where, "tokens_key": store.tokens.key, "n_windows": n_windows}
        self.writer.counts[split] = {"n_kept": stats.n_kept, "n_entries": n, "n_windows": n_windows}

    def finish(self) -> None:
        table = latent_stats.frame(self.stats)
        decoder = self.sae.W_dec_FD.detach().float()
        table["decoder_norm"] = decoder.norm(dim=1).cpu().numpy()
        table["encoder_norm"] = self.sae.W_enc_DF.detach().float().norm(dim=0).cpu().numpy()
        if self.non_finite_F.any():
            table["n_non_finite"] = self.non_finite_F
        every = self.sae.d_sae <= EAGER_NEIGHBOURS_D_SAE
        whose = np.arange(self.sae.d_sae) if every else np.flatnonzero(table["n_active"] > 0)
        near, cosine = neighbours.nearest_decoders(self.sae, whose)
        found = dict(zip(whose.tolist(), zip(near.tolist(), cosine.tolist(), strict=True), strict=True))
        nearest = [found.get(i, ([], [])) for i in range(self.sae.d_sae)]
        table["nearest"], table["nearest_cosine"] = [ids for ids, _ in nearest], [values for _, values in nearest]
        table.to_parquet(self.writer.path / "latents.parquet", compression="zstd")
        text = json.dumps(self.description, indent=1, sort_keys=True)
        (self.writer.path / "cache.json").write_text(text + "\n", encoding="utf-8")
        self.writer.counts |= {"n_latents": self.sae.d_sae, "n_alive": int((table["n_active"] > 0).sum())}


class LatentCache:
    """Reader of ``latents/<key>/``."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        if manifest["kind"] != KIND or manifest["stage_version"] != STAGE_VERSION:
            found = f"{manifest['kind']} v{manifest['stage_version']}"
            raise ArtefactError(f"{folder} holds {found}, expected {KIND} v{STAGE_VERSION}; build the cache again")
        self.folder = Path(folder)
        self.key: str = manifest["key"]
        self.counts: dict[str, Any] = manifest["counts"]
        self._about = json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
        self.sae_id: str = self._about["sae_id"]
        self.d_sae: int = self._about["d_sae"]
        self.window_tokens: int = self._about["window_tokens"]
        self.min_window_tokens: int = self._about["min_window_tokens"]
        self.splits: tuple[str, ...] = tuple(s for s in INTERP_SPLITS if s in self._about["splits"])
        self._arrays: dict[str, tuple[NDArray[Any], ...]] = {}
        self._tokens: dict[str, TokenSet] = {}
        self._docs: dict[str, NDArray[np.int32]] = {}
        self._windows: dict[str, Windows] = {}

    @classmethod
    def open(cls, folder: Path) -> "LatentCache":
        """:class:`ArtefactError` if the folder is not a complete latent cache."""
        return cls(folder)

    @cached_property
    def stats(self) -> pd.DataFrame:
        """One row per latent, see :mod:`autointerp.latent_stats`; unsuffixed strengths are of the split explain."""
        return pd.read_parquet(self.folder / "latents.parquet")

    def _split(self, split: str) -> tuple[NDArray[Any], ...]:
        if split not in self.splits:
            raise ConfigError(f"latent cache {self.key} has splits {', '.join(self.splits)}, not {split!r}")
        if split not in self._arrays:
            files = split_files(self.folder, split)
            mapped = (np.load(path, mmap_mode="r") for path in (files.flat, files.value))
            ptr = np.load(files.ptr).astype(np.int64)
            self._arrays[split] = (ptr, *mapped, np.load(files.scale), np.load(files.keep))
        return self._arrays[split]

    def entries(self, latent: int, split: str) -> Entries:
        """All nonzero activations of one latent on one split."""
        if not 0 <= latent < self.d_sae:
            raise ConfigError(f"{self.sae_id} has latents 0..{self.d_sae - 1}, not {latent}")
        ptr, flat, value, scale, _ = self._split(split)
        here = slice(int(ptr[latent]), int(ptr[latent + 1]))
        return Entries(np.array(flat[here]), latent_sort.from_half(value[here], float(scale[latent])))

    def tokens(self, split: str) -> "TokenSet":
        """The token set of a split."""
        self._split(split)
        if split not in self._tokens:
            from sae.tokens import TokenSet

            place = Path(os.path.normpath(self.folder / self._about["splits"][split]["tokens"]))
            self._tokens[split] = TokenSet.open(place)
        return self._tokens[split]

    def keep(self, split: str) -> NDArray[np.bool_]:
        """Token filter, bool [N]: True = encoded."""
        return self._split(split)[4]

    def doc_of(self, split: str) -> NDArray[np.int32]:
        """Document index of each flat token, [N]."""
        if split not in self._docs:
            self._docs[split] = np.asarray(self.tokens(split).doc_ids_BL()).reshape(-1)
        return self._docs[split]

    def windows(self, split: str) -> Windows:
        """The grid of a split."""
        if split not in self._windows:
            self._windows[split] = grid_windows(
                self.keep(split), self.doc_of(split), self.tokens(split).L, self.window_tokens, self.min_window_tokens
            )
        return self._windows[split]

    def positive_windows(self, latent: int, split: str) -> NDArray[np.int64]:
        """Ascending grid windows on which the latent is active."""
        return self.windows(split).containing(self.entries(latent, split).flat_n)

    def eligible(self, cfg: ExemplarConfig | None = None) -> NDArray[np.int64]:
        """Latents with enough positive windows in every split (``cfg.min_windows``) and no activation that is NaN or
        infinite, ascending."""
        wanted = dict(zip(INTERP_SPLITS, (cfg or ExemplarConfig()).min_windows, strict=True))
        enough = np.ones(self.d_sae, dtype=bool)
        for split in self.splits:
            enough &= self.stats[f"n_windows_{split}"].to_numpy() >= wanted[split]
        if "n_non_finite" in self.stats:
            enough &= self.stats["n_non_finite"].to_numpy() == 0
        return np.flatnonzero(enough)

    def nearest(self, latent: int) -> list[int]:
        """Latents with the nearest decoder directions; empty for a latent of a wide SAE that never fires."""
        return [int(i) for i in self.stats["nearest"].iloc[latent]] if "nearest" in self.stats else []

    @cached_property
    def _incidence(self) -> Any:
        ptr, flat, _, _, _ = self._split(EXPLAIN)
        return neighbours.incidence(ptr, flat, self.windows(EXPLAIN))

    def co_occurring(self, latents: Sequence[int], n: int = neighbours.NEIGHBOURS) -> dict[int, list[int]]:
        """Per latent the ``n`` others with the largest Jaccard overlap of positive windows on split explain.

        Fewer where fewer ever share a window. Only the asked latents cost anything: F^2 is never formed.
        """
        return neighbours.most_overlapping(self._incidence, latents, n)


def sample_latents(cache: LatentCache, n: int, seed: int = 0, cfg: ExemplarConfig | None = None) -> SampledLatents:
    """``n`` latents drawn uniformly without replacement from the eligible, ascending; all of them if fewer exist."""
    eligible = cache.eligible(cfg)
    drawn = rng(seed, cache.sae_id, "sample_latents").permutation(eligible)[:n]
    alive = int((cache.stats["n_active"] > 0).sum())
    return SampledLatents(np.sort(drawn), alive, int(eligible.size), n)
