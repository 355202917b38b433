"""The TopK code, z = relu(the K largest of h), for whatever it is fitted to; Gao et al., arXiv 2406.04093, 2.3."""

import torch
from torch import Tensor

from sae import ops
from sae.base import SAE
from sae.config import SAEConfig
from sae.errors import ConfigError


class TopKCode(SAE):
    """L0 is at most K: a pre-activation below 0 is never active."""

    activation = "topk"
    uses_k = True

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        if cfg.k is None:
            raise ConfigError("a topk SAE needs k")
        self.k: int = cfg.k

    def encode_entries(self, n_ND: Tensor) -> ops.Entries:
        return ops.entries_of(self._latents(n_ND))

    def encode_sparse(self, x_ND: Tensor) -> ops.SparseLatents:
        return self._latents(self.normalise(x_ND)[0])

    def _latents(self, n_ND: Tensor, dtype: torch.dtype | None = None) -> ops.SparseLatents:
        return ops.encode_topk(n_ND, self.b_pre_D, self.W_enc_FD, self.b_enc_F, self.k, dtype=dtype)

    @torch.no_grad()
    def selection_gap(self, x_ND: Tensor) -> Tensor | None:
        if self.k == self.d_sae:
            return None
        top = torch.topk(self.pre_activations(x_ND), self.k + 1, dim=1).values
        return (top[:, -2].clamp_min(0) - top[:, -1].clamp_min(0)) / top[:, 0].clamp_min(1e-12)
