"""TopK: z = relu(the K largest of h); Gao et al., arXiv 2406.04093, section 2.3. Sparsity needs no penalty."""

import torch
from torch import Tensor

from sae import fused_step, ops, ops_fused
from sae.base import SAE, StepLoss, TrainState, step_loss
from sae.config import SAEConfig
from sae.errors import ConfigError


class TopK(SAE):
    """L0 is at most K: a pre-activation below 0 is never active."""

    activation = "topk"
    uses_k = True

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        if cfg.k is None:
            raise ConfigError("a topk SAE needs k")
        self.k: int = cfg.k
        self._copies: ops_fused.ComputeCopies | None = None

    def encode_entries(self, n_ND: Tensor) -> ops.Entries:
        return ops.entries_of(self._latents(n_ND))

    def encode_sparse(self, x_ND: Tensor) -> ops.SparseLatents:
        return self._latents(self.normalise(x_ND)[0])

    def _latents(self, n_ND: Tensor) -> ops.SparseLatents:
        return ops.encode_topk(n_ND, self.b_pre_D, self.W_enc_FD, self.b_enc_F, self.k)

    @torch.no_grad()
    def selection_gap(self, x_ND: Tensor) -> Tensor | None:
        if self.k == self.d_sae:
            return None
        top = torch.topk(self.pre_activations(x_ND), self.k + 1, dim=1).values
        return (top[:, -2].clamp_min(0) - top[:, -1].clamp_min(0)) / top[:, 0].clamp_min(1e-12)

    def compute_copies(self) -> ops_fused.ComputeCopies:
        """Copies of the weights that the fused loss multiplies, made when they are first wanted (GPU alone)."""
        if self._copies is None:
            self._copies = ops_fused.ComputeCopies.of(self.W_enc_FD, self.b_enc_F, self.W_dec_FD)
        return self._copies

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Normalised squared error plus ``aux_alpha`` times the auxiliary loss of dead latents.

        On a GPU with Triton as one operation (:mod:`sae.fused_step`), else by the separate ones.
        """
        if ops_fused.usable(n_ND, self.W_enc_FD):
            return fused_step.training_loss(self, self.k, n_ND, state, self.compute_copies())
        no_penalty = torch.zeros((), dtype=n_ND.dtype, device=n_ND.device)
        return step_loss(self, n_ND, self.encode_entries(n_ND), state, no_penalty, with_aux=True)


PLUGIN = TopK
