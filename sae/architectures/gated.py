"""Gated: which latents are active and how strongly are told by two heads of one encoder; Rajamanoharan et al.,
arXiv 2404.16014.

``gate = u W_enc + b_gate``; ``z = H(gate) relu(exp(r_mag) (u W_enc) + b_mag)``;
``loss = mean |n - y|^2 / v0 + gate_l1 mean sum relu(gate) / c + mean |n - y_gate|^2 / v0``, where ``y_gate = relu(gate)
sg(W_dec) + sg(b_dec)``, c is the root mean square norm of a normalised token and sg = no gradient. The L1 penalty is on
the gate alone, so no value shrinks.
"""

import torch
from torch import Tensor, nn

from sae import calibrate, losses, ops, ops_above
from sae.base import SAE, Fit, StepLoss, TrainState, step_loss
from sae.config import SAEConfig

START_DENSITY = 0.02
"""Share of latents active per token at the start."""


class Gated(SAE):
    """L0 is whatever the penalty leaves. ``pre_activations`` are those of the gate; its bias is ``b_enc_F``."""

    activation = "gated"
    latent_scaled = ("b_mag_F",)

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        self.b_mag_F = nn.Parameter(torch.zeros(cfg.d_sae))
        self.r_mag_F = nn.Parameter(torch.zeros(cfg.d_sae))

    @property
    def b_gate_F(self) -> Tensor:
        """The name that the file has for the encoder bias."""
        return self.b_enc_F

    @classmethod
    def tensor_shapes(cls, cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
        shapes = super().tensor_shapes(cfg)
        del shapes["b_enc_F"]
        return shapes | dict.fromkeys(("b_gate_F", "b_mag_F", "r_mag_F"), (cfg.d_sae,))

    def gates(self, n_ND: Tensor) -> ops.Entries:
        """Open gates: entries of ``u W_enc + b_gate`` above 0."""
        return ops.encode_relu(n_ND, self.b_pre_D, self.W_enc_FD, self.b_enc_F)

    def magnitudes(self, gates: ops.Entries) -> ops.Entries:
        """Values of the latents whose gate is open, those of value 0 included."""
        at_E = gates.indices_E
        product_E = gates.values_E - self.b_enc_F.index_select(0, at_E)
        scaled_E = self.r_mag_F.index_select(0, at_E).exp() * product_E + self.b_mag_F.index_select(0, at_E)
        return gates._replace(values_E=scaled_E.relu())

    def encode_entries(self, n_ND: Tensor) -> ops.Entries:
        found = self.magnitudes(self.gates(n_ND))
        return ops_above.kept(found, found.values_E > 0)

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """The loss of the module's head, plus ``aux_alpha`` times the auxiliary loss of dead latents' gates."""
        gates = self.gates(n_ND)
        penalty = state.sparsity_ramp * state.cfg.gate_l1 * losses.l1(gates.values_E, len(n_ND), state.input_rms_norm)
        by_gates_ND = ops.decode_entries(gates, self.W_dec_FD.detach()) + self.b_dec_D.detach()
        entries = self.magnitudes(gates)
        y_ND = self.decode_normalised(entries)
        residual_ND = n_ND - y_ND
        mse = losses.normalised_mse(residual_ND, state.v0) + losses.normalised_mse(n_ND - by_gates_ND, state.v0)
        return step_loss(self, n_ND, entries, state, penalty, with_aux=True, fit=Fit(mse, y_ND, residual_ND))

    @torch.no_grad()
    def start_sparse(self, n_ND: Tensor) -> None:
        """One negative bias of all gates, so that a short run does not spend its steps on falling from half of them."""
        h_nF = calibrate.sample_pre_activations(self, n_ND)
        self.b_enc_F.sub_(calibrate.between(h_nF.view(-1), max(1, round(START_DENSITY * h_nF.numel()))))


PLUGIN = Gated
