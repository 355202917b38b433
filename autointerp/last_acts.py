"""Ask for a latent's activation on the last token of short token lists: the model behind N2G's probes.

Each distinct token list is forwarded once, stopped at the hookpoint, together with all that begin like it
(:mod:`sae.last_tokens`), and only its last position is encoded; the whole code of that token is kept, so one forward
serves every latent that asks about the same few tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autointerp.interfaces import Probe
from sae.console import progress
from sae.errors import ConfigError

if TYPE_CHECKING:
    from sae.base import SAE
    from sae.language_model import LanguageModel

BATCH_TOKENS = 1_024
"""Tokens per forward: large enough for the products (sae.packed.ROWS), small enough for the cache."""


class _Codes(NamedTuple):
    """Codes of the lists that one question brought, E active entries."""

    first: int
    """Number of the first list; the lists are numbered in the order in which they came."""
    key_E: NDArray[np.int64]
    """list number * F + latent, ascending."""
    value_E: NDArray[np.float32]


class LastActs:
    """Callable of :data:`autointerp.interfaces.LastActs`; ``n_forwarded`` and ``n_tokens`` count what it cost."""

    def __init__(self, lm: "LanguageModel", sae: "SAE", hookpoint: str, *, batch_tokens: int = BATCH_TOKENS) -> None:
        width = lm.check_hookpoint(hookpoint)
        if width != sae.d_in:
            raise ConfigError(f"{sae.sae_id} reads width {sae.d_in}, but {hookpoint} of {lm.name} has {width}")
        self.lm, self.sae, self.hookpoint, self.batch_tokens = lm, sae, hookpoint, batch_tokens
        self.n_forwarded = 0
        """Distinct token lists forwarded."""
        self.n_tokens = 0
        """Tokens forwarded: those that lists share at their front once a batch; padding included where there is any."""
        self._number: dict[tuple[int, ...], int] = {}
        self._codes: list[_Codes] = []

    def __call__(self, probes: Sequence[Probe]) -> NDArray[np.float32]:
        """float32 [n_probes]: activation of each probe's latent at its last token; 0 where it is not active."""
        number, first = self._number, len(self._number)
        new = [tokens for tokens in dict.fromkeys(tokens for _, tokens in probes) if tokens not in number]
        if new:
            self._codes.append(self._forward(new, first))
            number.update(zip(new, range(first, first + len(new)), strict=True))
        wanted = np.fromiter((number[tokens] for _, tokens in probes), np.int64, count=len(probes))
        latents = np.fromiter((latent for latent, _ in probes), np.int64, count=len(probes))
        return self._look_up(wanted, latents)

    def _look_up(self, wanted: NDArray[np.int64], latents: NDArray[np.int64]) -> NDArray[np.float32]:
        out = np.zeros(len(wanted), dtype=np.float32)
        of = np.searchsorted([c.first for c in self._codes], wanted, side="right") - 1
        for i in np.unique(of).tolist():
            codes, asked = self._codes[i], np.flatnonzero(of == i)
            if not codes.key_E.size:
                continue
            key = wanted[asked] * self.sae.d_sae + latents[asked]
            at = np.searchsorted(codes.key_E, key).clip(max=codes.key_E.size - 1)
            out[asked] = np.where(codes.key_E[at] == key, codes.value_E[at], 0.0)
        return out

    def _forward(self, new: list[tuple[int, ...]], first: int) -> _Codes:
        import torch

        from sae.last_tokens import last_tokens

        keys: list[NDArray[np.int64]] = []
        values: list[NDArray[np.float32]] = []
        with torch.inference_mode(), progress("N2G probes", total=len(new), unit="lists") as bar:
            for lists, x_BD, n_tokens in last_tokens(self.lm, new, self.hookpoint, self.batch_tokens):
                values_BK, indices_BK = self.sae.encode_sparse(x_BD.float().to(self.sae.W_dec_FD.device))
                found, latent = values_BK.float().cpu().numpy(), indices_BK.cpu().numpy()
                row, slot = np.nonzero(found > 0)
                keys.append((first + lists[row]) * self.sae.d_sae + latent[row, slot])
                values.append(found[row, slot])
                self.n_tokens += n_tokens
                bar.advance(len(lists))
        self.n_forwarded += len(new)
        key_E, value_E = np.concatenate(keys), np.concatenate(values)
        order = np.argsort(key_E, kind="stable")
        return _Codes(first, key_E[order], value_E[order])


def make_last_acts(lm: "LanguageModel", sae: "SAE", hookpoint: str, *, batch_tokens: int = BATCH_TOKENS) -> LastActs:
    """Probes through the LM up to ``hookpoint`` and the SAE; :class:`ConfigError` if their widths differ."""
    return LastActs(lm, sae, hookpoint, batch_tokens=batch_tokens)
