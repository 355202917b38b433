"""The JumpReLU code, z = h where h > theta, theta a learned threshold per latent, for whatever it is fitted to;
Rajamanoharan et al., arXiv 2407.14435.

``loss = mean |n - y|^2 / v0 + l0_weight (L0 / K - 1)^2``, L0 the mean over the batch (a square per token would drive
every token to K and defeat a variable code). Thresholds get straight-through gradients (``ops_above.encode_jump``).
They are parameters themselves, in float32, clamped at 0 after the step: their logarithm under Adam hardly moves, and a
clamp inside the graph has no gradient for good. Their learning rate is ten times the others'.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sae import calibrate, ops_above
from sae.base import StepLoss, TokenSource, TrainState, step_loss
from sae.config import SAEConfig
from sae.threshold import ThresholdSAE

THETA_LR = 10.0
BANDWIDTH = 0.1
"""Width of the straight-through window over the standard deviation of pre-activations at the start."""
L0_TOKENS = 16_384
"""Tokens on which L0 is measured at the end."""


class JumpReLUCode(ThresholdSAE):
    """``cfg.k`` is the L0 that training aims at."""

    threshold_F: nn.Parameter
    bandwidth: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        self.threshold_F = nn.Parameter(torch.zeros(cfg.d_sae))
        # In state_dict, as training goes on with it; not in the file of a finished SAE.
        self.register_buffer("bandwidth", torch.ones(()))

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Normalised squared error, the L0 penalty and ``aux_alpha`` times the auxiliary loss of dead latents."""
        code = ops_above.encode_jump(
            n_ND, self.b_pre_D, self.W_enc_FD, self.b_enc_F, self.threshold_F, float(self.bandwidth)
        )
        penalty = state.sparsity_ramp * state.cfg.l0_weight * (code.l0 / self.k - 1).square()
        return step_loss(self, n_ND, code.entries, state, penalty, with_aux=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        others = [p for p in self.parameters() if p is not self.threshold_F]
        return [{"params": others, "lr_scale": 1.0}, {"params": [self.threshold_F], "lr_scale": THETA_LR}]

    @torch.no_grad()
    def constrain_(self) -> None:
        self.threshold_F.clamp_min_(0)

    @torch.no_grad()
    def initialise(self, n_ND: Tensor, seed: int) -> None:
        """As the base class; the window is a tenth of the standard deviation of pre-activations."""
        super().initialise(n_ND, seed)
        self.fit_window_(n_ND)

    @torch.no_grad()
    def fit_window_(self, n_ND: Tensor) -> None:
        """Width of the straight-through window for pre-activations of normalised inputs."""
        self.bandwidth.fill_(BANDWIDTH * float(calibrate.sample_pre_activations(self, n_ND).std()))

    @torch.no_grad()
    def finish(self, source: TokenSource) -> None:
        """Thresholds are learned; only the L0 they give is measured."""
        kept_N = np.asarray(source.kept_N)
        picked = kept_N[np.linspace(0, len(kept_N) - 1, min(len(kept_N), L0_TOKENS)).astype(np.int64)]
        active = sum(len(self.encode_entries(self.normalise(source.read(part).to(self.W_dec_FD))[0]).values_E)
                     for part in np.array_split(picked, max(1, len(picked) // 4_096)))  # fmt: skip
        self.cfg = replace(
            self.cfg, threshold_source={"kind": "learned", "tokens": len(picked), "l0": active / len(picked)}
        )
