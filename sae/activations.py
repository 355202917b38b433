"""Activations of a token set at one hookpoint, on disk: all positions, with the token filter as a mask.

N = B * L flat tokens, D channels; flat index n = row * L + position. Values are the LM's own, before any normalisation.
"""

from collections.abc import Iterator
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
    def _acts(self) -> torch.Tensor:
        dtype = torch.float32 if self.manifest["config"]["store_dtype"] == "float32" else torch.bfloat16
        return torch.from_file(
            str(self.folder / "acts_ND.bin"), shared=False, size=self.n_tokens * self.d_in, dtype=dtype
        ).view(self.n_tokens, self.d_in)

    def read(self, flat: Any) -> torch.Tensor:
        """float32 [n, D] of the given flat indices (array, tensor or slice), in their order."""
        if isinstance(flat, slice):
            return self._acts[flat].to(torch.float32)
        index = torch.as_tensor(np.asarray(flat, dtype=np.int64))
        return self._acts.index_select(0, index).to(torch.float32)

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
    """Run the LM up to the hookpoint over all rows and store what it gives; a complete folder is reused.

    ``norm_median`` fixes the norm rule of the filter; None takes it from the first 65,536 tokens that pass the other
    rules (TRAINING 1). ``batch_rows`` changes speed alone. Raises :class:`DataError` if an activation is not finite.
    """
    filter_cfg = filter_cfg or FilterConfig()
    config, key = _identity(lm, tokens, hookpoint, store_dtype, filter_cfg, norm_median)
    folder = artefact_dir(root, "activations", key)
    if force or not is_complete(folder):
        with writing(
            folder,
            kind="activations",
            key=key,
            stage_version=ACTIVATIONS_VERSION,
            config=config,
            inputs={"tokens": tokens.key},
        ) as out:
            norms = _run(lm, tokens, hookpoint, store_dtype, out.path / "acts_ND.bin", batch_rows)
            codes, median = filter_codes(tokens, norms, drop_ids(lm.tokenizer), filter_cfg, norm_median)
            np.save(out.path / "filter.npy", codes)
            out.counts.update(
                n_tokens=len(codes),
                n_kept=int((codes == KEPT).sum()),
                d_in=lm.check_hookpoint(hookpoint),
                norm_median=median,
                n_dropped={name: int((codes == c).sum()) for c, name in REASONS.items()},
            )
    return ActivationStore.open(folder, tokens)


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
    lm: "LanguageModel", tokens: TokenSet, hookpoint: str, store_dtype: str, path: Path, batch_rows: int
) -> np.ndarray:
    """Write the activations, row by row; returns their norms, float32 [N]."""
    rows = tokens.tokens_BL
    dtype = torch.float32 if store_dtype == "float32" else torch.bfloat16
    norms = np.empty(rows.size, dtype=np.float32)
    with open(path, "wb") as file, progress(f"activations: {tokens.split}", total=rows.size, unit="tok") as bar:
        for start in range(0, len(rows), batch_rows):
            ids = torch.from_numpy(rows[start : start + batch_rows].astype(np.int64)).to(lm.device)
            acts = lm.capture(ids, [hookpoint])[hookpoint].float().reshape(ids.numel(), -1)
            begin = start * tokens.L
            norms[begin : begin + len(acts)] = acts.norm(dim=1).cpu().numpy()
            if not np.isfinite(norms[begin : begin + len(acts)]).all():
                raise DataError(
                    f"{lm.name} gives values that are not finite at {hookpoint} in row {start} or the next "
                    f"{batch_rows - 1}; try --model in float32"
                )
            stored = acts.to(dtype).contiguous().cpu()
            file.write(stored.view(torch.uint8).numpy().tobytes())
            bar.advance(ids.numel())
    return norms


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
