"""Activations of a token set at one hookpoint, on disk: all positions, with the token filter as a mask.

N = B * L flat tokens, D channels; flat index n = row * L + position. Values are the LM's own, before any normalisation.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sae.config import FilterConfig, to_dict
from sae.console import progress
from sae.errors import DataError
from sae.manifest import artefact_dir, is_complete, key_of, read_manifest, rng, writing
from sae.resume import locked
from sae.shards import SHARD_TOKENS, Shards, forget_shards, shard_name
from sae.tokens import TokenSet, drop_ids

if TYPE_CHECKING:
    from sae.language_model import LanguageModel

ACTIVATIONS_VERSION = 1
MEDIAN_TOKENS = 65_536
KEPT, BY_POSITION, BY_TOKEN, BY_NORM = 0, 1, 2, 3
REASONS = {BY_POSITION: "position", BY_TOKEN: "token", BY_NORM: "norm"}
BATCH_ROWS = 8
"""Measured on two cores: 8 rows of 128 are never slower than 32 (they stay in cache)."""


@dataclass(frozen=True)
class ActivationStore:
    """Reading side of one activations folder."""

    folder: Path
    manifest: dict[str, Any]
    tokens: TokenSet

    @staticmethod
    def open(folder: Path, tokens: TokenSet) -> "ActivationStore":
        """:class:`sae.errors.ArtefactError` if the folder is not complete."""
        return ActivationStore(Path(folder), read_manifest(folder), tokens)

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @property
    def d_in(self) -> int:
        return int(self.manifest["counts"]["d_in"])

    @property
    def norm_median(self) -> float:
        """Median norm over the tokens that the filter's constant was taken from, in the LM's units."""
        return float(self.manifest["counts"]["norm_median"])

    @property
    def n_dropped(self) -> dict[str, int]:
        """Tokens dropped by each rule of the filter."""
        return dict(self.manifest["counts"]["n_dropped"])

    @property
    def n_tokens(self) -> int:
        return int(self.manifest["counts"]["n_tokens"])

    @property
    def n_kept(self) -> int:
        return len(self.kept_N)

    @cached_property
    def codes_N(self) -> np.ndarray:
        """uint8 per token: 0 kept, 1 dropped by position, 2 by token id, 3 by norm."""
        return np.load(self.folder / "filter.npy")

    @cached_property
    def keep_N(self) -> np.ndarray:
        """bool per token."""
        return self.codes_N == KEPT

    @cached_property
    def kept_N(self) -> np.ndarray:
        """int64 flat indices that pass the filter, ascending."""
        return np.flatnonzero(self.keep_N)

    @cached_property
    def doc_of_N(self) -> np.ndarray:
        """int32 document of each flat index."""
        return self.tokens.doc_ids_BL().reshape(-1)

    @cached_property
    def _shards(self) -> list[torch.Tensor]:
        """[n, D] of each file, in order."""
        dtype = torch.float32 if self.manifest["config"]["store_dtype"] == "float32" else torch.bfloat16
        found = []
        for number in range(sum(name.startswith("acts_ND.") for name in self.manifest["files"])):
            name = shard_name(number)
            size = int(self.manifest["files"][name]["bytes"]) // dtype.itemsize
            flat = torch.from_file(str(self.folder / name), shared=False, size=size, dtype=dtype)
            found.append(flat.view(-1, self.d_in))
        return found

    @cached_property
    def _ends(self) -> np.ndarray:
        """Token behind the last one of each shard."""
        return np.cumsum([len(shard) for shard in self._shards])

    def read(self, flat: Any) -> torch.Tensor:
        """float32 [n, D] of the given flat indices (array, tensor or slice), in their order."""
        if isinstance(flat, slice):
            if len(self._shards) == 1:
                return self._shards[0][flat].to(torch.float32)
            asked = range(*flat.indices(self.n_tokens))
            flat = np.arange(asked.start, asked.stop, asked.step)
        index = np.ascontiguousarray(flat, dtype=np.int64)
        if len(self._shards) == 1:
            return self._shards[0].index_select(0, torch.from_numpy(index)).to(torch.float32)
        found = torch.empty(len(index), self.d_in, dtype=torch.float32)
        shard_of = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(shard_of):
            places = np.flatnonzero(shard_of == number)
            shard = self._shards[number]
            inside = torch.from_numpy(index[places] - (self._ends[number] - len(shard)))
            found[torch.from_numpy(places)] = shard.index_select(0, inside).to(torch.float32)
        return found

    def batches(
        self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0
    ) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """(x_ND float32, flat indices), every kept token once per epoch in a permutation of (seed, epoch).

        The whole store is shuffled, not a window of it. The last, short batch of an epoch is left out. ``first``: the
        batch to begin with, without reading those before.
        """
        kept = self.kept_N
        per_epoch = len(kept) // batch_tokens
        for epoch in range(first // per_epoch if per_epoch else 0, epochs):
            order = rng(seed, "batches", epoch).permutation(len(kept))
            for batch in range(max(0, first - epoch * per_epoch), per_epoch):
                start = batch * batch_tokens
                flat = kept[order[start : start + batch_tokens]]
                yield self.read(flat), flat


def capture_activations(
    root: Path,
    lm: "LanguageModel",
    tokens: TokenSet,
    hookpoint: str,
    *,
    store_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    filter_cfg: FilterConfig | None = None,
    norm_median: float | None = None,
    batch_rows: int = BATCH_ROWS,
    force: bool = False,
) -> ActivationStore:
    """:func:`capture_many` for one hookpoint."""
    return capture_many(
        root, lm, tokens, [hookpoint], store_dtype=store_dtype, filter_cfg=filter_cfg, norm_median=norm_median,
        batch_rows=batch_rows, force=force,
    )[0]  # fmt: skip


def capture_many(
    root: Path,
    lm: "LanguageModel",
    tokens: TokenSet,
    hookpoints: Sequence[str],
    *,
    store_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    filter_cfg: FilterConfig | None = None,
    norm_median: float | None = None,
    batch_rows: int = BATCH_ROWS,
    force: bool = False,
) -> tuple[ActivationStore, ...]:
    """Run the LM over all rows, once for all hookpoints, and store what it gives; complete folders are reused.

    What is written is kept in shards of 2^18 tokens; a killed or failed collecting goes on after its last whole shard.
    ``norm_median`` fixes the norm rule of the filter; None takes it from the first 65,536 tokens that pass the other
    rules (TRAINING 1). ``batch_rows`` changes speed alone. Raises :class:`DataError` if an activation is not finite,
    :class:`sae.errors.ArtefactError` if the disk is full or another process collects the same.
    """
    filter_cfg = filter_cfg or FilterConfig()
    folders: dict[str, Path] = {}
    missing: list[Shards] = []
    with ExitStack() as stack:
        for hookpoint in dict.fromkeys(hookpoints):
            config, key = _identity(lm, tokens, hookpoint, store_dtype, filter_cfg, norm_median)
            folders[hookpoint] = folder = artefact_dir(root, "activations", key)
            if is_complete(folder) and not force:
                continue
            working = folder.with_name(folder.name + ".run")
            stack.callback(_remove_working, working, folder)
            stack.enter_context(locked(working, "collects these activations"))
            if force:
                forget_shards(working)
            out = stack.enter_context(
                writing(
                    folder, kind="activations", key=key, stage_version=ACTIVATIONS_VERSION, config=config,
                    inputs={"tokens": tokens.key},
                )
            )  # fmt: skip
            missing.append(Shards(hookpoint, working, out))
        if missing:
            _run(lm, tokens, missing, store_dtype, batch_rows)
        for shards in missing:
            norms = shards.move()
            codes, median = filter_codes(tokens, norms, drop_ids(lm.tokenizer), filter_cfg, norm_median)
            np.save(shards.out.path / "filter.npy", codes)
            shards.out.counts.update(
                n_tokens=len(codes),
                n_kept=int((codes == KEPT).sum()),
                d_in=lm.check_hookpoint(shards.hookpoint),
                norm_median=median,
                n_dropped={name: int((codes == c).sum()) for c, name in REASONS.items()},
            )
    return tuple(ActivationStore.open(folders[hookpoint], tokens) for hookpoint in hookpoints)


def _remove_working(working: Path, folder: Path) -> None:
    """Unless it holds whole shards of an artefact that is not complete."""
    if is_complete(folder) or not any(working.glob("norms-*")):
        shutil.rmtree(working, ignore_errors=True)


def _identity(
    lm: "LanguageModel", tokens: TokenSet, hookpoint: str, store_dtype: str, filter_cfg: FilterConfig,
    norm_median: float | None,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    config = {
        "hookpoint": hookpoint,
        "store_dtype": store_dtype,
        "lm": lm.name,
        "lm_revision": lm.revision,
        "lm_dtype": str(lm.dtype).removeprefix("torch."),
        "filter": to_dict(filter_cfg),
        "norm_median": norm_median,
    }
    return config, key_of("activations", ACTIVATIONS_VERSION, config, {"tokens": tokens.key})


def stored_activations(
    root: Path, lm: "LanguageModel", tokens: TokenSet, hookpoint: str, filter_cfg: FilterConfig
) -> ActivationStore | None:
    """What :func:`capture_activations` would reuse with its defaults; None where it would collect."""
    _, key = _identity(lm, tokens, hookpoint, "bfloat16", filter_cfg, None)
    folder = artefact_dir(root, "activations", key)
    return ActivationStore.open(folder, tokens) if is_complete(folder) else None


def _run(
    lm: "LanguageModel", tokens: TokenSet, missing: Sequence[Shards], store_dtype: str, batch_rows: int
) -> None:
    """Write the shards that are not there, row by row, at all hookpoints together."""
    rows = tokens.tokens_BL
    dtype = torch.float32 if store_dtype == "float32" else torch.bfloat16
    per_shard = max(1, SHARD_TOKENS // tokens.L // batch_rows) * batch_rows
    with progress(f"activations: {tokens.split}", total=rows.size, unit="tok") as bar:
        for begin in range(0, len(rows), per_shard):
            end = min(begin + per_shard, len(rows))
            wanted = [shards for shards in missing if not shards.holds(begin, end)]
            if not wanted:
                bar.advance((end - begin) * tokens.L)
                continue
            with ExitStack() as stack:
                files = [stack.enter_context(shards.writing(begin, end)) for shards in wanted]
                for start in range(begin, end, batch_rows):
                    ids = torch.from_numpy(rows[start : min(start + batch_rows, end)].astype(np.int64)).to(lm.device)
                    captured = lm.capture(ids, [shards.hookpoint for shards in wanted])
                    for shards, file in zip(wanted, files, strict=True):
                        acts = captured[shards.hookpoint].float().reshape(ids.numel(), -1)
                        norms = acts.norm(dim=1).cpu().numpy()
                        if not np.isfinite(norms).all():
                            raise DataError(
                                f"{lm.name} gives values that are not finite at {shards.hookpoint} in row {start} or "
                                f"the next {batch_rows - 1}; try --model in float32"
                            )
                        file.add(acts.to(dtype).contiguous().cpu().view(torch.uint8).numpy().tobytes(), norms)
                    bar.advance(ids.numel())


def filter_codes(
    tokens: TokenSet, norms: np.ndarray, dropped_ids: tuple[int, ...], cfg: FilterConfig, median: float | None
) -> tuple[np.ndarray, float]:
    """(code per token uint8, the median norm used). Rules in order: position, token id, norm (TRAINING 1)."""
    rows = np.asarray(tokens.tokens_BL)
    codes: np.ndarray = np.zeros(rows.shape, dtype=np.uint8)
    if cfg.drop_special:
        codes[np.isin(rows, np.array(dropped_ids, dtype=rows.dtype))] = BY_TOKEN
    codes[:, [p for p in cfg.drop_positions if p < rows.shape[1]]] = BY_POSITION
    codes = codes.reshape(-1)
    passing = np.flatnonzero(codes == KEPT)[:MEDIAN_TOKENS]
    if median is None:
        if not len(passing):
            raise DataError(f"split {tokens.split}: no token passes the position and token rules of the filter")
        median = float(np.median(norms[passing]))
    if cfg.norm_multiple is not None:
        codes[(codes == KEPT) & (norms > cfg.norm_multiple * median)] = BY_NORM
    return codes, median
