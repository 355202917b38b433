"""TopK: z = relu(the K largest of h); Gao et al., arXiv 2406.04093, section 2.3. Sparsity needs no penalty.

With ``multi_topk`` the loss is L(K) + L(4K) / 8 (their section 5.3.1): a TopK SAE fits its K and little beside, this
one reconstructs better with every latent up to 4 K. It is run with K.
"""

import torch
from torch import Tensor

from sae import fused_step, losses, ops, ops_fused
from sae.base import Fit, StepLoss, TrainState, step_loss
from sae.config import SAEConfig
from sae.errors import ConfigError
from sae.topk_code import TopKCode

MULTI_FACTOR = 4
MULTI_WEIGHT = 1 / 8


def product_type(state: TrainState) -> torch.dtype | None:
    """Operands of the encoder product in training; None: as the weights."""
    return None if state.cfg.encoder_dtype == "float32" else torch.bfloat16


class TopK(TopKCode):
    """The code of :mod:`sae.topk_code`, fitted to its own input."""

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        self._copies: ops_fused.ComputeCopies | None = None

    def compute_copies(self) -> ops_fused.ComputeCopies:
        """Copies of the weights that the fused loss multiplies, made when they are first wanted (GPU alone)."""
        if self._copies is None:
            self._copies = ops_fused.ComputeCopies.of(self.W_enc_FD, self.b_enc_F, self.W_dec_FD)
        return self._copies

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Normalised squared error plus ``aux_alpha`` times the auxiliary loss of dead latents.

        On a GPU with Triton as one operation (:mod:`sae.fused_step`), else by the separate ones.
        """
        if state.cfg.multi_topk:
            return self._multi_loss(n_ND, state)
        if ops_fused.usable(n_ND, self.W_enc_FD):
            return fused_step.training_loss(self, self.k, n_ND, state, self.compute_copies())
        no_penalty = torch.zeros((), dtype=n_ND.dtype, device=n_ND.device)
        entries = ops.entries_of(self._latents(n_ND, product_type(state)))
        return step_loss(self, n_ND, entries, state, no_penalty, with_aux=True)

    def _multi_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """One selection of 4 K; the K largest of it are the code, the others are decoded on top of that."""
        wide_k = MULTI_FACTOR * self.k
        if wide_k > self.d_sae:
            raise ConfigError(f"multi_topk needs {MULTI_FACTOR} k latents, got k {self.k}, d_sae {self.d_sae}")
        values_NK, indices_NK = ops.encode_topk(
            n_ND, self.b_pre_D, self.W_enc_FD, self.b_enc_F, wide_k, dtype=product_type(state)
        )
        if values_NK.device.type != "cpu":  # Triton's slots are in no order
            order_NK = torch.sort(values_NK, dim=1, descending=True, stable=True).indices
            values_NK, indices_NK = values_NK.gather(1, order_NK), indices_NK.gather(1, order_NK)
        code, rest = (ops.SparseLatents(values_NK[:, part].contiguous(), indices_NK[:, part].contiguous())
                      for part in (slice(self.k), slice(self.k, None)))  # fmt: skip
        y_ND = self.decode_normalised(code)
        residual_ND = n_ND - y_ND
        wide_residual_ND = residual_ND - ops.sparse_decode(*rest, self.W_dec_FD)
        mse = losses.normalised_mse(residual_ND, state.v0)
        mse = mse + MULTI_WEIGHT * losses.normalised_mse(wide_residual_ND, state.v0)
        no_penalty = torch.zeros((), dtype=n_ND.dtype, device=n_ND.device)
        fit = Fit(mse, y_ND, residual_ND)
        return step_loss(self, n_ND, ops.entries_of(code), state, no_penalty, with_aux=True, fit=fit)


PLUGIN = TopK
