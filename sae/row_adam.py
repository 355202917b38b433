"""Adam for the four parameters of an SAE on a GPU, each matrix in one pass (KERNELS 9, step 1).

Shapes: F = d_sae, D = d_in. One pass over W_dec projects the gradient, steps, makes rows unit and writes the compute
copy; one over W_enc steps and writes its copy and the bias in tile order. Biases take torch's own fused Adam.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sae import ops_fused, optim
from sae.config import TrainConfig


class RowAdam:
    """The part of ``torch.optim.Adam`` that training uses; the same numbers but for rounding."""

    def __init__(self, W_enc_FD: nn.Parameter, b_enc_F: nn.Parameter, W_dec_FD: nn.Parameter, b_dec_D: nn.Parameter,
                 copies: ops_fused.ComputeCopies, cfg: TrainConfig) -> None:  # fmt: skip
        self.W_enc_FD, self.b_enc_F, self.W_dec_FD, self.b_dec_D = W_enc_FD, b_enc_F, W_dec_FD, b_dec_D
        self.copies = copies
        self.biases = optim.adam([b_enc_F, b_dec_D], cfg)
        self.eps = cfg.adam_eps
        self.moments: dict[str, tuple[Tensor, Tensor]] = {
            name: (torch.zeros_like(W), torch.zeros_like(W)) for name, W in (("enc", W_enc_FD), ("dec", W_dec_FD))
        }
        self.n_steps = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group, whose ``lr`` holds for all parameters."""
        return self.biases.param_groups

    def step(self) -> None:
        """Projection, Adam, unit rows, copies. All four parameters need a gradient."""
        self.n_steps += 1
        self.biases.step()  # first: the encoder's pass copies the new bias
        rate, betas = float(self.param_groups[0]["lr"]), self.param_groups[0]["betas"]
        assert self.W_enc_FD.grad is not None and self.W_dec_FD.grad is not None
        ops_fused.adam_step_(
            self.copies, (self.W_enc_FD, self.W_enc_FD.grad, *self.moments["enc"]), self.b_enc_F,
            (self.W_dec_FD, self.W_dec_FD.grad, *self.moments["dec"]),
            rate=rate, step=self.n_steps, betas=betas, eps=self.eps,
        )  # fmt: skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for parameter in (self.W_enc_FD, self.b_enc_F, self.W_dec_FD, self.b_dec_D):
            parameter.grad = None
