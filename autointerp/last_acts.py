"""Ask for a latent's activation on the last token of short token lists: the model behind N2G's probes.

Each distinct token list is forwarded once, stopped at the hookpoint, and only its last position is encoded; the whole
code of that token is kept, so one forward serves every latent that asks about the same few tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autointerp.interfaces import Probe
from sae.errors import ConfigError

if TYPE_CHECKING:
    from sae.base import SAE
    from sae.language_model import LanguageModel

BATCH_TOKENS = 768
"""Tokens per forward, padding included: large enough to keep two cores busy, small enough for the cache."""
PADDING_SHARE = 0.15
"""A batch may hold this share of padding; a longer list opens a new batch."""

Code = tuple[NDArray[np.int64], NDArray[np.float32]]


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
        """Tokens forwarded, padding included."""
        self._codes: dict[tuple[int, ...], Code] = {}

    def __call__(self, probes: Sequence[Probe]) -> NDArray[np.float32]:
        """float32 [n_probes]: activation of each probe's latent at its last token; 0 where it is not active."""
        new = sorted({tokens for _, tokens in probes} - self._codes.keys(), key=lambda t: (len(t), t))
        if new and not new[0]:
            raise ConfigError("a probe without tokens has no last position")
        for batch in _batches(new, self.batch_tokens):
            self._forward(batch)
        out = np.zeros(len(probes), dtype=np.float32)
        for i, (latent, tokens) in enumerate(probes):
            indices, values = self._codes[tokens]
            found = np.flatnonzero(indices == latent)
            if found.size:
                out[i] = values[found[0]]
        return out

    def _forward(self, batch: list[tuple[int, ...]]) -> None:
        import torch

        longest = len(batch[-1])
        # Padding stands on the right, where a causal model cannot see it from the last real token.
        ids = torch.tensor([t + (t[-1],) * (longest - len(t)) for t in batch], device=self.lm.device)
        last = torch.tensor([len(t) - 1 for t in batch], device=self.lm.device)
        with torch.inference_mode():
            acts_BLD = self.lm.capture(ids, [self.hookpoint])[self.hookpoint]
            x_BD = acts_BLD[torch.arange(len(batch), device=last.device), last].float()
            values_BK, indices_BK = self.sae.encode_sparse(x_BD.to(self.sae.W_dec_FD.device))
        values, indices = values_BK.float().cpu().numpy(), indices_BK.cpu().numpy()
        for i, tokens in enumerate(batch):
            active = values[i] > 0
            self._codes[tokens] = (indices[i][active], values[i][active])
        self.n_forwarded += len(batch)
        self.n_tokens += len(batch) * longest


def _batches(lists: Sequence[tuple[int, ...]], batch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Length-sorted lists cut so that a padded batch stays within ``batch_tokens`` and wastes little."""
    batches: list[list[tuple[int, ...]]] = []
    content = 0
    for tokens in lists:
        content += len(tokens)
        padded = (len(batches[-1]) + 1) * len(tokens) if batches else 0
        if not batches or padded > batch_tokens or padded - content > PADDING_SHARE * padded + len(tokens):
            batches.append([])
            content = len(tokens)
        batches[-1].append(tokens)
    return batches


def make_last_acts(lm: "LanguageModel", sae: "SAE", hookpoint: str, *, batch_tokens: int = BATCH_TOKENS) -> LastActs:
    """Probes through the LM up to ``hookpoint`` and the SAE; :class:`ConfigError` if their widths differ."""
    return LastActs(lm, sae, hookpoint, batch_tokens=batch_tokens)
