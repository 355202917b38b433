"""GroupMax: the latents lie in K contiguous groups; the largest of each is kept, then ReLU (sparsify 1.3.3; FORMATS 1).

One maximum per group replaces the selection among all latents: cheaper than TopK, at the price that two latents of one
group are never active together.
"""

import torch
from torch import Tensor

from sae import ops
from sae.base import SAE, StepLoss, TrainState, step_loss
from sae.config import SAEConfig
from sae.errors import ConfigError


class GroupMax(SAE):
    """L0 is at most K, the number of groups."""

    activation = "groupmax"
    uses_k = True

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        if cfg.k is None or not 1 <= cfg.k <= cfg.d_sae or cfg.d_sae % cfg.k:
            raise ConfigError(f"groupmax needs k groups of equal size, got k {cfg.k} for {cfg.d_sae} latents")
        self.k: int = cfg.k

    def encode_entries(self, n_ND: Tensor) -> ops.Entries:
        return ops.entries_of(self._latents(n_ND))

    def encode_sparse(self, x_ND: Tensor) -> ops.SparseLatents:
        return self._latents(self.normalise(x_ND)[0])

    def _latents(self, n_ND: Tensor) -> ops.SparseLatents:
        """Slot k holds the largest of group k; block by block, so that N x F is never stored."""
        size = self.d_sae // self.k
        starts_K = torch.arange(self.k, device=n_ND.device) * size
        values, indices = [], []
        for n_nD in n_ND.split(ops.block_rows(self.d_sae, n_ND.element_size())):
            h_nF = ops.encode_dense(n_nD, self.b_pre_D, self.W_enc_FD, self.b_enc_F)
            best = h_nF.unflatten(1, (self.k, size)).max(2)
            values.append(best.values.relu())
            indices.append(best.indices + starts_K)
        return ops.SparseLatents(torch.cat(values), torch.cat(indices))

    @torch.no_grad()
    def selection_gap(self, x_ND: Tensor) -> Tensor | None:
        size = self.d_sae // self.k
        if size == 1:
            return None
        top = self.pre_activations(x_ND).unflatten(1, (self.k, size)).clamp_min(0).topk(2, dim=2).values
        # A group without a positive latent is empty whichever of its latents is the largest.
        gap_NK = torch.where(top[..., 0] > 0, top[..., 0] - top[..., 1], torch.inf)
        return gap_NK.amin(1) / top[..., 0].amax(1).clamp_min(1e-12)

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Normalised squared error plus ``aux_alpha`` times the auxiliary loss of dead latents."""
        no_penalty = torch.zeros((), dtype=n_ND.dtype, device=n_ND.device)
        return step_loss(self, n_ND, self.encode_entries(n_ND), state, no_penalty, with_aux=True)


PLUGIN = GroupMax
