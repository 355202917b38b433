"""The ReLU code with an L1 penalty, z = relu(h), for whatever it is fitted to; Bricken et al. 2023, in the normalised
form of Gao et al. (arXiv 2406.04093).

``loss = mean |n - y|^2 / v0 + l1 * mean sum z / c``, c the root mean square norm of a normalised token. Decoder rows
are unit, or the penalty could be escaped by small codes and long rows. With ``l1_decoder_norm`` they are free, and the
penalty is ``l1 * mean sum z |W_dec[f]| / c`` (Conerly et al., transformer-circuits.pub, April 2024), which sees such an
escape; the SAE is saved with unit rows, their lengths in the codes (FORMATS E3).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae import losses, ops, optim
from sae.base import SAE, StepLoss, TokenSource, TrainState, step_loss
from sae.config import TrainConfig

START_DENSITY = 0.02
"""Share of latents active per token at the start; see :meth:`ReLUCode.initialise`."""
QUANTILE_ENTRIES = 2**24


class ReLUCode(SAE):
    """L0 is whatever the penalty leaves."""

    activation = "relu"

    def encode_entries(self, n_ND: Tensor) -> ops.Entries:
        return ops.encode_relu(n_ND, self.b_pre_D, self.W_enc_FD, self.b_enc_F)

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Normalised squared error plus the L1 penalty, warmed up by ``state.sparsity_ramp``."""
        entries = self.encode_entries(n_ND)
        weighted_E = entries.values_E
        if not self.cfg.decoder_unit_norm:
            weighted_E = weighted_E * torch.linalg.vector_norm(self.W_dec_FD, dim=1).index_select(0, entries.indices_E)
        penalty = losses.l1(weighted_E, len(n_ND), state.input_rms_norm)
        return step_loss(self, n_ND, entries, state, state.sparsity_ramp * state.cfg.l1 * penalty, with_aux=False)

    @classmethod
    def cfg_fields(cls, cfg: TrainConfig) -> dict[str, Any]:
        return super().cfg_fields(cfg) | {"decoder_unit_norm": not cfg.l1_decoder_norm}

    @torch.no_grad()
    def finish(self, source: TokenSource) -> None:
        """Free decoder rows become unit; no latent's contribution changes."""
        if self.cfg.decoder_unit_norm:
            return
        norms_F = torch.linalg.vector_norm(self.W_dec_FD, dim=1)
        self.scale_codes_(norms_F)
        self.W_dec_FD[norms_F == 0, 0] = 1.0  # a row of length 0 has no direction, and now no codes
        optim.normalise_rows_(self.W_dec_FD)
        self.cfg = replace(self.cfg, decoder_unit_norm=True)

    @torch.no_grad()
    def initialise(self, n_ND: Tensor, seed: int) -> None:
        """As the base class, with one negative encoder bias for which :data:`START_DENSITY` of the latents are active.

        With bias 0 half of all latents are active, and a short run spends most of its steps, dense and slow ones, on
        falling from there.
        """
        super().initialise(n_ND, seed)
        self.lower_biases_(n_ND)
        self._scale_encoder(n_ND[:4096])

    @torch.no_grad()
    def lower_biases_(self, n_ND: Tensor) -> None:
        """Encoder biases down by one number, for which :data:`START_DENSITY` of the pre-activations are positive."""
        sample_nD = n_ND[: max(1, QUANTILE_ENTRIES // self.d_sae)][:1024]
        h_nF = ops.encode_dense(sample_nD, self.b_pre_D, self.W_enc_FD, self.b_enc_F)
        kept = max(1, round(START_DENSITY * h_nF.numel()))
        self.b_enc_F.sub_(torch.topk(h_nF.view(-1), kept).values[-1].clamp_min(0))
