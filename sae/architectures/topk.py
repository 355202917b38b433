"""TopK: z = relu(the K largest of h); Gao et al., arXiv 2406.04093, section 2.3. Sparsity needs no penalty."""

import torch
from torch import Tensor

from sae import ops
from sae.base import SAE, StepLoss, TrainState, step_loss
from sae.config import SAEConfig
from sae.errors import ConfigError


class TopK(SAE):
    """L0 is at most K: a pre-activation below 0 is never active."""

    activation = "topk"

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        if cfg.k is None:
            raise ConfigError("a topk SAE needs k")
        self.k: int = cfg.k

    def encode_entries(self, n_ND: Tensor) -> ops.Entries:
        return ops.entries_of(self._latents(n_ND))

    def encode_sparse(self, x_ND: Tensor) -> ops.SparseLatents:
        return self._latents(self.normalise(x_ND)[0])

    def _latents(self, n_ND: Tensor) -> ops.SparseLatents:
        return ops.encode_topk(n_ND, self.b_pre_D, self.W_enc_FD, self.b_enc_F, self.k)

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Normalised squared error plus ``aux_alpha`` times the auxiliary loss of dead latents."""
        no_penalty = torch.zeros((), dtype=n_ND.dtype, device=n_ND.device)
        return step_loss(self, n_ND, self.encode_entries(n_ND), state, no_penalty, with_aux=True)


PLUGIN = TopK
