"""SAEs that run with a threshold per latent: z = h where h > theta, else 0 (FORMATS 1, activation ``threshold``).

Shapes: N tokens, D = d_in, F = d_sae. BatchTopK and Matryoshka get one number for all latents, by calibration; JumpReLU
learns one per latent.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from sae import calibrate, ops_above
from sae.base import SAE, TokenSource
from sae.config import SAEConfig
from sae.errors import ConfigError
from sae.ops import Entries

SHARE_BELOW = 0.9
"""Candidates of a batch lie above this share of the last batch's smallest kept value (TRAINING 3)."""


class ThresholdSAE(SAE):
    """Base of the architectures that run with thresholds; a subclass makes ``threshold_F``, at least 0."""

    activation = "threshold"
    uses_k = True
    latent_scaled: ClassVar[tuple[str, ...]] = ("threshold_F",)
    threshold_F: Tensor

    @property
    def k(self) -> int:
        """Mean number of active latents that training asks for; ``ConfigError`` for an import that does not say."""
        if self.cfg.k is None:
            raise ConfigError(f"architecture {self.cfg.architecture!r} needs k, the mean number of active latents")
        return self.cfg.k

    @classmethod
    def tensor_shapes(cls, cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
        return super().tensor_shapes(cfg) | {"threshold_F": (cfg.d_sae,)}

    def encode_entries(self, n_ND: Tensor) -> Entries:
        return ops_above.encode_above(n_ND, self.b_pre_D, self.W_enc_FD, self.b_enc_F, self.threshold_F)

    @torch.no_grad()
    def start_sparse(self, n_ND: Tensor) -> None:
        """One threshold for which the start sample has K active latents per token: there is no dense phase."""
        h_nF = calibrate.sample_pre_activations(self, n_ND)
        self.threshold_F.fill_(calibrate.between(h_nF.view(-1), self.k * len(h_nF)))

    @torch.no_grad()
    def selection_gap(self, x_ND: Tensor) -> Tensor | None:
        h_NF = self.pre_activations(x_ND)
        distance_N = (h_NF - self.threshold_F.clamp_min(0)).abs().amin(1)
        return distance_N / h_NF.amax(1).clamp_min(1e-12)


class CalibratedSAE(ThresholdSAE):
    """Trained on the K N largest of each batch, run with the threshold that has the same mean L0 (arXiv 2412.06410)."""

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        self.register_buffer("threshold_F", torch.zeros(cfg.d_sae))
        self._theta: float | None = None

    def encode_batch(self, n_ND: Tensor) -> Entries:
        """The code that training sees: the K N largest of the batch."""
        expected = float(self.threshold_F[0]) if self._theta is None else self._theta
        found = ops_above.encode_batchtopk(
            n_ND, self.b_pre_D, self.W_enc_FD, self.b_enc_F, self.k, bar=SHARE_BELOW * expected
        )
        if len(n_ND):
            self._theta = found.theta
        return found.entries

    @torch.no_grad()
    def finish(self, source: TokenSource) -> None:
        """Threshold by counting over the training activations; ``DataError`` if a second sample contradicts it."""
        found = calibrate.calibrate(self, source, self.k)
        self.threshold_F.fill_(found.threshold)
        self.cfg = replace(self.cfg, threshold_source=found.source())
